"""What a converted checkpoint takes along unchanged: every file but the weights, their index and config.json."""

from pathlib import Path

from bridge.huggingface.regular_files import file_inside
from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX


def carried_files(folder: Path) -> list[Path]:
    """Relative to the folder and sorted; hidden folders are left out.

    Raises:
        ValueError: one of them cannot be taken along: a link that leads out of the checkpoint, to a folder or to
            nothing, a file that may not be read, a FIFO, a socket, a device.
        OSError: a folder cannot be listed.
    """
    found = []
    for root, folders, names in folder.walk(on_error=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [(root / name).relative_to(folder) for name in names if not _hidden_folder(root / name)]
    own = {Path(CONFIG_NAME), Path(INDEX_NAME)}
    carried = sorted(path for path in found if path not in own and path.suffix != SHARD_SUFFIX)
    for path in carried:
        file_inside(folder, path)
    return carried


def _hidden_folder(path: Path) -> bool:
    """A link to a folder, which `walk` lists among the files."""
    return path.name.startswith(".") and path.is_dir()


def _raise(error: OSError) -> None:
    raise error
