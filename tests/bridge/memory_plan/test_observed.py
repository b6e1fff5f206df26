"""What the plan says of a layer against what our own layers in megatron-core are seen to keep and to send, to the byte.

Without a GPU the layers are of the local backend, which keeps other things in three places. Each is a row here, and all
that is left must equal the rows of `reference.activations`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from support.kept_tensors import kept_storages
from support.ranks import RankPool
from support.sent_tensors import Collectives
from torch import Tensor

from bridge.model.build import build_model
from bridge.model.process_groups import groups_of, model_parallel
from bridge.training.train import RECOMPUTE
from reference.activations import (
    CORE,
    EMBEDDING,
    HEAD,
    Kept,
    Tokens,
    Workload,
    layer_rows,
    row_bytes,
    token_counts,
    widths,
)
from reference.config import ModelConfig
from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.pipeline_schedule import in_flight
from reference.step_traffic import traffic

SMALL = ModelConfig(
    hidden_size=96,
    vocab_size=160,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=40,
    num_local_experts=8,
    num_experts_per_tok=2,
)
SEQ, BATCH = 20, 2
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="the rows of the local backend are those of the CPU")
SORTED = "tokens sorted by expert: a place for each pair"  # of the alltoall dispatcher
# What the local backend keeps instead of CORE: the probabilities in float32 and in bfloat16, and keys and values
# repeated for each query head in place of them; and the causal mask, s x s booleans for all sequences.
LOCAL_ATTENTION = (
    Kept("probabilities", Tokens.SEQUENCE, lambda w: w.heads * SEQ, 4),
    Kept("probabilities of the parameters' dtype", Tokens.SEQUENCE, lambda w: w.heads * SEQ, 2),
    Kept("keys and values of each query head", Tokens.SEQUENCE, lambda w: 2 * (w.queries - w.keys), 2),
)
# What is fused on a GPU: the activation, "up" plus 0, and their product before the router's weight.
LOCAL_EXPERTS = (Kept("steps of SwiGLU", Tokens.ROWS, lambda w: 3 * w.intermediate, 2),)
# The allgather dispatcher chooses the rows' weights with a mask of each token and expert.
LOCAL_DISPATCHER = (Kept("weights and mask by expert", Tokens.SHARE, lambda w: w.experts, 4 + 1),)


def model_and_losses(layers: int, model: str, recompute: str) -> tuple[Any, Callable[[], Tensor]]:
    """A model in megatron-core's groups, and its forward pass with the loss."""
    destroy_moe_metrics_tracker()  # it has as many entries as the first model has layers
    torch.manual_seed(0)
    config = replace(SMALL, num_hidden_layers=layers)
    built: Any = build_model(config, model=model, backend="local", **RECOMPUTE[recompute])
    tokens = torch.randint(0, SMALL.vocab_size, (BATCH, SEQ))
    positions = torch.arange(SEQ).expand(BATCH, -1)
    return built, lambda: built(tokens, positions, None, labels=tokens)


def kept_by(layers: int, model: str, recompute: str) -> int:
    """Bytes that are kept after a forward pass; parameters are left out."""
    built, losses = model_and_losses(layers, model, recompute)
    return sum(kept_storages(losses, [*built.parameters(), *built.buffers()]))


def sent_by(layers: int, recompute: str) -> int:
    """Bytes of the whole tensors that are gathered or scattered, forward and backward."""
    _, losses = model_and_losses(layers, "gpt", recompute)
    with Collectives() as seen:
        losses().sum().backward()
    return seen.nbytes


def a_layer_and_ends(model: str, recompute: str) -> tuple[int, int]:
    """What a third layer adds to two, and what is there beside the layers."""
    two, three = (kept_by(layers, model, recompute) for layers in (2, 3))
    return three - two, two - 2 * (three - two)


def expected_layer(parallelism: Parallelism, workload: Workload) -> int:
    """The table's rows, those of the local backend instead of its own, and counts of a few bytes."""
    width, tokens = widths(SMALL, parallelism), token_counts(SMALL, parallelism, workload)
    rows = layer_rows(workload)
    if workload.recompute == "full":
        return row_bytes(rows, width, tokens)
    rows = [row for row in rows if row.what not in (CORE, SORTED)]
    local = [*LOCAL_EXPERTS, *LOCAL_DISPATCHER]
    counts = 8 * SMALL.num_local_experts + 4  # tokens of each expert, and the sum of the load-balancing loss
    if workload.recompute == "none":
        local += LOCAL_ATTENTION
        counts += SEQ * SEQ
    else:
        counts += 4  # which mask is meant
    return row_bytes([*rows, *local], width, tokens) + counts


