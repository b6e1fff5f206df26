"""The table of mistakes: each changes something, no two do the same to a weight, and arguments stay as they are."""

from itertools import combinations

import pytest
import torch
from support.wrong_conversions import SIZES

from reference.config import ModelConfig
from reference.conversion_mistakes import MISTAKES, Changed, Elsewhere
from reference.fp8 import quantize_blockwise
from reference.mistake_chains import chains, elsewhere, results
from reference.mistaken_sources import Group, Place, Stored, decode
from reference.weights import TABLE, Row, Storage

CONFIG = ModelConfig.from_hf(SIZES)
ROWS = {"+".join(Place(row, 0, 0).names): row for row in TABLE}


def drawn(row: Row, seed: int = 0) -> Group:
    """Random weights, as the released files store them."""
    generator = torch.Generator().manual_seed(seed)
    values = [1 + 0.1 * torch.randn(shape, generator=generator) for shape in row.shapes(CONFIG)]
    if row.storage is Storage.QUANTIZABLE:
        return tuple(Stored(*quantize_blockwise(value)) for value in values)
    dtype = row.plain_dtype(torch.bfloat16)
    return tuple(Stored(value.to(dtype), None) for value in values)


@pytest.mark.parametrize("name", ROWS)
def test_each_mistake_changes_something_of_its_own(name: str) -> None:
    row = ROWS[name]
    stored, copy = drawn(row), drawn(row)
    right = tuple(decode(one, CONFIG) for one in stored)
    found = tuple(decode(one, CONFIG).flip(0) for one in stored)
    made = {
        chain[0].name: list(results(chain, stored, found, CONFIG))
        for chain in chains(row)
        if len(chain) == 1 and not isinstance(chain[0].change, Elsewhere)
    }
    for mistake, ways in made.items():
        if mistake == "float16" and row.storage is Storage.MODEL_DTYPE:
            continue  # these values are float16's too
        if mistake in ("truncated", "bias_shifted") and row.storage is not Storage.QUANTIZABLE:
            continue
        assert any(differ(right, way) for way in ways), mistake
    for one, other in combinations(made, 2):
        same = [way for way in made[one] if differ(right, way) and any(not differ(way, b) for b in made[other])]
        assert not same, (one, other)
    for one, before in zip(stored, copy, strict=True):
        assert torch.equal(one.values.view(torch.uint8), before.values.view(torch.uint8))


def differ(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_other_places_are_other_places_of_the_same_shape() -> None:
    for row in TABLE:
        for chain in chains(row):
            if isinstance(chain[0].change, Elsewhere):
                for expert in range(CONFIG.num_local_experts):
                    for place in elsewhere(chain, Place(row, 1, expert), CONFIG):
                        assert place.row.shapes(CONFIG) == row.shapes(CONFIG)
                        assert place.layer < CONFIG.num_hidden_layers
                        assert place.expert < CONFIG.num_local_experts


def test_every_sentence_says_what_to_do() -> None:
    for mistake in MISTAKES:
        assert ";" in mistake.said, mistake.name
        assert mistake.exact or isinstance(mistake.change, Changed) or "scale" in mistake.said
