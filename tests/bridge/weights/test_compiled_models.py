"""Models inside torch.compile's wrapper, whole or in part, load, export and are saved as they are without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from support.folders import checksums
from torch import Tensor, nn

from bridge import MiniMaxM2Bridge, model_parallel
from bridge.weights.param_mapping import model_state
from reference.model_class import ModelClass


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def ddp(module: Any) -> Any:
    return DistributedDataParallel(module.config, DistributedDataParallelConfig(), module)


def in_place(model: Any) -> Any:
    for layer in model.decoder.layers:
        layer.compile(backend="eager")
    return model


def layers(model: Any) -> Any:
    for number, layer in enumerate(model.decoder.layers):
        model.decoder.layers[number] = compiled(layer)
    return model


def inner_modules(model: Any) -> Any:
    for layer in model.decoder.layers:
        layer.self_attention, layer.mlp = compiled(layer.self_attention), compiled(layer.mlp)
    model.decoder = compiled(model.decoder)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "the model": compiled,
    "around the wrapper": lambda model: compiled(ddp(model)),
    "inside the wrapper": lambda model: ddp(compiled(model)),
    "between two": lambda model: ddp(compiled(Float16Module(model.config, model))),
    "layers": layers,
    "layers in place": in_place,
    "inner modules": inner_modules,
    "layers, wrapped": lambda model: ddp(layers(model)),
}


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        one.dtype == theirs[name].dtype and torch.equal(one.view(torch.uint8), theirs[name].view(torch.uint8))
        for name, one in ours.items()
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ModelClass)
def test_loads_and_exports_as_without(checkpoint: Path, kind: ModelClass, way: str) -> None:
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(str(checkpoint)) as bridge:
        plain: Any = bridge.to_megatron_model(model=kind)
        expected = model_state(plain)
        exported = dict(bridge.export_hf_weights(plain, "fp8"))
        model: Any = bridge.to_megatron_model(model=kind)
        inside = dict(model_state(model))
        wrapped = WAYS[way](model)
        with torch.no_grad():
            for value in inside.values():
                value.fill_(3)
        bridge.load_hf_weights(wrapped)
        assert same_bits(inside, expected)
        assert same_bits(dict(bridge.export_hf_weights(wrapped, "fp8")), exported)


@pytest.mark.parametrize("way", ["the model", "layers"])
def test_is_saved_as_without(checkpoint: Path, tmp_path: Path, way: str) -> None:
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(str(checkpoint)) as bridge:
        model: Any = bridge.to_megatron_model()
        bridge.save_hf_pretrained(model, tmp_path / "plain", quantization="fp8")
        bridge.save_hf_pretrained(WAYS[way](model), tmp_path / "compiled", quantization="fp8")
    assert checksums(tmp_path / "compiled") == checksums(tmp_path / "plain")
