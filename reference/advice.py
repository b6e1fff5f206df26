"""Which parallel layouts fit into a given memory: what to change where a layout does not.

Memory is what `reference.memory` counts: parameters, gradients and optimizer state; and, of a given workload, the
activations that `reference.activations` counts.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from reference.activations import Workload, activations
from reference.config import ModelConfig
from reference.memory import holdings, training_bytes
from reference.parallelism import Parallelism, spread_layers

NODE = 8  # GPUs of a node: the most over which tensor parallelism is worthwhile
MOST_GROWTH = 16  # advice looks at up to this many times the given ranks


class Fit(NamedTuple):
    """A layout, the bytes of its largest rank, and how it differs from the given one, such as "ep 8 -> 16".

    Its workload differs in what is recomputed.
    """

    parallelism: Parallelism
    distributed_optimizer: bool
    largest: int
    workload: Workload | None
    changes: tuple[str, ...]


class Advice(NamedTuple):
    """Layouts of `gpus` ranks that fit: those nearest to the given layout first, the one that needs least memory last.

    `least` needs least memory of the layouts with as many ranks as given, whether it fits or not.
    """

    gpus: int
    fits: tuple[Fit, ...]
    least: Fit


def default_layers(config: ModelConfig, stages: int) -> tuple[int, ...] | None:
    """`Parallelism.layers_per_stage` where nobody chose one: None if the layers divide evenly, else spread."""
    return spread_layers(config.num_hidden_layers, stages) if config.num_hidden_layers % stages else None


def layouts(config: ModelConfig, like: Parallelism, ranks: int) -> Iterator[Parallelism]:
    """Every choice of tp, pp, ep and etp for this number of ranks that the model can be divided by.

    Everything else is as in `like`. Tensor-parallel sizes stay within a node unless `like`'s are larger, every stage
    has a layer, and vpp is 1 where pp is.
    """
    narrow = [size for size in range(1, max(NODE, like.tp, like.expert_tp) + 1) if ranks % size == 0]
    stages = [size for size in range(1, min(ranks, config.num_hidden_layers) + 1) if ranks % size == 0]
    experts = [size for size in range(1, config.num_local_experts + 1) if config.num_local_experts % size == 0]
    for tp, pp in product(narrow, stages):
        dp, rest = divmod(ranks, tp * pp * like.cp)
        vpp = like.vpp if pp > 1 else 1
        if rest or pp * vpp > config.num_hidden_layers:
            continue
        layers = like.layers_per_stage if pp == like.pp else default_layers(config, pp * vpp)
        for ep, etp in product(experts, narrow):
            if tp * like.cp * dp % (etp * ep) == 0:
                layout = replace(like, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=dp, layers_per_stage=layers)
                if _passes(layout.check, config):
                    yield layout


def advise(
    config: ModelConfig,
    given: Parallelism,
    *,
    memory: int,
    distributed_optimizer: bool,
    workload: Workload | None = None,
) -> Advice:
    """Layouts whose largest rank needs at most `memory` bytes, with the distributed optimizer or as given.

    Of a workload, only layouts that it divides by; its activations are recomputed as given, or all of them.

    The nearest layout changes the fewest sizes, and of those the one that changes them by the smallest factors. The
    four nearest are given, each changing other sizes. Where none fits, twice as many ranks are tried, and so on up to
    `MOST_GROWTH` times as many.
    """

    works = list(dict.fromkeys([workload, workload and replace(workload, recompute="full")]))

    def fit_of(layout: Parallelism, on: bool, work: Workload | None) -> Fit:
        switched = ["distributed optimizer"] * (on != distributed_optimizer) + ["recompute"] * (work != workload)
        return Fit(layout, on, _largest(config, layout, on, work), work, _changes(given, layout, switched))

    def fits(ranks: int) -> list[Fit]:
        return [
            fit_of(layout, on, work)
            for layout in layouts(config, given, ranks)
            for work in works
            if work is None or _passes(work.check, config, layout)
            for on in sorted({distributed_optimizer, True})
        ]

    def nearness(fit: Fit) -> tuple[int, float, int]:
        before, after = _sizes(given), _sizes(fit.parallelism)
        factors = sum(abs(math.log2(after[name] / before[name])) for name in before)
        return len(fit.changes), factors, fit.largest

    ranks, found = given.world_size, fits(given.world_size)
    least = min(found, key=lambda fit: (fit.largest, *nearness(fit)))
    while not any(fit.largest <= memory for fit in found) and ranks < MOST_GROWTH * given.world_size:
        ranks *= 2
        found = fits(ranks)
    found = [fit for fit in found if fit.largest <= memory]
    nearest: dict[tuple[str, ...], Fit] = {}
    for fit in sorted(found, key=nearness):
        nearest.setdefault(tuple(change.split()[0] for change in fit.changes), fit)
    roomiest = sorted(found, key=lambda fit: (fit.largest, *nearness(fit)))[:1]
    return Advice(ranks, tuple(dict.fromkeys([*list(nearest.values())[:4], *roomiest])), least)


def _largest(
    config: ModelConfig, parallelism: Parallelism, distributed_optimizer: bool, workload: Workload | None
) -> int:
    dtype = workload.dtype if workload else "bf16"
    kept = [
        training_bytes(held, parallelism, distributed_optimizer=distributed_optimizer, dtype=dtype).total
        for held in holdings(config, parallelism)
    ]
    if workload is None:
        return max(kept)
    peaks = activations(config, parallelism, workload)
    return max(nbytes + peak.total for nbytes, peak in zip(kept, peaks, strict=True))


def _passes(check: Callable[..., None], *given: Any) -> bool:
    try:
        check(*given)
    except ValueError:
        return False
    return True


def _sizes(parallelism: Parallelism) -> dict[str, int]:
    """The sizes that one chooses; dp follows."""
    return {name: getattr(parallelism, name) for name in ("tp", "pp", "vpp", "ep")} | {"etp": parallelism.expert_tp}


def _changes(given: Parallelism, other: Parallelism, switched: list[str]) -> tuple[str, ...]:
    before, after = _sizes(given), _sizes(other)
    changed = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    return tuple(switched + changed)
