"""megatron-core's embedding on gloo ranks, with and without `bridge.model.gradient_accumulation`.

Values are small integers, so that every sum is exact, whatever is added first.
"""

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn

from bridge.model import gradient_accumulation
from bridge.model.config import transformer_config
from bridge.model.process_groups import groups_of
from reference.parallelism import Parallelism
from support.accumulation import KEPT, accumulate
from support.small_model import SMALL

ROWS, WIDTH, TOKENS = 16, 8, 12


class Model(nn.Module):
    """The second weight has nothing to do with the first, and lies in another bucket."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = layers.VocabParallelEmbedding(
            ROWS,
            WIDTH,
            init_method=nn.init.ones_,
            config=config,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        self.after = nn.Parameter(torch.ones(WIDTH, 256, dtype=config.params_dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) @ self.after


class Sums(NamedTuple):
    """Of the embedding's gradients, over microbatches and ranks; the last output; whether the layer added them."""

    sums: Tensor
    output: Tensor
    added: bool


def add_rows(grad: Tensor, tokens: Tensor, total: Tensor) -> None:
    total.index_add_(0, tokens.flatten(), grad.flatten(0, -2).to(total.dtype))


def model_of(rows: bool, tp: int) -> Model:
    model = Model(transformer_config(SMALL, params_dtype=torch.bfloat16, tensor_model_parallel_size=tp))
    if rows:
        gradient_accumulation._accumulate_rows(model.embedding)
    return model


def tokens_of(microbatch: int) -> Tensor:
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(10 * microbatch + rank)
    return torch.randint(0, ROWS, (2, TOKENS // 2), generator=generator)


def summed(rows: bool, tp: int, overlap: bool) -> Sums:
    """Of two steps of three microbatches, in which each token's gradient is 256."""
    unread = patch.object(
        layers, "get_dummy_wgrad", lambda shape, dtype: torch.full(shape, 7, dtype=dtype), create=True
    )
    added = patch.object(gradient_accumulation, "add_rows", add_rows)
    with groups_of(Parallelism(dp=2 // tp, tp=tp)), unread, added:
        model = model_of(rows, tp)
        config = DistributedDataParallelConfig(**KEPT, overlap_grad_reduce=overlap, bucket_size=100)
        wrapped = DistributedDataParallel(transformer_config(SMALL), config, model)
        weight: Any = model.embedding.weight
        for step in range(2):
            output = accumulate(wrapped, [tokens_of(3 * step + number) for number in range(3)])
            assert weight.grad is None
        return Sums(weight.main_grad.clone(), output.detach(), weight.grad_added_to_main_grad)


def not_wrapped(rows: bool) -> Tensor | None:
    """The gradient of a model that keeps no sums."""
    with groups_of(Parallelism(dp=2)):
        model = model_of(rows, 1)
        model(tokens_of(0)).sum().backward()
        return model.embedding.weight.grad
