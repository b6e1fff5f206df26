"""A parameter that is no plain tensor is refused by name, before a byte of the model or of the files is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from bridge import MiniMaxM2Bridge, model_parallel

NAME = "decoder.layers.0.self_attention.linear_proj.weight"


class Quantised(Tensor):
    """Stands for any class of tensors that is stored otherwise than its values say."""


def as_dtensor(value: Tensor) -> Tensor:
    mesh = DeviceMesh("cuda" if torch.cuda.is_available() else "cpu", [0])
    return distribute_tensor(value, mesh, [Replicate()])


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "DTensor": (as_dtensor, r"a DTensor.*load before wrapping.*use_distributed_optimizer=True.*found DTensor on"),
    "meta device": (lambda value: value.to("meta"), r"no values yet; build the model with init_model_with_meta_device"),
    "another class": (lambda value: value.as_subclass(Quantised), r"fp8_param=False.*found Quantised on"),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_parameters_are_refused(form: str, checkpoint: Path, tmp_path: Path) -> None:
    change, said = FORMS[form]
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        model = bridge.to_megatron_model(params_dtype=torch.bfloat16)
        layer = model.decoder.layers[0].self_attention.linear_proj
        parameter = nn.Parameter(change(layer.weight.detach()))
        del layer.weight
        layer.register_parameter("weight", parameter)
        before = {name: value.clone() for name, value in model.named_parameters() if name != NAME}
        calls = {
            "load": lambda: bridge.load_hf_weights(model),
            "export": lambda: list(bridge.export_hf_weights(model, "fp8")),
            "save": lambda: bridge.save_hf_pretrained(model, tmp_path / "out"),
        }
        for call in calls.values():
            with pytest.raises(ValueError, match=f"{NAME}: .*{said}"):
                call()
        assert not (tmp_path / "out").exists()
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name != NAME)
