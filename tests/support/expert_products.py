"""A layer that answers as Transformer Engine's of several experts does, which takes a GPU; it multiplies by torch.

Values are small integers, so that every product and sum is exact in bfloat16 too, whatever is added first.
"""

import gc
import weakref
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

EXPERTS, WIDTH, OUT = 4, 8, 16
ROWS = ((2, 0, 3, 1), (1, 2, 3, 0), (0, 0, 6, 0))  # of each microbatch
DTYPE = torch.bfloat16


def whole(*shape: int, seed: int) -> Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


class Experts(nn.Module):
    """`weight0` and so on, and the names that `bridge.model.expert_products` reads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.num_gemms, self.fuse_wgrad_accumulation = config, EXPERTS, True
        self.te_quant_params, self.delay_wgrad_compute, self.use_bias = None, False, False
        for expert in range(EXPERTS):
            self.register_parameter(f"weight{expert}", nn.Parameter(whole(OUT, WIDTH, seed=expert)))

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        parts = zip(x.split(m_splits), self.parameters(), strict=True)
        return torch.cat([one @ weight.T for one, weight in parts]), None


class Model(nn.Module):
    """A dense layer before the experts and one after them, in the same buckets."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.before, self.experts = nn.Linear(WIDTH, WIDTH, bias=False, dtype=DTYPE), Experts(config)
        self.after = nn.Linear(OUT, WIDTH, bias=False, dtype=DTYPE)
        with torch.no_grad():
            for number, layer in enumerate((self.before, self.after)):
                layer.weight.copy_(whole(*layer.weight.shape, seed=10 + number))

    def forward(self, x: Tensor, rows: list[int]) -> Tensor:
        return self.after(self.experts(self.before(x), rows)[0])


def multiply(weights: list[Tensor], x: Tensor, out: Tensor, rows: list[int], *, layout: str, **_: Any) -> None:
    parts = zip(x.split(rows), weights, strict=True)
    out.copy_(torch.cat([one @ (weight.T if layout == "TN" else weight) for one, weight in parts]))


def add_gradients(x: Tensor, grad: Tensor, total: list[Tensor], rows: list[int]) -> None:
    for one, its_grad, into in zip(x.split(rows), grad.split(rows), total, strict=True):
        into.add_(its_grad.float().T @ one.float())


ON_CPU = {"multiply": multiply, "add_gradients": add_gradients}


def summed_gradients(prepared: bool, trained: tuple[str, ...], overlap: bool) -> dict[str, Tensor]:
    """Float32 sums over microbatches and ranks of two steps, of what is `trained`; nothing of the model is kept."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from bridge.model import expert_products
    from bridge.model.config import transformer_config
    from bridge.model.process_groups import groups_of
    from reference.parallelism import Parallelism
    from support.small_model import SMALL

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    with groups_of(Parallelism(dp=ranks)), patch.multiple(expert_products, **ON_CPU):
        config = transformer_config(SMALL)
        model = Model(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, bucket_size=200)
        wrapped = DistributedDataParallel(config, settings, model)
        assert not prepared or expert_products.prepare_experts(wrapped)
        assert len(wrapped.bucket_groups) > 1 or len(trained) == 1 or not overlap
        for step in range(2):  # in the first megatron-core counts, in the second it sends as soon as a bucket is there
            wrapped.zero_grad_buffer()
            for number, rows in enumerate(ROWS):
                x = whole(6, WIDTH, seed=100 * step + 10 * number + rank)
                with wrapped.no_sync() if number < len(ROWS) - 1 else nullcontext():
                    wrapped(x, list(rows)).sum().backward()
            wrapped.finish_grad_sync()
            for name, parameter in model.named_parameters():
                assert parameter.grad is None
                if parameter.requires_grad:
                    assert parameter.grad_added_to_main_grad == (prepared and "experts" in name)  # pyright: ignore[reportAttributeAccessIssue]
                    found[f"{step} {name}"] = parameter.main_grad.clone()  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            by_torch, _ = Experts.forward(model.experts, model.before(x), list(rows))
            assert torch.equal(wrapped(x, list(rows)), model.after(by_torch))
        kept = weakref.ref(model.experts)
        del model, wrapped, parameter
    gc.collect()
    assert kept() is None
    return found
