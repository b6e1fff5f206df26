"""What the reference makes of the judge's problem, in float64, and how far rounding may take a model from it."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bridge.proof.judge.problem import LEARNING_RATE, Problem
from reference.diagnosis import relative_errors
from reference.lawful_model import outcome
from reference.names import find
from reference.outcome import Outcome
from reference.weights import Dialect, Storage

# A model sums in another order than the reference does, and on each rank in another: errors are of the same size, not
# the same. Of our own layers' errors the largest was 1.7 times the reference's largest, over all layouts.
ALLOWED = 4.0


class Truth(NamedTuple):
    """Steps of gradient descent: each one's outcome and the norm of all gradients, and the weights after the last."""

    outcomes: list[Outcome]
    norms: list[float]
    weights: dict[str, Tensor]


def truth(problem: Problem, steps: int) -> Truth:
    """By the reference, in the dtype of the problem's weights."""
    outcomes, norms = [], []
    for _ in range(steps):
        found = outcome(problem.config, problem.weights, problem.tokens, problem.labels)
        outcomes.append(found)
        norms.append(torch.stack([value.double().norm() for value in found.gradients.values()]).norm().item())
        moved = {name: problem.weights[name] - LEARNING_RATE * value for name, value in found.gradients.items()}
        problem = replace(problem, weights=problem.weights | moved)
    return Truth(outcomes, norms, problem.weights)


def rounding_bound(problem: Problem, dtype: torch.dtype) -> float:
    """The relative error that rounding in `dtype` may cause in any tensor: `ALLOWED` times the reference's largest."""
    weights = {name: value.to(_kept_in(name, dtype)) for name, value in problem.weights.items()}
    rounded = outcome(problem.config, weights, problem.tokens, problem.labels)
    exact = outcome(problem.config, problem.weights, problem.tokens, problem.labels)
    return ALLOWED * max(relative_errors(rounded.named(), exact.named()).values())


def _kept_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """The router stays in float32."""
    key = find(name, Dialect.HF_DISK)
    return torch.float32 if key is not None and key.row.storage is Storage.FLOAT32 else dtype
