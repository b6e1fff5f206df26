"""Weights out of a live model under their on-disk names, a round at a time: for saving, and for weight sync in RL.

Each round a few tensors are collected (`bridge.live_exchange`) where they are wanted, put into the form that is asked
for there (`bridge.live_form`), and handed out. Before they are, all ranks make sure that none of them has failed.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from bridge.agreement import together
from bridge.live_exchange import Wanted, collect, rounds
from bridge.live_form import Form
from bridge.live_host import to_host
from bridge.live_layout import LiveModel
from bridge.live_plan import Plan, Source, spread
from bridge.progress import Track, untracked

To = Literal["all", "spread"] | int | Mapping[str, int]


def export_weights(
    live: LiveModel, form: Form, to: To = "all", *, device: str | torch.device | None = None, track: Track = untracked
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for each tensor that is wanted here; every rank must go through to the end.

    Args:
        live: the model.
        form: the dtypes of what comes out.
        to: who gets a tensor: "all" ranks; one rank; "spread": one rank each, as many bytes on all, and as far as can
            be one that holds it; or a rank for each name. Tensors come in model order.
        device: "cpu" for results in host memory; None leaves them where the parameters are.
        track: shows progress, by rounds.

    Raises:
        ValueError: `to` names no rank; a value is not finite where float8 is wanted; a source file changed. All ranks
            raise the same.
    """
    plan = Plan(live.registry.config, live.parallelism, live.registry.dialect)
    rank_of = _destination(to, plan)
    wanted = [Wanted(source, form.value_dtype(source), rank_of(source)) for source in plan.sources]
    stored = _stream(wanted, live, plan, form, track)
    on_host = device is not None and torch.device(device).type == "cpu"
    return to_host(stored) if on_host else chain.from_iterable(stored)


def _stream(
    wanted: list[Wanted], live: LiveModel, plan: Plan, form: Form, track: Track
) -> Iterator[list[tuple[str, Tensor]]]:
    """A round at a time."""
    batches = rounds(wanted)
    for batch in track(batches, "export", len(batches)):
        collected = collect(batch, live, plan)
        with together(), torch.no_grad():
            stored = form.stored(collected)
        yield stored


def _destination(to: To, plan: Plan) -> Callable[[Source], int | None]:
    world = plan.parallelism.world_size
    if to == "all":
        return lambda source: None
    if to == "spread":
        to = spread(plan, plan.sources)
    if isinstance(to, Mapping):
        return lambda source: to[source.name]
    if isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < world:
        raise ValueError(f"to must be 'all', 'spread', or a rank from 0 to {world - 1}, found {to!r}")
    return lambda source: to
