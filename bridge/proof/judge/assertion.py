"""The judge in somebody's tests."""

from collections.abc import Sequence
from typing import Any

import torch

from bridge.proof.judge.judge import JudgesRanks, judge
from bridge.proof.judge.layouts import SETS, RunLayout
from bridge.proof.judge.report import text
from bridge.proof.judge.target import Slot, Target
from bridge.proof.judge.verdict import Judgement, Status


def assert_matches_reference(
    target: Any,
    *,
    layouts: str | Sequence[RunLayout] = "quick",
    part: Slot | str | None = None,
    dtype: torch.dtype = torch.float32,
    ranks: JudgesRanks | None = None,
) -> Judgement:
    """Run a target on ranks of its own, and compare logits, loss, every gradient and two steps of gradient descent.

    Args:
        target: a function, a class or a spec, or `"package.module:name"`; what it may be: `bridge.proof.judge.target`.
        layouts: "quick", "full", or the layouts.
        part: the part of the layer that the target is, where it is only that.
        dtype: the model's, float32 or bfloat16.
        ranks: those of earlier calls, for they take seconds to start (the fixture `matches_reference` keeps them).

    Raises:
        AssertionError: something differs, or a layout cannot be run; says which law is broken, and what to do.
        TargetError: the target cannot be found or called.
        ValueError: there is no such set of layouts, or no such part.
    """
    if isinstance(layouts, str):
        if layouts not in SETS:
            raise ValueError(f"layouts is {layouts!r}, expected {' or '.join(map(repr, SETS))}, or the layouts")
        chosen = SETS[layouts]
    else:
        chosen = tuple(layouts)
    judgement = judge(Target.of(target, part), chosen, dtype=dtype, ranks=ranks)
    if judgement.status is not Status.HOLDS:
        raise AssertionError(text(judgement))
    return judgement
