"""Steps of training a small `GPTModel` or `HybridModel` with megatron-core, on one rank of many.

Real `DistributedDataParallel`, pipeline schedule, sequence parallelism and `finalize_model_grads`. On a host with GPUs
the Transformer Engine spec, else the local one.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters, placements, shard, unshard
from reference.weights import MODEL_DIALECTS, Dialect
from support.oracles import FLOAT32, Case, disk_weights, hf_model, settled_tokens
from support.sharded_models import groups_of

CASE = Case(heads=8, groups=2, head_dim=16, rotary=8, hidden=32, width=24, experts=4, top_k=2, layers=2, vocab=64)
DEEP_CASE = replace(CASE, layers=4)  # for four stages
WIDE_CASE = replace(CASE, experts=8)  # for eight expert-parallel ranks, each with sequences of its own
MICROBATCHES = {
    CASE: 2,
    DEEP_CASE: 4,
    WIDE_CASE: 2,
}  # more than there are ranks: else virtual stages cannot mix up their messages
STEPS, BATCH, SEQ, LEARNING_RATE = 3, 2, 8, 0.5
BATCHES = {CASE: BATCH, DEEP_CASE: BATCH, WIDE_CASE: 8}  # sequences in a microbatch, over all ranks

GPUS = torch.cuda.device_count()
DIALECTS = {kind: dialects[0 if GPUS else 1] for kind, dialects in MODEL_DIALECTS.items()}


class Setup(NamedTuple):
    """What is trained, and how. `drop_in`: megatron-core's own attention with `bridge.model.qk_norm` in its slots."""

    case: Case
    layout: Parallelism
    model: ModelClass = ModelClass.GPT
    drop_in: bool = False
    settings: Mapping[str, Any] = {}
    """Of the `TransformerConfig`."""
    changes: Mapping[str, Any] = {}
    """Of the config of a model that has been built: what is refused when it is built."""
    packed: bool = False
    """The sequences of a microbatch as one row. On a host without a GPU each goes through core attention alone."""

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.model]

    def held(self, rank: int) -> list[Parameter]:
        return parameters(self.case.model_config(), self.layout, rank, self.dialect)


def weights_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return disk_weights(case, dtype=dtype)


def steps_of(dtype: torch.dtype) -> int:
    """Weights that move in bfloat16 soon send tokens to other experts, and then there is nothing to compare."""
    return STEPS if dtype == FLOAT32 else 1


def leave_out_the_backward_all_reduce(folder: str) -> None:
    """What the peer's backward does, from Python and in the C++ that eager calls on a GPU go through."""
    from compiled.norm import function, host

    function._summed = lambda coupling, dws, *_: (coupling, dws)
    source, line = host.SOURCE.read_text(), "coupling = summed(coupling, dws, norm);"
    assert source.count(line) == 1
    host.SOURCE = Path(folder, f"host.{torch.distributed.get_rank()}.cpp")
    host.SOURCE.write_text(source.replace(line, ""))
    os.environ["TORCH_EXTENSIONS_DIR"] = folder


@cache
def settled_batches(case: Case, dtype: torch.dtype = FLOAT32) -> Tensor:
    """A step's microbatches: sequences whose choice of experts is far from a tie."""
    model = hf_model(case, {name: value.float() for name, value in weights_of(case, dtype).items()}, FLOAT32)
    batch = BATCHES[case]
    return settled_tokens(model, batch=MICROBATCHES[case] * batch, seq=SEQ + 1).view(-1, batch, SEQ + 1)


def put_together(setup: Setup, ranks: Sequence[dict[str, Any]], what: str) -> dict[str, Tensor]:
    """Of what `train` gives on all ranks the "grads" or the "weights", whole, under on-disk names."""
    placed = placements({rank: setup.held(rank) for rank in range(setup.layout.world_size)})
    values = {(rank, *key): value for rank, r in enumerate(ranks) for key, value in r[what].items()}
    return {
        source: unshard(places, values)
        for source, places in placed.items()
        if all((p.rank, p.chunk, p.name) in values for p in places)  # the expert bias has no gradient
    }


def train(
    setup: Setup,
    dtype: torch.dtype,
    batches: Tensor,
    build: Callable | None = None,
    optimize: Callable | None = None,
    steps: int | None = None,
) -> dict[str, Any]:
    """Losses and gradient norms of each step, this rank's gradients of the first, and its weights after the last.

    Gradients and weights by (chunk, name), a drop-in norm's under the fused norms' names. `build(setup, dtype)` makes
    this rank's chunks, where they are not to be `bridge.build_model`'s; `optimize(wrapped chunks)` what moves their
    weights, if not plain descent; `steps` are `steps_of(dtype)`.
    """
    from bridge.proof.judge.training import descend, forward_backward, gradient_norm, labelled_step, wrapped
    from bridge.weights.param_mapping import model_state

    rank, layout = torch.distributed.get_rank(), setup.layout
    held = setup.held(rank)
    with groups_of(layout):
        chunks = (build or _build)(setup, dtype)
        _load(chunks, held, weights_of(setup.case, dtype), setup.drop_in)
        ddp, step = wrapped(chunks), _step_of_packed if setup.packed else labelled_step
        mine = batches.to(next(chunks[0].parameters()).device).chunk(layout.dp, 1)[layout.coordinates(rank).dp]
        microbatches = [(tokens[:, :-1], tokens[:, 1:]) for tokens in mine]
        move = optimize(ddp) if optimize else partial(descend, chunks, LEARNING_RATE)
        losses, norms, first = [], [], {}
        for _ in range(steps or steps_of(dtype)):
            losses.append(forward_backward(ddp, microbatches, step, seq=SEQ, batch=len(mine[0])))
            norms.append(gradient_norm(chunks))
            grads = [{name: x.main_grad.clone() for name, x in chunk.named_parameters()} for chunk in chunks]
            first = first or _shards(grads, held, setup.drop_in)
            move()
        weights = _shards([model_state(chunk) for chunk in chunks], held, setup.drop_in)
        return {"losses": losses, "norms": norms, "grads": first, "weights": weights}


