"""Experts' weights that are no inputs of autograd: the hooks of megatron-core's own `DistributedDataParallel`.

On two gloo ranks that send gradients while the backward pass runs, against the same model by autograd. The layer is
`support.expert_products`; Transformer Engine's is in `test_fusions_gpu.py`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.enums import CudaGraphModule
from support.expert_products import Model, summed_gradients
from support.ranks import RankPool
from support.small_model import SMALL

from bridge.model.config import transformer_config
from bridge.model.expert_products import prepare_experts
from bridge.model.process_groups import model_parallel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its layer is for a host without a GPU")


@pytest.fixture(scope="module")
def two() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("trained", [("before", "experts", "after"), ("experts",)], ids=["all", "experts alone"])
def test_sums_over_microbatches_and_ranks_are_those_of_autograd(
    two: RankPool, trained: tuple[str, ...], overlap: bool
) -> None:
    ours, autograds = (two.call(summed_gradients, prepared, trained, overlap) for prepared in (True, False))
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


def wrapped(model: Model, **settings: Any) -> DistributedDataParallel:
    return DistributedDataParallel(
        model.experts.config, DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True} | settings), model
    )


@pytest.mark.parametrize("name", [*NOT_THOSE, *THOSE])
def test_layers_that_do_more_than_multiply_are_left_alone(name: str) -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        for field, value in (NOT_THOSE | THOSE)[name].items():
            assert hasattr(config, field)
            setattr(config, field, value)
        model = Model(config)
        assert prepare_experts(wrapped(model)) == (name in THOSE)
        assert ("forward" in vars(model.experts)) == (name in THOSE)


def test_other_layers_are_left_alone() -> None:
    with model_parallel():
        config = transformer_config(SMALL)
        for name, value in {"use_bias": True, "delay_wgrad_compute": True, "fuse_wgrad_accumulation": False}.items():
            model = Model(config)
            setattr(model.experts, name, value)
            assert not prepare_experts(wrapped(model)), name
        frozen = Model(config)
        frozen.experts.requires_grad_(False)
        for unfit in (Model(config).float(), frozen):
            assert not prepare_experts(wrapped(unfit))
        assert not prepare_experts(wrapped(Model(config), grad_reduce_in_fp32=False))
