"""Errors on one rank are raised on all, and keep their kind: bad input, a failing system, or a bug of ours."""

import errno
import json
from pathlib import Path

import pytest
from support.ranks import run_ranks
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


def _fail(rank: int, store: str, out: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    said = {}
    for name, make in ERRORS.items():
        try:
            with raise_on_all_ranks():
                if rank >= 1:  # the first of those that failed is heard
                    raise make() if rank == 1 else ValueError("of rank 2")
        except Exception as error:
            said[name] = (type(error).__name__, str(error), getattr(error, "errno", None))
    Path(out, f"{rank}.json").write_text(json.dumps(said))
    distributed.destroy_process_group()


def test_errors_of_one_rank_are_those_of_all_and_keep_their_kind(tmp_path: Path) -> None:
    run_ranks(_fail, (str(tmp_path / "store"), str(tmp_path)), WORLD)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(WORLD)]
    assert said[0] == said[1] == said[2]
    assert set(said[0]) == set(ERRORS)
    for name, (kind, text, number) in said[0].items():
        error = ERRORS[name]()
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
