"""megatron-core's layer of experts on a host without a GPU: only its two products are not Transformer Engine's.

Values are small integers and products sparse, so that every sum is exact in bfloat16 too, whatever is added first.
"""

import gc
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor, nn

from bridge.model import expert_products
from bridge.model.config import transformer_config
from bridge.model.process_groups import groups_of
from bridge.model.sorted_chunks import leave_sorted
from reference.parallelism import Parallelism
from support.accumulation import KEPT, accumulate
from support.small_model import SMALL

EXPERTS, WIDTH = SMALL.num_local_experts, SMALL.hidden_size
DTYPE = torch.bfloat16


def whole(*shape: int, seed: int) -> Tensor:
    """Mostly zeros, some ones, some -1."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-1, 2, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.1)).to(DTYPE)


class GroupedLinear(nn.Module):
    """`weight0` and so on, and the names that `bridge.model.expert_products` reads."""

    def __init__(self, num_gemms: int, width: int, out: int, *, config: Any, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.config, self.num_gemms, self.fuse_wgrad_accumulation = config, num_gemms, True
        self.te_quant_params, self.delay_wgrad_compute, self.use_bias = None, False, False
        for expert in range(num_gemms):
            number = pg_collection.ep.rank() * num_gemms + expert
            weight = nn.Parameter(whole(out, width, seed=number + out))
            weight.allreduce = pg_collection.ep.size() == 1  # pyright: ignore[reportAttributeAccessIssue]
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        weights = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        parts = zip(x.split(m_splits), weights, strict=True)
        return torch.cat([one @ weight.T for one, weight in parts]), None


class ByPlace(nn.Module):
    """A router: two experts for each token, with a weight of 1; no token for the last."""

    def __init__(self, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.experts = config.num_moe_experts

    def set_layer_number(self, number: int) -> None:
        pass

    def forward(self, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        place = torch.arange(x[..., 0].numel())
        chosen = torch.zeros(len(place), self.experts, dtype=torch.bool)
        chosen[:, 0], chosen[place, 1 + place % (self.experts - 2)] = True, True
        return chosen.float(), chosen


class Gate:
    """Open, shut or -1, which keeps sums whole; counts its calls."""

    calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.sign()


def moe_layer(config: Any) -> MoELayer:
    """megatron-core's own layer, dispatcher and experts."""
    config.activation_func, config.bias_activation_fusion = Gate(), False
    config.moe_token_dispatcher_type = "alltoall"
    products: Any = GroupedMLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)  # pyright: ignore[reportArgumentType]
    submodules: Any = MoESubmodules(router=ByPlace, experts=partial(TEGroupedMLP, submodules=products))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return MoELayer(config, submodules, layer_number=1, pg_collection=groups)


class Model(nn.Module):
    """A dense layer before the experts and one after them, in the same buckets."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.before, self.moe = nn.Linear(WIDTH, WIDTH, bias=False, dtype=DTYPE), moe_layer(config)
        self.after = nn.Linear(WIDTH, WIDTH, bias=False, dtype=DTYPE)
        with torch.no_grad():
            for number, layer in enumerate((self.before, self.after)):
                layer.weight.copy_(whole(*layer.weight.shape, seed=10 + number))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.moe(self.before(x))[0])


def add_gradients(x: Tensor, grad: Tensor, total: Tensor, ends: Tensor) -> None:
    start = 0
    for one, end in zip(total, ends.tolist(), strict=True):
        one.add_(grad[start:end].float().T @ x[start:end].float())
        start = end


class Summed(NamedTuple):
    """Float32 sums over microbatches and ranks, by step and name, the last outputs, and how often gates were asked."""

    sums: dict[str, Tensor]
    output: Tensor
    gates: int


def summed_gradients(
    prepared: bool,
    trained: tuple[str, ...] = ("before", "moe", "after"),
    ep: int = 1,
    overlap: bool = True,
    settings: Mapping[str, Any] = {},
) -> Summed:
    """Of two steps of three microbatches, of what is `trained`; nothing of the model is kept."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sums = {}
    with groups_of(Parallelism(dp=ranks, ep=ep)), patch.object(expert_products, "add_gradients", add_gradients):
        config = transformer_config(SMALL, expert_model_parallel_size=ep, **settings)
        model = Model(config)
        leave_sorted(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        ddp = DistributedDataParallelConfig(**KEPT, overlap_grad_reduce=overlap, bucket_size=1000)
        expert_products.put_experts_in_order(model)
        wrapped = DistributedDataParallel(config, ddp, model)
        assert not prepared or expert_products.prepare_experts(wrapped)
        assert len(wrapped.bucket_groups) > 1 or len(trained) == 1 or not overlap
        for step in range(2):  # in the first megatron-core counts, in the second it sends as soon as a bucket is there
            seeds = [100 * step + 10 * number + rank for number in range(3)]
            output = accumulate(wrapped, [whole(6, 1, WIDTH, seed=seed) for seed in seeds])
            for name, parameter in model.named_parameters():
                assert parameter.grad is None
                if parameter.requires_grad:
                    assert parameter.grad_added_to_main_grad == (prepared and "experts" in name)  # pyright: ignore[reportAttributeAccessIssue]
                    sums[f"{step} {name}"] = parameter.main_grad.clone()  # pyright: ignore[reportAttributeAccessIssue]
        kept, output, gates = weakref.ref(model.moe), output.detach(), config.activation_func.calls
        del model, wrapped, parameter
    gc.collect()
    assert kept() is None
    return Summed(sums, output, gates)
