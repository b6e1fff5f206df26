"""A parameter that is no plain tensor is refused by name, before a byte of the model or of the files is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from support.checks import NO_GPU
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


def calls(bridge: MiniMaxM2Bridge, model: nn.Module, out: Path) -> tuple[Callable[[], object], ...]:
    return (
        lambda: bridge.load_hf_weights(model),
        lambda: list(bridge.export_hf_weights(model, "fp8")),
        lambda: bridge.save_hf_pretrained(model, out),
    )


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
        for call in calls(bridge, model, tmp_path / "out"):
            with pytest.raises(ValueError, match=f"{NAME}: .*{said}"):
                call()
        assert not (tmp_path / "out").exists()
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name != NAME)


# ------------------------------------------------------------------------------------------- as they are made on GPUs


@NO_GPU
@pytest.mark.gpu
def test_fp8_parameters_are_refused_before_a_byte_is_written(wide_checkpoint: Path, tmp_path: Path) -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    from transformer_engine.common.recipe import Float8CurrentScaling

    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(wide_checkpoint) as bridge:
        with te.fp8_model_init(enabled=True, recipe=Float8CurrentScaling()):
            model = bridge.to_megatron_model(load_weights=False, perform_initialization=True)
        quantised = {
            name: p for name, p in model.named_parameters() if type(p) not in (torch.Tensor, torch.nn.Parameter)
        }
        assert quantised, "Transformer Engine made no FP8 parameter"
        before = {name: p.dequantize() for name, p in quantised.items()}
        for call in calls(bridge, model, tmp_path / "out"):
            with pytest.raises(ValueError, match=r"decoder\.layers\.0\..*: stored in another form; .*fp8_param=False"):
                call()
        assert all(torch.equal(p.dequantize(), before[name]) for name, p in quantised.items())
        assert not (tmp_path / "out").exists()


@NO_GPU
@pytest.mark.gpu
def test_models_under_megatron_fsdp_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

    settings = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        use_distributed_optimizer=True,
        data_parallel_sharding_strategy="optim_grads_params",
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        model = bridge.to_megatron_model(gradient_accumulation_fusion=False)
        wrapped = FullyShardedDataParallel(model.config, settings, model)
        for call in calls(bridge, wrapped, tmp_path / "out"):
            with pytest.raises(ValueError, match=r"a DTensor, .*load before wrapping.*use_distributed_optimizer=True"):
                call()
