"""Which wrong law an implementation follows: its outcome against the reference's under every law.

`diagnose` judges a whole model, `explain` anything that `run(laws)` computes as a dictionary of named tensors: a part
of the model (`reference.lawful_outcomes`), or something of your own. A law explains what was observed if, under it,
every tensor agrees: outputs, loss and all gradients. One changed law is tried at a time, then two; laws that cannot be
told apart on this input are all named. Where nothing agrees, the nearest law is named, and how much it explains.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations, product
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from reference.config import ModelConfig
from reference.lawful_model import logits, outcome
from reference.laws import MINIMAX_M2, WRONG_LAWS, Laws, Part, Ranks, WrongLaw
from reference.outcome import GRADIENT, Outcome

Run = Callable[[Laws], dict[str, Tensor]]
SMALLEST_GRADIENT = 1e-6  # of the largest gradient's norm: what is smaller than this is compared with this


class Verdict(StrEnum):
    """What was found."""

    RIGHT = "right"
    EXPLAINED = "explained"  # by one wrong law; if there are several explanations, any of them may be the one
    TWO_MISTAKES = "two mistakes"  # by two wrong laws at once
    UNEXPLAINED = "unexplained"


class Closest(NamedTuple):
    """The laws that come nearest to what was observed, and their share of the difference: 1 is all of it."""

    laws: tuple[WrongLaw, ...]
    share: float


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, and why.

    Args:
        bound: the largest relative error that counts as agreement.
        errors: of each tensor, |observed - expected| / |expected| in the Euclidean norm, under MiniMax-M2's laws.
        missing: gradients that were not observed; they count as zeros.
        explanations: each is one wrong law, or two at once, under which every tensor agrees.
        closest: the nearest, where there is no explanation.
        unseen: wrong laws that change nothing beyond the bound here, so that nothing is said about them.
    """

    bound: float
    errors: Mapping[str, float]
    missing: tuple[str, ...]
    explanations: tuple[tuple[WrongLaw, ...], ...]
    closest: Closest | None
    unseen: tuple[WrongLaw, ...]

    @property
    def differing(self) -> dict[str, float]:
        """The tensors whose error is larger than the bound, worst first."""
        worst_first = sorted(self.errors.items(), key=lambda item: -item[1])
        return {name: error for name, error in worst_first if not error <= self.bound}

    @property
    def verdict(self) -> Verdict:
        """Right, explained by one law or by two, or unexplained."""
        if not self.differing:
            return Verdict.RIGHT
        if not self.explanations:
            return Verdict.UNEXPLAINED
        return Verdict.EXPLAINED if len(self.explanations[0]) == 1 else Verdict.TWO_MISTAKES

    @property
    def gradients_only(self) -> bool:
        """Whether outputs and loss are right, and some gradient is not."""
        return bool(self.differing) and all(name.startswith(GRADIENT) for name in self.differing)


def candidates(
    part: Part, config: ModelConfig, *, tensor_parallel: int = 1, expert_tensor_parallel: int = 1
) -> tuple[WrongLaw, ...]:
    """The wrong laws that this part of the model can show, at these parallel sizes."""
    divided = {
        Ranks.NONE: True,
        Ranks.TENSOR: tensor_parallel > 1,
        Ranks.SHARED_KEYS: tensor_parallel > config.num_key_value_heads,
        Ranks.EXPERT_TENSOR: expert_tensor_parallel > 1,
    }
    return tuple(wrong for wrong in WRONG_LAWS if part in wrong.parts and divided[wrong.ranks])


def diagnose(
    observed: Outcome,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokens: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    *,
    tensor_parallel: int = 1,
    expert_tensor_parallel: int = 1,
    bound: float,
) -> Diagnosis:
    """Judge a whole model by its outcome on these weights and tokens; the other arguments are `outcome`'s.

    Weights should be float64, so that the reference's own rounding is not in the errors; `bound` is what the observed
    dtype's rounding may cause.

    Raises:
        ValueError: the observed tensors are not the model's (`explain`).
    """
    ranks = {"tensor_parallel": tensor_parallel, "expert_tensor_parallel": expert_tensor_parallel}

    def run(laws: Laws) -> dict[str, Tensor]:
        return outcome(config, weights, tokens, labels, laws=laws, **ranks).named()

    def outputs(laws: Laws) -> dict[str, Tensor]:
        return {"logits": logits(config, weights, tokens[:1], laws=laws, **ranks)}

    wrong = candidates(Part.MODEL, config, **ranks)
    return explain(observed.named(), run, wrong, bound=bound, outputs=outputs)


