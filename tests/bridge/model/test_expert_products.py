"""Experts' weights that are no inputs of autograd: the hooks of megatron-core's own `DistributedDataParallel`.

On two gloo ranks that send gradients while the backward pass runs, against the same model by autograd. The layer is
`support.expert_products`; Transformer Engine's is in `test_fusions_gpu.py`.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.enums import CudaGraphModule
from support.expert_products import EXPERTS, ON_CPU, WIDTH, Model, summed_gradients, whole
from support.ranks import RankPool
from support.small_model import SMALL

from bridge.model import expert_products
from bridge.model.config import transformer_config
from bridge.model.expert_products import prepare_experts
from bridge.model.process_groups import model_parallel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its layer is for a host without a GPU")


@pytest.mark.parametrize("trained", [("before", "experts", "after"), ("experts",)], ids=["all", "experts alone"])
def test_sums_over_microbatches_and_ranks_are_those_of_autograd(trained: tuple[str, ...]) -> None:
    with RankPool(2) as pool:
        ours, autograds = (pool.call(summed_gradients, prepared, trained) for prepared in (True, False))
    for rank in range(2):
        assert ours[rank].keys() == autograds[rank].keys()
        for name, gradient in autograds[rank].items():
            assert torch.equal(ours[rank][name], gradient), name
            assert gradient.any(), name


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


@pytest.mark.parametrize("name", [*NOT_THOSE, *THOSE])
def test_layers_that_do_more_than_multiply_are_left_alone(name: str) -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        for field, value in (NOT_THOSE | THOSE)[name].items():
            assert hasattr(config, field)
            setattr(config, field, value)
        model = Model(config)
        assert prepare_experts(model) == (name in THOSE)
        assert ("forward" in vars(model.experts)) == (name in THOSE)


def test_other_layers_are_left_alone() -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        for name, value in {"use_bias": True, "delay_wgrad_compute": True, "fuse_wgrad_accumulation": False}.items():
            model = Model(config)
            setattr(model.experts, name, value)
            assert not prepare_experts(model), name
        for unfit in (Model(config).float(), Model(config).requires_grad_(False)):
            assert not prepare_experts(unfit)


def test_a_model_that_is_wrapped_otherwise_says_so() -> None:
    with model_parallel(), patch.multiple(expert_products, **ON_CPU):
        config = transformer_config(SMALL)
        model, settings = Model(config), DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        assert prepare_experts(model)
        wrapped = DistributedDataParallel(config, settings, model)  # without the hooks' setting
        with pytest.raises(ValueError, match=f"handed 0 hooks to a layer of {EXPERTS} experts; wrap the model once"):
            wrapped(whole(6, WIDTH, seed=0), [2, 0, 3, 1]).sum().backward()
        with pytest.raises(ValueError, match="wrapped already; call prepare_experts before DistributedDataParallel"):
            prepare_experts(model)
