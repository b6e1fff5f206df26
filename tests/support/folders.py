"""What a folder holds: of two to be compared, or of one before and after."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """With the times of the last changes: equal only if nothing was touched."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths}
