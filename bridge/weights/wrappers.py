"""What a model may be wrapped in: megatron-core's wrappers, and torch.compile's, around all of it or a module in it."""

from collections.abc import Sequence
from typing import Any

from megatron.core.utils import unwrap_model
from torch import nn

_COMPILED = "_orig_mod"  # where torch.compile's wrapper has the module, also in names of parameters


def unwrapped(module: nn.Module) -> Any:
    """Without any wrapper, in whatever order they are."""
    while True:
        (inner,) = unwrap_model([module])
        inner = inner._modules.get(_COMPILED, inner)
        if inner is module:
            return module
        module = inner


def unwrapped_chunks(model: nn.Module | Sequence[nn.Module]) -> list[Any]:
    """Of one chunk, or of the list of a rank's chunks."""
    return [unwrapped(chunk) for chunk in ([model] if isinstance(model, nn.Module) else model)]


def unwrapped_name(name: str) -> str:
    """A parameter's name where no module around it is compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
