"""Experts' weights that are no inputs of autograd: megatron-core's own layer, dispatcher and `DistributedDataParallel`.

On two gloo ranks that send gradients while the backward pass runs, against the same model by autograd. The products of
a layer are `support.expert_products`; Transformer Engine's layer is in `test_fusions_gpu.py`.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.enums import CudaGraphModule
from support.accumulation import KEPT
from support.expert_products import EXPERTS, Model, summed_gradients, whole
from support.ranks import RankPool
from support.small_model import SMALL

from bridge.model import expert_products
from bridge.model.config import transformer_config
from bridge.model.expert_products import prepare_experts, put_experts_in_order
from bridge.model.process_groups import model_parallel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its products are for a host without a GPU")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("trained", [("before", "moe", "after"), ("moe",)], ids=["all", "experts alone"])
@pytest.mark.parametrize("ep", [1, 2])
def test_sums_over_microbatches_and_ranks_are_those_of_autograd(
    two: RankPool, ep: int, trained: tuple[str, ...], overlap: bool
) -> None:
    """The last expert has no tokens."""
    ours, autograds = (two.call(summed_gradients, prepared, trained, ep, overlap) for prepared in (True, False))
    for rank in range(2):
        assert torch.equal(ours[rank].output, autograds[rank].output)
        assert ours[rank].sums.keys() == autograds[rank].sums.keys()
        for name, gradient in autograds[rank].sums.items():
            assert torch.equal(ours[rank].sums[name], gradient), name
        last = f".weight{EXPERTS // ep - 1}" if rank >= ep - 1 else "none"
        for name, gradient in autograds[rank].sums.items():
            assert bool(gradient.any()) != name.endswith(last), name


@pytest.mark.parametrize("ep", [1, 2])
def test_sums_are_those_of_autograd_where_the_layer_is_computed_again(two: RankPool, ep: int) -> None:
    again = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    everything = ("before", "moe", "after")
    ours, autograds = (two.call(summed_gradients, prepared, everything, ep, True, again) for prepared in (True, False))
    kept = two.call(summed_gradients, True, everything, ep)
    for rank in range(2):
        assert ours[rank].gates == autograds[rank].gates == 2 * kept[rank].gates
        for name, gradient in autograds[rank].sums.items():
            assert torch.equal(ours[rank].sums[name], gradient), name
            assert torch.equal(kept[rank].sums[name], gradient), name


NOT_THOSE: dict[str, dict[str, Any]] = {
    "FP8": {"fp8": "e4m3"},
    "autocast": {"enable_autocast": True},
    "offloading": {"cpu_offloading": True},
    "fused operations": {"use_transformer_engine_op_fuser": True},
    "captured experts": {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphModule.moe]},
    "captured layers": {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": []},
    "captured steps": {"cuda_graph_impl": "full_iteration", "cuda_graph_modules": []},
}
THOSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "captured attention": {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphModule.attn]},
}


def wrapped(model: Model, *, in_order: bool = True, **settings: Any) -> DistributedDataParallel:
    if in_order:
        put_experts_in_order(model)
    config = DistributedDataParallelConfig(**KEPT | settings)
    return DistributedDataParallel(model.moe.config, config, model)


@pytest.mark.parametrize("name", [*NOT_THOSE, *THOSE])
def test_layers_that_do_more_than_multiply_are_left_alone(name: str) -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        model = Model(config)
        for field, value in (NOT_THOSE | THOSE)[name].items():
            assert hasattr(config, field)
            setattr(config, field, value)
        assert prepare_experts(wrapped(model)) == (name in THOSE)
        experts = model.moe.experts
        for part, what in (
            (experts, "forward"),
            (experts.linear_fc1, "forward"),
            (model.moe.token_dispatcher, "_maybe_dtoh_and_synchronize"),
        ):
            assert (what in vars(part)) == (name in THOSE)


@pytest.mark.parametrize("layer", ["linear_fc1", "linear_fc2"])
def test_other_layers_are_left_alone(layer: str) -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        for name, value in {"use_bias": True, "delay_wgrad_compute": True, "fuse_wgrad_accumulation": False}.items():
            model = Model(config)
            setattr(getattr(model.moe.experts, layer), name, value)
            assert not prepare_experts(wrapped(model)), name
        frozen, single = Model(config), Model(config)
        getattr(frozen.moe.experts, layer).requires_grad_(False)
        getattr(single.moe.experts, layer).float()
        for unfit in (single, frozen):
            assert not prepare_experts(wrapped(unfit))
        assert not prepare_experts(wrapped(Model(config), grad_reduce_in_fp32=False))


def narrow(config: Any) -> Model:
    """Of weights whose sizes are no multiples of 128, to which a bucket is filled up."""
    model = Model(config)
    for layer in (model.moe.experts.linear_fc1, model.moe.experts.linear_fc2):
        for name, weight in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(weight[:-8].clone()))
    return model


def test_weights_that_do_not_lie_in_order_are_left_alone() -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        assert not prepare_experts(wrapped(Model(config), in_order=False))
        assert prepare_experts(wrapped(narrow(config)))
        assert not prepare_experts(wrapped(narrow(config), overlap_grad_reduce=True, bucket_size=100))


def test_what_is_wrapped_again_is_prepared_again() -> None:
    with model_parallel():
        model = Model(transformer_config(SMALL))
        x = whole(6, 1, SMALL.hidden_size, seed=1)
        assert prepare_experts(wrapped(model))
        before = model(x)
        again = wrapped(model)
        with pytest.raises(
            ValueError, match=r"weight0 of experts of shape \(48, 32\) is at 0x.* after the model is wrapp"
        ):
            model(x)
        assert prepare_experts(again)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("left", [{}, {"activation_func_fp8_input_store": True}, {"moe_router_dtype": "fp64"}])
def test_swiglu_is_ours_where_megatron_core_would_call_its_own(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, Any]
) -> None:
    """Its own keeps inputs in FP8, if that is asked for, and takes float64 weights."""
    asked: list[torch.Size] = []

    def swiglu(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        asked.append(x.shape)
        a, b = x.float().chunk(2, -1)
        return (F.silu(a) * b * weights).to(x.dtype)

    monkeypatch.setattr(expert_products, "swiglu", swiglu)
    with model_parallel(), torch.compiler.set_stance("force_eager"):
        config = transformer_config(SMALL, **left)
        model = Model(config)
        config.bias_activation_fusion, model.moe.experts.activation_func = True, F.silu
        x = whole(6, 1, SMALL.hidden_size, seed=1)
        theirs = model(x)
        assert not asked
        assert prepare_experts(wrapped(model))
        assert torch.allclose(model(x).float(), theirs.float(), rtol=2**-7, atol=2**-7)
        assert asked == ([] if left else [(12, 2 * SMALL.intermediate_size)])


def test_an_old_gpu_is_left_to_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which torch's product is a loop that asks the processor."""
    with model_parallel():
        model = wrapped(Model(transformer_config(SMALL)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for capability, fits in {(8, 0): False, (9, 0): True, (10, 0): True, (12, 0): False}.items():
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=capability: major)
            assert prepare_experts(model) == fits


def test_order_is_that_of_memory_once_wrapped() -> None:
    with model_parallel():
        model = Model(transformer_config(SMALL))
        names = set(model.state_dict())
        for _ in range(2):  # the second time changes nothing
            put_experts_in_order(model)
        assert set(model.state_dict()) == names
        wrapped(model, in_order=False)
        for layer in (model.moe.experts.linear_fc1, model.moe.experts.linear_fc2):
            places = [getattr(layer, f"weight{expert}").data_ptr() for expert in range(EXPERTS)]
            assert places == sorted(places)
