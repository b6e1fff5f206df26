"""Why a target cannot be run, in a sentence, from what its ranks raised."""

import re
from typing import NamedTuple

from bridge.jobs.rank_pool import RankError

TRACEBACK_LINES = 12
TARGET_ERROR = "bridge.proof.judge.target.TargetError: "
STILL_AT_WORK, RETURNED = "still at work", "returned"

# What a traceback's end looks like, and what it means.
KNOWN: tuple[tuple[str, str], ...] = (
    (
        r"TESpecProvider\(\)|No module named 'transformer_engine|\bHAVE_TE\b|Transformer ?Engine",
        "it needs Transformer Engine and a GPU, which are not here: run the judge on such a host, give a spec of "
        "megatron-core's local modules, or judge its own part alone with --part",
    ),
    (
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
    """From what the ranks reported: the first that raised or died, or else the first that did not return."""
    by_weight = sorted(error.reports, key=lambda report: (report == RETURNED, report.startswith(STILL_AT_WORK)))
    lines = [line for line in by_weight[0].splitlines() if line.strip()]
    tail = tuple(lines[-TRACEBACK_LINES:])
    if by_weight[0].startswith(STILL_AT_WORK):
        return Failure("it does not return: a rank waits, perhaps for a collective that another does not call", tail)
    said = _said(lines)
    if said.startswith(TARGET_ERROR):
        return Failure(said.removeprefix(TARGET_ERROR), ())
    known = next((meaning for pattern, meaning in KNOWN if re.search(pattern, "\n".join(tail))), None)
    return Failure(f"it raises {said}" if known is None else known, tail)


def _said(lines: list[str]) -> str:
    """The error and its message: from the last line that is not set in."""
    starts = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    return " ".join(line.strip() for line in lines[starts[-1] if starts else 0 :])
