"""Why a target cannot be run, in a sentence, from what its ranks raised."""

import re
import signal
from collections.abc import Callable
from typing import NamedTuple

from bridge.jobs.rank_pool import DIED, RETURNED, STILL_AT_WORK, RankError

TRACEBACK_LINES = 12
TARGET_ERROR = "bridge.proof.judge.target.TargetError: "


def _transformer_engine_is_here() -> bool:
    from bridge.model.layer_spec import default_backend  # megatron-core takes seconds to import

    return default_backend() == "transformer_engine"


class Known(NamedTuple):
    """What a traceback's end looks like, what it means, and whether it can mean that on this machine."""

    pattern: str
    meaning: str
    possible: Callable[[], bool] = lambda: True


KNOWN = (
    Known(
        r"TESpecProvider\(\)|No module named 'transformer_engine|\bHAVE_TE\b|Transformer ?Engine",
        "it needs Transformer Engine and a GPU, which are not here: run the judge on such a host, give a spec of "
        "megatron-core's local modules, or judge its own part alone with --part",
        lambda: not _transformer_engine_is_here(),
    ),
    Known(
        r"Context parallelism is only supported by TEDotProductAttention",
        "its attention is megatron-core's local one, which has no context parallelism: use Transformer Engine's on "
        "GPUs, or one of your own",
    ),
    Known(
        r"No dot product attention backend is available",
        "Transformer Engine has no attention of this dtype at this layout, as of float32 across context-parallel "
        "ranks: judge it with --dtype bf16, or judge an attention of your own",
    ),
    Known(
        r"sequence parallel not supported by torch LayerNorm",
        "its norms are megatron-core's WrappedTorchNorm, which refuses sequence parallelism, without which experts are "
        "not trained under tensor parallelism: use norms that carry it (bridge.model.layer_spec.RMSNorm, or "
        "Transformer Engine's)",
    ),
)


class Failure(NamedTuple):
    """A reason in one sentence, and the last lines of the traceback of the rank that failed first."""

    reason: str
    traceback: tuple[str, ...]


def failure_of(error: RankError) -> Failure:
    """From what the ranks reported: the first that died, or else that raised, or else that did not return.

    A rank's death makes others raise, which wait for it.
    """
    kinds = (DIED, "", STILL_AT_WORK, RETURNED)
    report = min(error.reports, key=lambda report: kinds.index(_beginning(report)))
    lines = [line for line in report.splitlines() if line.strip()]
    tail = tuple(lines[-TRACEBACK_LINES:])
    if report.startswith(STILL_AT_WORK):
        return Failure("it does not return: a rank waits, perhaps for a collective that another does not call", tail)
    if report.startswith(DIED):
        return Failure(_how_it_died(error.reports.index(report), lines[0]), tail[1:])
    said = _said(lines)
    if said.startswith(TARGET_ERROR):
        return Failure(said.removeprefix(TARGET_ERROR), ())
    text = "\n".join(tail)
    known = next((one.meaning for one in KNOWN if re.search(one.pattern, text) and one.possible()), None)
    return Failure(f"it raises {said}" if known is None else known, tail)


def _beginning(report: str) -> str:
    return next((one for one in (DIED, STILL_AT_WORK, RETURNED) if report.startswith(one)), "")


def _how_it_died(rank: int, said: str) -> str:
    code = int(said.removeprefix(DIED))
    if code >= 0:
        return f"it ends the process of rank {rank}, with exit code {code}"
    name = signal.Signals(-code).name
    perhaps = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"the process of rank {rank} was ended by {name}{perhaps}"


def _said(lines: list[str]) -> str:
    """The error and its message: from the last line that is not set in."""
    starts = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    return " ".join(line.strip() for line in lines[starts[-1] if starts else 0 :])
