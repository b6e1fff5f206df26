"""What the ranks of a layout saw, against the reference: the first step, megatron-core's bookkeeping, later steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bridge.proof.judge.gather import Gathered
from bridge.proof.judge.problem import Problem
from bridge.proof.judge.report import kinds
from bridge.proof.judge.truth import Truth
from bridge.proof.judge.verdict import Fault
from reference.diagnosis import Diagnosis, candidates, explain, relative_errors
from reference.lawful_model import logits, outcome
from reference.laws import MINIMAX_M2, Laws, Part
from reference.outcome import GRADIENT
from reference.parallelism import Parallelism

Errors = dict[str, float]
"""Relative errors by what was compared."""


def first_step(seen: Gathered, posed: Problem, sizes: Parallelism, bound: float) -> tuple[Errors, Diagnosis | None]:
    """Logits, loss and every gradient; and what explains them, where one is beyond the bound.

    Where a norm has one head's weights for all heads, the reference's heads have alike weights, and the gradient is the
    heads' sum.
    """
    problem = posed.with_heads_alike() if seen.one_head else posed
    ranks = {"tensor_parallel": sizes.tp, "expert_tensor_parallel": sizes.expert_tp}

    def run(laws: Laws) -> dict[str, Tensor]:
        found = outcome(problem.config, problem.weights, problem.tokens, problem.labels, laws=laws, **ranks).named()
        for name in seen.one_head:
            heads = found[GRADIENT + name].view(-1, problem.config.head_dim)
            found[GRADIENT + name] = heads.sum(0)
        return found

    def outputs(laws: Laws) -> dict[str, Tensor]:
        return {"logits": logits(problem.config, problem.weights, problem.tokens, laws=laws, **ranks)}

    observed = seen.outcome.named()
    if observed.keys() == (expected := run(MINIMAX_M2)).keys():
        errors = relative_errors(observed, expected)
        if max(errors.values()) <= bound:
            return dict(errors), None
    wrong = candidates(Part.MODEL, problem.config, **ranks)
    found = explain(observed, run, wrong, bound=bound, outputs=outputs)
    return dict(found.errors), found


def bookkeeping(seen: Gathered, unmarked: Sequence[str], bound: float) -> tuple[Errors, list[Fault]]:
    """megatron-core's norm of all gradients against the gradients themselves, and ranks that hold the same weight."""
    norm = torch.stack([value.double().norm() for value in seen.gradients.values()]).norm().item()
    errors, faults = {"gradient norm": abs(seen.norms[0] - norm) / norm}, []
    if errors["gradient norm"] > bound or unmarked:
        shards = f" These are shards and are not: {', '.join(kinds(unmarked))}." if unmarked else ""
        said = (
            "megatron-core's norm of all gradients is not theirs: it counts a parameter on tensor-parallel rank 0, "
            f"unless it is marked a shard.{shards} Mark them with set_tensor_model_parallel_attributes, so that "
            "clipping sees every gradient."
        )
        faults.append(Fault("gradient norm", said))
    apart = {name: error for name, error in seen.replicas.items() if error > bound}
    if apart:
        said = "Ranks that hold the same weight have different gradients for it, and drift apart"
        faults.append(Fault("replicas apart", f"{said}: {', '.join(kinds([*apart]))}."))
    return errors | {f"replicas of {name}": error for name, error in apart.items()}, faults


def strangers(names: Sequence[str]) -> list[Fault]:
    """Parameters that are no weight of MiniMax-M2's."""
    said = f"MiniMax-M2 has no weight for these parameters, and no checkpoint fills them: {', '.join(kinds(names))}."
    return [Fault("unknown parameters", said)] if names else []


def absent(weights: Sequence[str]) -> list[Fault]:
    """Weights of MiniMax-M2's that no parameter is for."""
    said = (
        f"The model has no parameter for these weights of MiniMax-M2: {', '.join(kinds(weights))}. A part or a layer "
        "is missing, or a parameter's place and shape do not show which weight it is."
    )
    return [Fault("missing parameters", said)] if weights else []


def one_head_for_all(seen: Gathered) -> list[Fault]:
    """Norms that are right while all heads have the same weights: those of a checkpoint differ from head to head."""
    names = ", ".join(kinds(sorted(seen.one_head)))
    said = (
        f"The norm is over all heads, but has one head's weights for all of them: {names}. A checkpoint's weights "
        "differ from head to head, and do not fit; give the norm the weights of all heads."
    )
    return [Fault("one head's weights", said)] if seen.one_head else []


def later_steps(seen: Gathered, exact: Truth, bound: float) -> tuple[Errors, list[Fault]]:
    """Losses and gradient norms of every step, and the weights after the last."""
    errors: Errors = {}
    for step, (loss, norm) in enumerate(zip(seen.losses, seen.norms, strict=True), 1):
        true_loss = exact.outcomes[step - 1].loss.item()
        errors[f"loss of step {step}"] = abs(loss - true_loss) / true_loss
        errors[f"gradient norm of step {step}"] = abs(norm - exact.norms[step - 1]) / exact.norms[step - 1]
    trained = {name: exact.weights[name] for name in seen.gradients}
    for name, error in relative_errors({name: seen.weights[name] for name in trained}, trained).items():
        errors[f"weight after {len(seen.losses)} steps, {name}"] = error
    wrong = [name for name, error in errors.items() if not error <= bound]
    said = (
        f"The first step is right and a later one is not: {', '.join(wrong[:4])}. A gradient that is right on one rank "
        "and not on another that holds the same weight does this, and so does state that is kept between steps."
    )
    return errors, [Fault("later steps", said)] if wrong else []