def _build(setup: Setup, dtype: torch.dtype) -> list[torch.nn.Module]:
    """This rank's chunks, with random weights."""
    from bridge.model.build import build_model
    from bridge.proof.judge.training import TRAINING_SETTINGS

    settings = {"params_dtype": dtype, **TRAINING_SETTINGS}
    if setup.drop_in:
        return [_build_with_drop_in(setup, settings)]
    built = build_model(setup.case.model_config(), model=setup.model, **settings | dict(setup.settings))
    chunks = built if isinstance(built, list) else [built]
    for chunk in chunks:
        for name, value in setup.changes.items():
            setattr(chunk.config, name, value)
        if setup.packed and not GPUS:
            for layer in chunk.decoder.layers:
                attention = layer.self_attention
                attention.core_attention = OneSequenceAtATime(attention.core_attention)
    return chunks


def _build_with_drop_in(setup: Setup, settings: dict[str, Any]) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel

    from bridge.model.config import gpt_model_arguments, transformer_config
    from bridge.model.layer_spec import minimax_m2_block_spec

    config, tp = setup.case.model_config(), setup.layout.tp
    parallel = {"tensor_model_parallel_size": tp, "expert_tensor_parallel_size": 1, "sequence_parallel": tp > 1}
    megatron = transformer_config(config, **parallel, **settings)
    block = minimax_m2_block_spec(megatron)
    for layer in block.layer_specs:
        _use_drop_in(layer.submodules.self_attention)
    return GPTModel(megatron, block, **gpt_model_arguments(config))


def _load(chunks: list[torch.nn.Module], held: list[Parameter], weights: dict[str, Tensor], drop_in: bool) -> None:
    """This rank's slices; a drop-in norm has all heads."""
    from bridge.weights.param_mapping import model_state

    states = [model_state(chunk) for chunk in chunks]
    found = {(number, name) for number, state in enumerate(states) for name in state}
    assert found == {(parameter.chunk, _name_in(drop_in, parameter.name)) for parameter in held}
    with torch.no_grad():
        for parameter in held:
            name = _name_in(drop_in, parameter.name)
            whole = name != parameter.name
            value = weights[parameter.sources[0]] if whole else shard(parameter, weights)
            states[parameter.chunk][name].copy_(value)


def _shards(values: list[dict[str, Tensor]], held: list[Parameter], drop_in: bool) -> dict[tuple[int, str], Tensor]:
    """Under the fused norms' names, and only this rank's heads of a drop-in norm."""
    found = {}
    for parameter in held:
        name = _name_in(drop_in, parameter.name)
        if name in values[parameter.chunk]:
            own = slice(None) if name == parameter.name else slice(*parameter.pieces[0].rows)
            found[parameter.chunk, parameter.name] = values[parameter.chunk][name][own].detach().cpu()
    return found


def _use_drop_in(attention) -> None:
    from megatron.core.transformer.attention import SelfAttention

    from bridge.model.qk_norm import FullDimKNorm, FullDimQNorm

    attention.module = SelfAttention
    attention.submodules.q_layernorm, attention.submodules.k_layernorm = FullDimQNorm, FullDimKNorm


def _name_in(drop_in: bool, name: str) -> str:
    if not drop_in:
        return name
    return name.replace("qk_norm.q_weight", "q_layernorm.weight").replace("qk_norm.k_weight", "k_layernorm.weight")


def _step_of_packed(batches, model):
    """The same sequences and mean loss, in one row with their borders."""
    from megatron.core.packed_seq_params import PackedSeqParams

    tokens, labels = next(batches)
    starts = torch.arange(0, (len(tokens) + 1) * SEQ, SEQ, dtype=torch.int32, device=tokens.device)
    packed = PackedSeqParams("thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=SEQ, max_seqlen_kv=SEQ)
    positions = torch.arange(SEQ, device=tokens.device).repeat(len(tokens))[None]
    row, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
    output = model(row, positions, None, labels=labels, packed_seq_params=packed)
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


class OneSequenceAtATime(torch.nn.Module):
    """Core attention of packed sequences out of one that does not know them."""

    def __init__(self, core_attention: torch.nn.Module) -> None:
        super().__init__()
        self.core_attention = core_attention

    def forward(self, query, key, value, mask, *, packed_seq_params, **kwargs) -> Tensor:
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        sequences = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self.core_attention(*sequence, mask, **kwargs) for sequence in sequences])
