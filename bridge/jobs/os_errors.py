"""The operating system's errors as what they are, with the file or folder: full disks, lost rights.

Libraries raise others in their place, and say nothing of the path.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a disk or its owner does to a writer. Others, such as of a file that is looked for and made, are handled.
OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@contextmanager
def os_errors_of(path: Path) -> Iterator[None]:
    """An error inside that one of these led to is raised as an `OSError`; where that names no file, `path` is it."""
    try:
        yield
    except Exception as error:
        found = _cause_of(error)
        if found is None:
            raise
        raise OSError(found.errno, found.strerror, found.filename or str(path)) from error


def _cause_of(error: BaseException | None) -> OSError | None:
    """The first of them: the error, what it was raised from, or what was being handled then."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in OF_WRITING:
            return error
        seen.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
