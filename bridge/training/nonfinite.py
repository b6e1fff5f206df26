"""Where a loss or a gradient that is not finite began, in words; all ranks take part.

Of a loss the step's microbatches are computed again, and the first layer whose output is not finite is named. Of a
gradient it is the last layer: the backward pass goes from there to the layers before it.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from bridge.jobs.ranks import all_gather_objects
from bridge.training.step import Trained, forward
from bridge.weights.sharded_model import sharded_model
from reference.config import ModelConfig

AFTER_ALL = 10**9
MOST_NAMED = 3


def first_not_finite(trained: Trained, config: ModelConfig, batches: list[Iterator[dict[str, Tensor]]]) -> str:
    """Where a loss began not to be finite, and which weights are not; with the microbatches of the step."""
    found: list[tuple[int, str]] = []
    hooks = []
    for chunk in trained.chunks:
        for name, module in chunk.named_modules():
            number = _place(name, module, trained.job.model_class == "hybrid")
            if number is not None:
                hooks.append(module.register_forward_hook(_look(number, found)))
    forward(trained, batches, forward_only=True)
    for hook in hooks:
        hook.remove()
    everyone = [one for rank in all_gather_objects(found) for one in rank]
    where = min(everyone)[1] if everyone else "the loss alone"
    bad = _names(trained, config, lambda weight: not _is_finite(weight))
    return f"{where}; not finite are the weights {_some(bad)}" if bad else where


def gradient_not_finite(trained: Trained, config: ModelConfig) -> str:
    """Where the gradient of the last backward pass began not to be finite, and of which weights it is not."""
    bad = _names(trained, config, lambda weight: weight.requires_grad and not _is_finite(_gradient(weight)))
    if not bad:  # each entry is finite, and the sum of their squares is not
        sizes = _names(trained, config, lambda weight: weight.requires_grad and _gradient(weight).abs().max().item())
        largest = max(sizes, key=lambda name: sizes[name])
        return f"the sum of its squares: the largest entry is {sizes[largest]:.1e}, of {largest}"
    place = max(map(_place_of, bad))
    here = {name for name in bad if _place_of(name) == place}
    others = f", and went on to {len(bad) - len(here)} weights before" if len(bad) > len(here) else ""
    return f"{_words(place)}, of {_some(here)}{others}"


def _names(trained: Trained, config: ModelConfig, judge: Callable[[Tensor], Any]) -> dict[str, Any]:
    """What `judge` says of each weight of all ranks, by on-disk name, where it says something."""
    sharded = sharded_model(trained.chunks, config)
    parameters = [mapping.parameter for mapping in sharded.registry]
    own = {name: said for one in parameters if (said := judge(sharded.state[one.chunk, one.name]))
           for name in one.sources}  # fmt: skip
    found: dict[str, Any] = {}
    for everyone in all_gather_objects(own):
        found |= {name: max(said, found.get(name, said)) for name, said in everyone.items()}
    return found


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _gradient(weight: Any) -> Tensor:
    """As `DistributedDataParallel` keeps it."""
    return weight.main_grad


def _place_of(name: str) -> float:
    """The order of an on-disk weight in the forward pass."""
    if layer := re.match(r"model\.layers\.(\d+)\.", name):
        return int(layer[1])
    return -1 if "embed" in name else math.inf


def _words(place: float) -> str:
    if place == math.inf:
        return "the output layer"
    return "the embedding" if place < 0 else f"layer {place}"


def _some(names: Any) -> str:
    some = sorted(names)
    more = f" and {len(some) - MOST_NAMED} more" if len(some) > MOST_NAMED else ""
    return ", ".join(some[:MOST_NAMED]) + more


def _place(name: str, module: Any, hybrid: bool) -> tuple[int, str] | None:
    """The order of a module whose output is looked at, and how it is called."""
    if name == "embedding":
        return -1, "the embedding"
    if name == "output_layer":
        return AFTER_ALL, "the output layer"
    if isinstance(module, TransformerLayer):
        number = (module.layer_number - 1) // 2 if hybrid else module.layer_number - 1
        return module.layer_number, f"layer {number}"
    return None


def _look(place: tuple[int, str], found: list[tuple[int, str]]) -> Any:
    def hook(_module: Any, _inputs: Any, outputs: Any) -> None:
        tensors = outputs if isinstance(outputs, tuple | list) else [outputs]
        if any(isinstance(one, Tensor) and not torch.isfinite(one).all() for one in tensors):
            found.append(place)

    return hook
