"""One rank's run of a target: built, loaded, trained for some steps, and what came out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor, distributed, nn

from bridge.model.process_groups import groups_of
from bridge.proof.judge.binding import Bindings, Bound, Form, bind, load, share
from bridge.proof.judge.build import build
from bridge.proof.judge.layouts import RunLayout
from bridge.proof.judge.problem import LEARNING_RATE, MICROBATCHES, Problem
from bridge.proof.judge.target import Kind, Target
from bridge.proof.judge.training import descend, forward_backward, gradient_norm, labelled_step, wrapped
from bridge.proof.roundtrip import megatron_logits
from bridge.weights.param_mapping import model_state
from reference.config import ModelConfig
from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.sharding import Parameter
from reference.weights import Layout, Scope

Key = tuple[int, str]
"""The chunk and the name of a parameter, as `held_parameters` has it."""


class Observation(NamedTuple):
    """What one rank saw.

    `losses` (None where the loss is on another rank) and `norms` (of all gradients) have an entry for each step;
    `gradients` are the first step's and `weights` those after the last, this rank's shares. `unmarked` are parameters
    that are shards and do not say so.
    """

    kind: Kind
    logits: Tensor
    losses: list[float | None]
    norms: list[float]
    gradients: dict[Key, Tensor]
    weights: dict[Key, Tensor]
    bindings: Bindings
    unmarked: list[str]


def describe(target: Target, problem: Problem, dtype: torch.dtype) -> Kind:
    """What a target turns out to be, on one rank.

    Raises:
        TargetError: it cannot be run; whatever it raises itself.
    """
    layout = RunLayout("tp 1", Parallelism())
    with groups_of(layout.sizes):
        return build(target, problem.config, layout, dtype).kind


def observe(target: Target, problem: Problem, layout: RunLayout, dtype: torch.dtype, steps: int) -> Observation:
    """Run a target on this rank; all ranks of the layout must call it.

    Raises:
        TargetError: it cannot be run; whatever it or megatron-core raises.
    """
    rank, sizes = distributed.get_rank(), layout.sizes
    with groups_of(sizes):
        kind, chunks = build(target, problem.config, layout, dtype)
        model = ModelClass.HYBRID if isinstance(chunks[0], HybridModel) else ModelClass.GPT
        states = [model_state(chunk) for chunk in chunks]
        bindings = bind(states, model, problem.config, sizes, rank)
        for bound in bindings.bound:
            load(bound, states[bound.parameter.chunk][bound.name], problem.weights)
        device = next(chunks[0].parameters()).device
        logits = megatron_logits(chunks[0], problem.tokens.to(device), problem.config.vocab_size)
        chunks[0].train()
        tokens, labels = (_mine(x, sizes, rank).to(device) for x in (problem.tokens, problem.labels))
        _, batch, seq = tokens.shape
        microbatches = list(zip(tokens, labels, strict=True))
        ddp, losses, norms, gradients = wrapped(chunks), [], [], {}
        for _ in range(steps):
            losses.append(forward_backward(ddp, microbatches, labelled_step, seq=seq, batch=batch))
            norms.append(gradient_norm(chunks))
            gradients = gradients or _shares(_gradients(chunks), [one for one in bindings.bound if _has_gradient(one)])
            descend(chunks, LEARNING_RATE)
        weights = _shares([model_state(chunk) for chunk in chunks], bindings.bound)
        unmarked = _unmarked(states, bindings.bound, sizes, rank, problem.config)
        return Observation(kind, logits.float().cpu(), losses, norms, gradients, weights, bindings, unmarked)


def _mine(whole: Tensor, sizes: Parallelism, rank: int) -> Tensor:
    """This rank's [microbatch, batch, seq] of [batch, seq].

    Raises:
        ValueError: the batch does not divide.
    """
    per_rank, rest = divmod(len(whole), MICROBATCHES * sizes.dp)
    if rest:
        raise ValueError(f"{len(whole)} sequences do not divide over {MICROBATCHES} microbatches x dp {sizes.dp}")
    return whole.view(MICROBATCHES, sizes.dp, per_rank, -1)[:, sizes.coordinates(rank).dp]


def _gradients(chunks: Sequence[nn.Module]) -> list[dict[str, Tensor]]:
    return [
        {name: value.main_grad for name, value in chunk.named_parameters() if value.requires_grad}  # pyright: ignore
        for chunk in chunks
    ]


def _shares(values: Sequence[dict[str, Tensor]], bound: Sequence[Bound]) -> dict[Key, Tensor]:
    return {
        (one.parameter.chunk, one.parameter.name): share(one, values[one.parameter.chunk][one.name])
        for one in bound
        if one.name in values[one.parameter.chunk]
    }


def _has_gradient(bound: Bound) -> bool:
    """The router's bias has none, also where it is a parameter: what moves it shows in later steps."""
    return bound.parameter.row.trained


def _unmarked(
    states: Sequence[dict[str, Tensor]], bound: Sequence[Bound], sizes: Parallelism, rank: int, config: ModelConfig
) -> list[str]:
    """Of ranks that share a key head the first is to mark its shard: it is counted once."""
    sharers = max(1, sizes.tp // config.num_key_value_heads)
    is_first = sizes.coordinates(rank).tp % sharers == 0
    return [
        one.name
        for one in bound
        if one.form is Form.SHARD
        and _is_cut(one.parameter, sizes)
        and (is_first or one.parameter.row.layout is not Layout.KEY_HEADS)
        and not getattr(states[one.parameter.chunk][one.name], "tensor_model_parallel", False)
    ]


def _is_cut(parameter: Parameter, sizes: Parallelism) -> bool:
    ranks = sizes.expert_tp if parameter.row.scope is Scope.EXPERT else sizes.tp
    return ranks > 1 and parameter.row.layout is not Layout.REPLICATED