@CPU_ONLY
@pytest.mark.parametrize("model", ["gpt", "hybrid"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_layer_keeps_what_the_table_says(model: str, recompute: str) -> None:
    workload = Workload(seq_length=SEQ, micro_batch_size=BATCH, recompute=recompute, model=ModelClass(model))
    with model_parallel():
        layer, ends = a_layer_and_ends(model, recompute)
    assert layer == expected_layer(Parallelism(), workload)
    width, tokens = widths(SMALL, Parallelism()), token_counts(SMALL, Parallelism(), workload)
    assert ends == row_bytes([*EMBEDDING, *HEAD], width, tokens) + rotation(recompute)


def rotation(recompute: str) -> int:
    """Bytes of the rotation's tables, which all layers share: cos and sin, or the angles that they are made of."""
    angles = SEQ * SMALL.rotary_dim
    return 4 * angles if recompute == "full" else 2 * angles


PARALLEL, ALL_EXPERTS = Parallelism(tp=2, ep=2, etp=1), Parallelism(tp=2, etp=1)


def on_a_rank(model: str, recompute: str) -> tuple[int, int]:
    """A rank's `a_layer_and_ends`."""
    with groups_of(PARALLEL):
        return a_layer_and_ends(model, recompute)


def sent_on_a_rank() -> dict[str, int]:
    """What a third layer's collectives add, on one of two tensor-parallel ranks that have all experts each."""
    with groups_of(ALL_EXPERTS):
        return {recompute: sent_by(3, recompute) - sent_by(2, recompute) for recompute in ("none", "full")}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


@CPU_ONLY
def test_a_layer_sends_what_is_planned(pool: RankPool) -> None:
    for found in pool.call(sent_on_a_rank):
        for recompute, whole in found.items():
            workload = Workload(seq_length=SEQ, micro_batch_size=BATCH, global_batch_size=BATCH, recompute=recompute)
            planned = traffic(SMALL, ALL_EXPERTS, workload).tensor // SMALL.num_hidden_layers
            assert whole // 2 == planned  # of two ranks, each sends half of a whole tensor


def moments_on_a_rank(vpp: int, microbatches: int) -> tuple[int, set[tuple[int, ...]]]:
    """This pipeline rank, and its chunks' forward passes whose backward pass has not begun, after each forward pass."""
    destroy_moe_metrics_tracker()
    layers = replace(SMALL, num_hidden_layers=2 * vpp)
    with groups_of(Parallelism(pp=2, vpp=vpp)):
        built: Any = build_model(layers, backend="local", params_dtype=torch.float32)
        chunks = built if isinstance(built, list) else [built]
        held, seen = [0] * vpp, set()

        def forward_step(batches: Any, model: Any) -> tuple[Tensor, Any]:
            tokens = next(batches)
            output = model(tokens, torch.arange(SEQ).expand(BATCH, -1), None, labels=tokens)
            chunk = next(number for number, one in enumerate(chunks) if one is model)
            held[chunk] += 1
            seen.add(tuple(held))

            def begin(gradient: Tensor) -> None:
                held[chunk] -= 1

            output.register_hook(begin)
            return output, lambda losses: (losses.mean(), {})

        batches = [iter([torch.zeros(BATCH, SEQ, dtype=torch.long)] * microbatches) for _ in chunks]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches if vpp > 1 else batches[0],
            model=built,
            num_microbatches=microbatches,
            seq_length=SEQ,
            micro_batch_size=BATCH,
        )
        return parallel_state.get_pipeline_model_parallel_rank(), seen


@CPU_ONLY
@pytest.mark.parametrize(("vpp", "microbatches"), [(1, 3), (2, 4)])
def test_a_real_schedule_has_as_many_in_flight(pool: RankPool, vpp: int, microbatches: int) -> None:
    for stage, seen in pool.call(moments_on_a_rank, vpp, microbatches):
        assert seen == in_flight(pp=2, vpp=vpp, stage=stage, microbatches=microbatches)


@CPU_ONLY
def test_ranks_together_keep_what_the_table_says(pool: RankPool) -> None:
    """At TP 2 x EP 2. Routing is not balanced here: only both ranks together have as many rows as two that are."""
    found = pool.call(on_a_rank, "gpt", "none")
    layer, ends = (sum(of_ranks) for of_ranks in zip(*found, strict=True))
    workload = Workload(seq_length=SEQ, micro_batch_size=BATCH)
    assert layer == 2 * expected_layer(PARALLEL, workload)
    width, tokens = widths(SMALL, PARALLEL), token_counts(SMALL, PARALLEL, workload)
    foreign = SEQ * BATCH  # which tokens are in another rank's part of the embedding
    assert ends == 2 * (row_bytes([*EMBEDDING, *HEAD], width, tokens) + rotation("none") + foreign)
