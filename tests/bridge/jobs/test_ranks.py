"""Errors on one rank are raised on all, and keep their kind: bad input, a failing system, or a bug of ours."""

import errno
import json
from collections.abc import Iterator

import pytest
from support.ranks import RankPool
from torch import distributed

from bridge.jobs.ranks import raise_on_all_ranks

WORLD = 3


class RefusedError(ValueError):
    """A subclass that other ranks could not unpickle."""

    def __init__(self, name: str, *, found: int):
        super().__init__(f"{name}: found {found}")


ERRORS = {
    "ValueError": lambda: ValueError("q_proj: found 3"),
    "a subclass": lambda: RefusedError("q_proj", found=3),
    "JSONDecodeError": lambda: json.JSONDecodeError("no value", "{", 1),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    "full disk": lambda: OSError(errno.ENOSPC, "No space left on device", "/out/file"),
    "missing file": lambda: FileNotFoundError(errno.ENOENT, "No such file", "/in/file"),
    "OSError of one word": lambda: OSError("a worker process died"),
    "TypeError": lambda: TypeError("unsupported operand"),
    "KeyError": lambda: KeyError("model.norm.weight"),
    "AssertionError": lambda: AssertionError("cannot happen"),
}
KINDS = {"full disk": OSError, "missing file": FileNotFoundError, "OSError of one word": OSError}
BUGS = ("TypeError", "KeyError", "AssertionError")


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


def _fail(name: str) -> tuple[str, str, int | None]:
    """What this rank raises when rank 1 meets that error, and rank 2 another one."""
    rank = distributed.get_rank()
    try:
        with raise_on_all_ranks():
            if rank >= 1:  # the first of those that failed is heard
                raise ERRORS[name]() if rank == 1 else ValueError("of rank 2")
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "errno", None)
    return "nothing", "", None


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_rank_is_that_of_all_and_keeps_its_kind(ranks: RankPool, name: str) -> None:
    said, error = ranks.call(_fail, name), ERRORS[name]()
    assert said[0] == said[1] == said[2]
    kind, text, number = said[0]
    if name in BUGS:
        assert kind == "RuntimeError"
        assert text.startswith("rank 1 failed:\nTraceback")
        assert f"{type(error).__name__}: {error}" in text
        assert "in _fail" in text, "no traceback"
    else:
        assert kind == KINDS.get(name, ValueError).__name__
        assert text == str(error)
        assert number == getattr(error, "errno", None)


def test_one_rank_alone_raises_its_own_error() -> None:
    with pytest.raises(KeyError, match="own"), raise_on_all_ranks():
        raise KeyError("own")