def explain(
    observed: dict[str, Tensor],
    run: Run,
    wrong_laws: tuple[WrongLaw, ...],
    *,
    bound: float,
    outputs: Run | None = None,
) -> Diagnosis:
    """Find the one or two wrong laws under which `run` gives what was observed, every tensor within `bound`.

    Args:
        observed: the tensors of `run`'s names. Gradients ("gradient of ...") may be missing: they count as zeros.
        run: the named tensors under given laws.
        wrong_laws: those to try (`candidates`).
        bound: the largest relative error that counts as agreement.
        outputs: cheaper than `run`: the first rows of some of its outputs. Pairs of laws are first tried by these.

    Raises:
        ValueError: a name or a shape is not `run`'s, or an output is missing.
    """
    expected = run(MINIMAX_M2)
    missing = _check_names(observed, expected)
    observed = {name: observed.get(name, torch.zeros_like(value)) for name, value in expected.items()}

    def attempt(laws: tuple[WrongLaw, ...]) -> _Attempt:
        found = run(_changed(laws))
        return _Attempt(laws, relative_errors(observed, found), relative_errors(found, expected))

    errors = relative_errors(observed, expected)
    single = [attempt((law,)) for law in wrong_laws]
    seen = [one for one in single if not _agree(one.effect, bound)]
    unseen = tuple(one.laws[0] for one in single if _agree(one.effect, bound))
    if _agree(errors, bound):
        return Diagnosis(bound, errors, missing, (), None, unseen)
    double: list[_Attempt] = []
    explained = [one for one in seen if _agree(one.errors, bound)]
    if not explained:
        laws = [one.laws[0] for one in seen]
        pairs = _pairs(seen, observed, outputs, bound) if outputs else combinations(laws, 2)
        double = [attempt(pair) for pair in pairs if _compatible(pair)]
        explained = [two for two in double if _agree(two.errors, bound)]
    nearest = None if explained else _closest([*seen, *double], errors)
    return Diagnosis(bound, errors, missing, tuple(one.laws for one in explained), nearest, unseen)


def relative_errors(observed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, float]:
    """|observed - expected| / |expected| of each tensor, in the Euclidean norm and float64.

    A gradient is divided by at least `SMALLEST_GRADIENT` of the largest gradient's norm, so that one which is zero but
    for rounding does not count as wrong; zeros agree with zeros. What is not finite has an infinite error.
    """
    wide = {name: value.to(torch.float64) for name, value in expected.items()}
    norms = {name: value.norm().item() for name, value in wide.items()}
    floor = SMALLEST_GRADIENT * max((norm for name, norm in norms.items() if name.startswith(GRADIENT)), default=0.0)
    errors = {}
    for name, value in wide.items():
        difference = (observed[name].to(torch.float64) - value).norm().item()
        size = max(norms[name], floor if name.startswith(GRADIENT) else 0.0)
        is_number = difference < float("inf")
        errors[name] = (difference / size if size else float(difference > 0)) if is_number else float("inf")
    return errors


class _Attempt(NamedTuple):
    """Changed laws, how far their outcome is from what was observed, and how far from MiniMax-M2's."""

    laws: tuple[WrongLaw, ...]
    errors: Mapping[str, float]
    effect: Mapping[str, float]


def _pairs(
    seen: list[_Attempt], observed: dict[str, Tensor], outputs: Run, bound: float
) -> Iterator[tuple[WrongLaw, WrongLaw]]:
    """Pairs of laws that may explain everything, for they give the observed outputs.

    A law that leaves outputs as they are (it is about gradients) leaves them so beside any other.
    """
    right = outputs(MINIMAX_M2)
    outputs_seen = {name: observed[name][: len(value)] for name, value in right.items()}

    def gives_outputs(*laws: WrongLaw) -> bool:
        # Twice the bound, for a law may move outputs by less than it; `explain` judges pairs by the bound itself.
        return _agree(relative_errors(outputs_seen, outputs(_changed(laws))), 2 * bound)

    still = [law for (law,), _, effect in seen if _agree({name: effect[name] for name in right}, bound)]
    moving = [one.laws[0] for one in seen if one.laws[0] not in still]
    if gives_outputs():
        yield from combinations(still, 2)
        return
    yield from product(filter(gives_outputs, moving), still)
    yield from (pair for pair in combinations(moving, 2) if _compatible(pair) and gives_outputs(*pair))


def _compatible(pair: tuple[WrongLaw, WrongLaw]) -> bool:
    """Whether they change different laws."""
    return not pair[0].changes.keys() & pair[1].changes.keys()


def _changed(laws: tuple[WrongLaw, ...]) -> Laws:
    changes = {}
    for law in laws:
        changes |= law.changes
    return Laws(**changes)


def _agree(errors: Mapping[str, float], bound: float) -> bool:
    return all(error <= bound for error in errors.values())


def _closest(attempts: list[_Attempt], errors: Mapping[str, float]) -> Closest | None:
    whole = _total(errors)
    shares = [Closest(one.laws, 1 - _total(one.errors) / whole) for one in attempts]
    return max(shares, key=lambda closest: closest.share, default=None)


def _total(errors: Mapping[str, float]) -> float:
    """Of all tensors; one that is not a number counts as wholly wrong."""
    return math.sqrt(sum(min(error, 1.0) ** 2 for error in errors.values()))


def _check_names(observed: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, ...]:
    """The gradients that are missing; raises where names or shapes are not the expected ones."""
    for name, value in observed.items():
        if name not in expected:
            raise ValueError(
                f"{name}: not a tensor of this outcome; expected names such as {', '.join([*expected][:3])}"
            )
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{name}: found shape {list(value.shape)}, expected {list(expected[name].shape)}: gather the shards of "
                "all ranks into whole tensors first"
            )
    absent = tuple(name for name in expected if name not in observed)
    for name in absent:
        if not name.startswith(GRADIENT):
            raise ValueError(f"{name}: missing from what was observed; only gradients may be, and count as zeros")
    return absent
