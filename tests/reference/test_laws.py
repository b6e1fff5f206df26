"""The table of wrong laws is whole and true: every choice has a row, every row shows where it says that it does.

That each computes what its name says is shown in test_diagnosis, on `transformers`' model.
"""

from dataclasses import fields
from functools import cache, partial
from typing import get_args

import pytest
import torch
from support.oracles import FLOAT64, disk_weights
from support.planted import CASE

from reference.attention import Heads
from reference.diagnosis import candidates, explain, relative_errors
from reference.lawful_outcomes import attention_outcome, norm_outcome, router_outcome
from reference.laws import MINIMAX_M2, WRONG_LAWS, Laws, Part
from reference.model import layer_weights

CONFIG = CASE.model_config()
LAYER = layer_weights(disk_weights(CASE, dtype=FLOAT64), 0)
TP = 6  # more than key/value heads


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def heads(groups: int, seed: int) -> Heads:
    return Heads(normal(4, 2, 6, 16, seed=seed), normal(4, 2, groups, 16, seed=seed + 1))


def runs(ranks: int) -> dict[Part, partial]:
    """Each part on `ranks` ranks, as a function of its laws."""
    below = {name.removeprefix("self_attn."): value for name, value in LAYER.items()}
    norms = {name: below[name] for name in ("q_norm.weight", "k_norm.weight")}
    hidden, cotangent = normal(6, 2, CASE.hidden), normal(6, 2, CASE.hidden, seed=1)
    gate, bias = (LAYER[f"block_sparse_moe.{name}"] for name in ("gate.weight", "e_score_correction_bias"))
    return {
        Part.NORM: partial(norm_outcome, heads(2, 0), norms, heads(max(ranks, 2), 5), CONFIG, tensor_parallel=ranks),
        Part.ATTENTION: partial(attention_outcome, hidden, LAYER, cotangent, CONFIG, tensor_parallel=ranks),
        Part.ROUTER: partial(
            router_outcome, hidden.flatten(0, 1), gate, bias, normal(12, 5, seed=2), top_k=3, tensor_parallel=ranks
        ),
    }


def test_names_differ_and_changes_are_of_laws():
    assert len({law.name for law in WRONG_LAWS}) == len(WRONG_LAWS)
    for law in WRONG_LAWS:
        assert law.changes
        assert all(getattr(Laws(**law.changes), field) != getattr(MINIMAX_M2, field) for field in law.changes)
        assert law.sentence.endswith((".", ")."))


def test_the_first_choice_is_minimax_m2_s_and_every_other_has_a_row():
    rows = {(field, value) for law in WRONG_LAWS for field, value in law.changes.items()}
    for field in fields(Laws):
        first, *others = get_args(field.type) if field.type not in (int, float | None) else (field.default,)
        assert field.default == first
        assert {(field.name, other) for other in others} <= rows
        assert any(name == field.name for name, _ in rows)


@pytest.mark.parametrize("ranks", [1, 2, TP])
@pytest.mark.parametrize("part", [Part.NORM, Part.ATTENTION, Part.ROUTER])
def test_a_wrong_law_shows_in_the_parts_that_it_names_and_no_others(part, ranks):
    run, before = runs(ranks)[part], {name: value.clone() for name, value in LAYER.items()}
    right = run(laws=MINIMAX_M2)
    shown = candidates(part, CONFIG, tensor_parallel=ranks)
    # One key head a rank: [q; k; v] and groups are the same, and so are tiling and repeating.
    same = {"qkv read as blocks", "key heads tiled"} if ranks > 1 else set()
    for law in WRONG_LAWS:
        error = max(relative_errors(run(laws=Laws(**law.changes)), right).values())
        if law in shown and law.name not in same:
            assert error > 1e-9, law.name
        elif not law.name.startswith("all norm"):  # a part has some of all norms; they have rows of their own
            assert error < 1e-12, law.name
    assert all(torch.equal(value, before[name]) and not value.requires_grad for name, value in LAYER.items())


@pytest.mark.parametrize("part", [Part.NORM, Part.ATTENTION, Part.ROUTER])
def test_parts_do_not_depend_on_the_number_of_ranks(part):
    one, many = (runs(ranks)[part](laws=MINIMAX_M2) for ranks in (1, 2))
    assert max(relative_errors(many, one).values()) < 1e-12


@pytest.mark.parametrize("part", [Part.NORM, Part.ATTENTION, Part.ROUTER])
def test_each_part_is_diagnosed_by_itself(part):
    """Planted through the lawful parts, for they were seen equal to planted mistakes in the model."""
    run = cache(runs(2)[part])
    shown = candidates(part, CONFIG, tensor_parallel=2)
    for law in shown[:: len(shown) // 6]:
        observed = run(laws=Laws(**law.changes))
        found = explain(observed, lambda laws: run(laws=laws), shown, bound=1e-10)
        assert found.explanations == (((law,),) if law not in found.unseen else ()), law.name
