"""Errors of a full disk that a library hides behind its own."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.jobs.os_errors import os_errors_of
from bridge.training import checkpoint_writer

FULL = OSError(errno.ENOSPC, "No space left on device")


def hidden(deep: int) -> None:
    """Raised while what it hides is handled, as torch's writer of archives does."""
    if not deep:
        raise FULL
    try:
        hidden(deep - 1)
    except Exception:
        raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904  # the library's


@pytest.mark.parametrize("deep", [0, 1, 2])
def test_it_is_raised_with_a_path(deep: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.pt'") as raised, os_errors_of(tmp_path / "a.pt"):
        hidden(deep)
    assert raised.value.errno == errno.ENOSPC


def test_the_path_that_it_names_stays(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"'/there'"), os_errors_of(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system", "/there")


def test_what_is_handled_does_not_count(tmp_path: Path) -> None:
    """A file that was looked for, and an error of another kind after it."""

    def look() -> None:
        try:
            (tmp_path / "cache").read_bytes()
        except FileNotFoundError:
            raise RuntimeError("a bug")  # noqa: B904

    with pytest.raises(RuntimeError, match="a bug"), os_errors_of(tmp_path):
        look()


def too_many(*_: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize(
    ("fails", "number"), [(lambda *_: hidden(1), errno.ENOSPC), (too_many, errno.EMFILE)], ids=["hidden", "another"]
)
def test_a_checkpoint_s_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., None], number: int
) -> None:
    monkeypatch.setattr(checkpoint_writer.FileSystemWriterAsync, "write_preloaded_data", staticmethod(fails))
    found = checkpoint_writer._written([(str(tmp_path / "__0_0.distcp"),)], [])
    assert isinstance(found, OSError)
    assert (found.errno, found.filename) == (number, str(tmp_path / "__0_0.distcp"))
