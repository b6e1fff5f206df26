# pyright: reportMissingImports=false
"""A model without the wrappers that peft puts around its modules, for as long as a `with` block lasts.

peft trains small matrices beside a module, or a copy of it, and puts a wrapper in its place: parameters get other names
and new ones appear. What is loaded and exported is the model under the wrappers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


@contextmanager
def without_adapters(chunks: Sequence[nn.Module], adapter: str = "default") -> Iterator[None]:
    """Inside, each wrapper's place is taken by its base layer, or by the copy that it trains (`modules_to_save`)."""
    wrapped = [
        (parent, name, child)
        for chunk in chunks
        for parent in chunk.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer | ModulesToSaveWrapper)
    ]
    try:
        for parent, name, child in wrapped:
            setattr(parent, name, _inside(child, adapter))
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def _inside(wrapper: Any, adapter: str) -> nn.Module:
    return wrapper.get_base_layer() if isinstance(wrapper, BaseTunerLayer) else wrapper.modules_to_save[adapter]


def check_merged(chunks: Sequence[nn.Module]) -> None:
    """No adapter is left out of what is saved.

    Raises:
        ValueError: one is active and not merged into its base layer; names its module.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, BaseTunerLayer) and not module.merged and not module.disable_adapters:
                raise ValueError(
                    f"{name}: has an adapter that is not merged, and the whole model is to be saved, so that its "
                    "training would be lost: merge it first (--merge_lora true), or save it with peft_format=True"
                )
