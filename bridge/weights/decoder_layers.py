"""Which layers of MiniMax-M2 a chunk of a megatron-core model holds, whichever class the model has.

`GPTModel` has a module for each layer, `HybridModel` two: attention, then experts.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from bridge.weights.wrappers import unwrapped
from reference.model_class import ModelClass

HALVES = {Symbols.ATTENTION: "attention", Symbols.MOE: "experts"}  # in this order in each layer


class HeldLayers(NamedTuple):
    """What one chunk holds: its class, its layers counted over the model from 0, and each layer's experts likewise."""

    model: ModelClass
    layers: list[int]
    experts: set[tuple[int, ...]]


def held_layers(chunk: nn.Module) -> HeldLayers:
    """Read a chunk.

    Raises:
        ValueError: it is of another class or architecture, or a pipeline stage begins or ends inside a layer; names the
            first layer that does not fit.
    """
    decoder = getattr(chunk, "decoder", None)
    if decoder is not None:
        decoder = unwrapped(decoder)
    if isinstance(decoder, HybridStack):
        layers, experts = _of_hybrid(decoder)
        return HeldLayers(ModelClass.HYBRID, layers, experts)
    if isinstance(decoder, TransformerBlock):
        return HeldLayers(ModelClass.GPT, *_of_gpt(decoder))
    raise ValueError(
        f"found a {type(chunk).__name__}, expected megatron-core's GPTModel or HybridModel: build it with "
        "bridge.build_model"
    )


def _of_gpt(decoder: TransformerBlock) -> tuple[list[int], set[tuple[int, ...]]]:
    layers: list[Any] = [unwrapped(layer) for layer in decoder.layers]
    for layer in layers:
        if not isinstance(unwrapped(layer.mlp), MoELayer):
            raise ValueError(
                f"decoder.layers.{layer.layer_number - 1}: found {type(layer.mlp).__name__}, expected experts "
                "(MoELayer) as in every layer of MiniMax-M2; build the model with bridge.build_model"
            )
    return [layer.layer_number - 1 for layer in layers], _experts(layers)


def _of_hybrid(decoder: HybridStack) -> tuple[list[int], set[tuple[int, ...]]]:
    layers: list[Any] = [unwrapped(layer) for layer in decoder.layers]
    kinds, numbers = decoder.layer_type_list, [layer.layer_number - 1 for layer in layers]
    for kind, number in zip(kinds, numbers, strict=True):
        expected = list(HALVES)[number % 2]
        if kind != expected:
            raise ValueError(
                f"decoder.layers.{number}: found {kind!r} in the pattern, expected {expected!r} ({HALVES[expected]}); "
                "MiniMax-M2 is '*E' for each layer"
            )
    if numbers and (numbers[0] % 2 or not numbers[-1] % 2):
        cut = numbers[0] if numbers[0] % 2 else numbers[-1] + 1
        raise ValueError(
            f"decoder.layers.{cut}: a pipeline stage is cut off before it, inside layer {cut // 2} of MiniMax-M2; put "
            "'|' between whole layers, as in '*E|*E'"
        )
    return [number // 2 for number in numbers[::2]], _experts(layers[1::2])


def _experts(layers: Iterable[Any]) -> set[tuple[int, ...]]:
    return {tuple(layer.mlp.local_expert_indices) for layer in layers}
