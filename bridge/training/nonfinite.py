"""Which layer's output was the first that is not finite, when a loss is not: its microbatches are computed again."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from bridge.jobs.ranks import all_gather_objects
from bridge.training.step import Trained, forward

AFTER_ALL = 10**9


def first_not_finite(trained: Trained, batches: list[Iterator[dict[str, Tensor]]]) -> str:
    """Where it began, in words; all ranks must call it, with the microbatches of the step."""
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
    return min(everyone)[1] if everyone else "the loss alone"


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
