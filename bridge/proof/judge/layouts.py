"""The parallel layouts at which the judge runs a model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from reference.parallelism import Parallelism

RECOMPUTE: dict[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


class RunLayout(NamedTuple):
    """A name, the parallel sizes, and `TransformerConfig` fields besides them."""

    name: str
    sizes: Parallelism
    overrides: Mapping[str, Any] = {}


_ONE, _TWO, _TWO_EXPERTS = Parallelism(), Parallelism(tp=2, etp=1), Parallelism(tp=2, ep=2, etp=1)
QUICK = (RunLayout("tp 1", _ONE), RunLayout("tp 2", _TWO), RunLayout("tp 2, ep 2", _TWO_EXPERTS))
FULL = (
    *QUICK,
    RunLayout("tp 2, etp 2", Parallelism(tp=2)),
    RunLayout("pp 2", Parallelism(pp=2)),
    RunLayout("ep 2, dp 2", Parallelism(ep=2, dp=2)),
    RunLayout("tp 2, recompute", _TWO, RECOMPUTE),
    RunLayout("tp 4, 2 key heads", Parallelism(tp=4, etp=1)),
    RunLayout("tp 2, pp 2", Parallelism(tp=2, pp=2, etp=1)),
)
SETS = {"quick": QUICK, "full": FULL}


def layout_of(*, tp: int = 1, pp: int = 1, ep: int = 1, cp: int = 1) -> RunLayout:
    """One layout by its sizes; an expert is whole, and there are as many data-parallel ranks as the experts need."""
    sizes = Parallelism(tp=tp, pp=pp, ep=ep, cp=cp, dp=max(1, -(-ep // (tp * cp))), etp=1)
    named = {axis: getattr(sizes, axis) for axis in ("tp", "pp", "ep", "cp", "dp")}
    return RunLayout(", ".join(f"{axis} {size}" for axis, size in named.items() if size > 1) or "tp 1", sizes)
