"""What ranks hold and weigh: against every rank's shard arithmetic, hand arithmetic, and a search by brute force."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import jaxtyping
import pytest

from reference.advice import advise, default_layers, layouts
from reference.checkpoint import parameter_count
from reference.config import ModelConfig
from reference.memory import Bytes, Holding, holdings, training_bytes
from reference.parallelism import Parallelism, padded_vocab_size, spread_layers
from reference.sharding import parameters
from reference.weights import Dialect

SMALL = ModelConfig(
    num_hidden_layers=5,
    hidden_size=48,
    vocab_size=101,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=12,
    rotary_dim=6,
    intermediate_size=40,
    num_local_experts=8,
    num_experts_per_tok=2,
)
FULL = ModelConfig(rotary_dim=64)
LAYOUTS = {
    "one rank": Parallelism(),
    "tp2, padded vocabulary": Parallelism(tp=2, vocab_divisor=16),
    "tp4, two ranks a key head": Parallelism(tp=4, etp=1),
    "tp8 etp2 ep4, four ranks a key head": Parallelism(tp=8, etp=2, ep=4),
    "uneven pp3": Parallelism(pp=3, layers_per_stage=(1, 3, 1)),
    "pp2 vpp2": Parallelism(pp=2, vpp=2, layers_per_stage=(1, 2, 2, 0)),
    "all at once": Parallelism(tp=2, pp=2, vpp=2, ep=2, etp=4, cp=2, dp=2, layers_per_stage=(1, 1, 2, 1)),
}
FULL_LAYOUT = Parallelism(tp=8, pp=8, ep=8, etp=1, layers_per_stage=spread_layers(62, 8))


@pytest.fixture(scope="module", autouse=True)
def types_unchecked() -> Iterator[None]:
    """Type checks would take minutes for these many calls."""
    with patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield


def held_by(config: ModelConfig, parallelism: Parallelism, rank: int) -> Holding:
    """The same from the parameters one by one, told apart by name."""
    numbers = dict.fromkeys(Holding._fields, 0)
    for parameter in parameters(config, parallelism, rank, Dialect.MEGATRON_LOCAL):
        kinds = [
            kind
            for kind, part in {
                "expert": "local_experts",
                "router": "router.weight",
                "bias": "router.expert_bias",
            }.items()
            if part in parameter.name
        ]
        numbers[kinds[0] if kinds else "dense"] += math.prod(parameter.shape)
    return Holding(**numbers)


@pytest.mark.parametrize("parallelism", LAYOUTS.values(), ids=LAYOUTS)
def test_counts_are_the_sums_over_every_ranks_parameters(parallelism):
    counted = holdings(SMALL, parallelism)
    assert len(counted) == parallelism.pp
    for rank in range(parallelism.world_size):
        assert counted[parallelism.coordinates(rank).pp] == held_by(SMALL, parallelism, rank), rank


def test_counts_are_the_sums_over_every_ranks_parameters_in_full_size():
    counted = holdings(FULL, FULL_LAYOUT)
    for rank in range(FULL_LAYOUT.world_size):
        assert counted[FULL_LAYOUT.coordinates(rank).pp] == held_by(FULL, FULL_LAYOUT, rank), rank


def test_the_full_model_by_hand():
    (whole,) = holdings(FULL, Parallelism())
    assert whole.total == parameter_count(FULL) == 228_689_764_864
    assert whole.expert == 62 * 256 * 3 * 1536 * 3072
    assert (whole.router, whole.bias) == (62 * 256 * 3072, 62 * 256)
    first, *_, last = holdings(FULL, FULL_LAYOUT)
    layer = 3072 * (6144 + 2 * 1024) // 8 + 3072 * 6144 // 8 + 2 * 3072 + 6144 // 8 + 1024 // 8
    assert first == Holding(7 * layer + 200064 // 8 * 3072, 7 * 32 * 3 * 1536 * 3072, 7 * 256 * 3072, 7 * 256)
    assert last == first._replace(dense=first.dense + 3072)


@pytest.mark.parametrize("parallelism", LAYOUTS.values(), ids=LAYOUTS)
def test_all_ranks_together_hold_the_model_as_often_as_it_is_replicated(parallelism):
    """Experts once for each expert-data-parallel rank; outside, sharded weights dp x cp times, others tp times that."""
    p, config = parallelism, SMALL
    total = [sum(numbers) for numbers in zip(*holdings(config, p), strict=True)]  # one rank of each stage
    stage = p.tp * p.cp * p.dp
    copies = stage // (p.expert_tp * p.ep)
    assert total[1] * stage == 5 * 8 * 3 * 40 * 48 * copies
    assert total[2:] == [5 * 8 * 48, 5 * 8]
    sharded = 5 * (48 * 12 * (8 + 2 * 2) + 48 * 12 * 8 + 12 * 8) + 2 * padded_vocab_size(config, p) * 48
    key_norms, replicated = 5 * 12 * 2 * max(1, p.tp // 2), 5 * 2 * 48 + 48  # a key head lies on tp / 2 ranks
    assert total[0] * p.tp == sharded + key_norms + replicated * p.tp


def test_bytes_by_hand():
    holding = Holding(dense=1000, expert=2400, router=80, bias=4)
    parallelism = Parallelism(tp=4, cp=2, dp=4, ep=8, etp=1)  # dense optimizer over 8, experts' over 32 / 8 = 4
    weights, gradients = 2 * 3400 + 4 * 84, 4 * 3480
    assert training_bytes(holding, parallelism, distributed_optimizer=False) == Bytes(
        weights, gradients, 12 * 3400 + 8 * 80
    )
    assert training_bytes(holding, parallelism, distributed_optimizer=True) == Bytes(
        weights, gradients, 12 * 125 + 12 * 600 + 8 * 10
    )


def test_float32_needs_no_copy():
    """4 + 4 + 8 a parameter, as the router's weight in a bfloat16 model."""
    holding = Holding(dense=1000, expert=2400, router=80, bias=4)
    parallelism = Parallelism(tp=4, cp=2, dp=4, ep=8, etp=1)
    for on, moments in ((False, 8 * 3480), (True, 8 * (125 + 600 + 10))):
        found = training_bytes(holding, parallelism, distributed_optimizer=on, dtype="fp32")
        assert found == Bytes(4 * 3484, 4 * 3480, moments)


def test_a_parameter_costs_18_bytes_or_6_and_12_divided():
    held = Holding(dense=10**9)
    for ranks in (1, 2, 64):
        parallelism = Parallelism(dp=ranks)
        assert training_bytes(held, parallelism, distributed_optimizer=False).total == 18 * 10**9
        assert training_bytes(held, parallelism, distributed_optimizer=True).total == (6 + 12 / ranks) * 10**9
    assert training_bytes(Holding(dense=7), Parallelism(dp=4), distributed_optimizer=True).optimizer == 24  # rounded up


def test_default_layers():
    assert default_layers(FULL, 2) is default_layers(FULL, 62) is None
    assert default_layers(FULL, 4) == (15, 16, 16, 15)


# ------------------------------------------------------------------------------------------------- other layouts


def brute_force(config: ModelConfig, ranks: int) -> set[tuple[int, ...]]:
    """(tp, pp, ep, etp) of every layout, tried one by one."""
    found = set()
    for tp, pp, ep, etp in product(range(1, 9), range(1, ranks + 1), range(1, ranks + 1), range(1, 9)):
        if ranks % (tp * pp) or pp > config.num_hidden_layers or ranks % etp:
            continue
        try:
            layers = spread_layers(config.num_hidden_layers, pp)
            layout = Parallelism(tp=tp, pp=pp, ep=ep, etp=etp, dp=ranks // (tp * pp), layers_per_stage=layers)
            layout.check(config)
        except ValueError:
            continue
        found.add((tp, pp, ep, etp))
    return found


@pytest.mark.parametrize("ranks", [1, 6, 8, 16])
def test_layouts_are_all_that_there_are(ranks):
    found = list(layouts(SMALL, Parallelism(), ranks))
    assert all(layout.world_size == ranks for layout in found)
    keys = [(layout.tp, layout.pp, layout.ep, layout.expert_tp) for layout in found]
    assert len(set(keys)) == len(keys)
    assert set(keys) == brute_force(SMALL, ranks)


def test_layouts_keep_what_is_not_searched():
    like = Parallelism(tp=2, pp=2, vpp=2, cp=2, dp=2, vocab_divisor=4, layers_per_stage=(2, 1, 1, 1))
    found = list(layouts(SMALL, like, 16))
    assert {(layout.cp, layout.vocab_divisor) for layout in found} == {(2, 4)}
    assert {(layout.pp, layout.vpp) for layout in found} == {(1, 1), (2, 2)}  # 4 x 2 stages are more than 5 layers
    assert {layout.layers_per_stage for layout in found if layout.pp == 2} == {(2, 1, 1, 1)}


def largest(config: ModelConfig, layout: Parallelism, on: bool) -> int:
    """Of the first rank of each stage, from its parameters."""
    ranks = range(0, layout.world_size, layout.world_size // layout.pp)
    held = [held_by(config, layout, rank) for rank in ranks]
    return max(training_bytes(holding, layout, distributed_optimizer=on).total for holding in held)


def test_advice_fits_and_is_the_nearest():
    given = Parallelism(dp=16, etp=1)
    before = largest(SMALL, given, False)
    advice = advise(SMALL, given, memory=before // 2, distributed_optimizer=False)
    assert advice.gpus == 16
    for fit in advice.fits:
        assert fit.parallelism.world_size == 16
        assert fit.largest == largest(SMALL, fit.parallelism, fit.distributed_optimizer) <= before // 2
    numbers = [len(fit.changes) for fit in advice.fits[:-1]]
    assert numbers == sorted(numbers)
    # One change is enough: sharded optimizer state; or the experts over more ranks, the least that does it.
    single = {fit.changes[0] for fit in advice.fits if len(fit.changes) == 1}
    assert "distributed optimizer" in single
    experts = [ep for ep in (2, 4, 8) if largest(SMALL, replace(given, ep=ep), False) <= before // 2]
    assert {change for change in single if change.startswith("ep")} == {f"ep 1 -> {ep}" for ep in experts[:1]}
    least = min(
        largest(SMALL, replace(given, tp=tp, pp=pp, ep=ep, etp=etp, dp=16 // (tp * pp), layers_per_stage=layers), True)
        for tp, pp, ep, etp in brute_force(SMALL, 16)
        for layers in [spread_layers(5, pp)]
    )
    assert advice.fits[-1].largest == advice.least.largest == least


def test_where_nothing_fits_more_ranks_are_tried():
    least = advise(SMALL, Parallelism(), memory=1, distributed_optimizer=True).least.largest
    advice = advise(SMALL, Parallelism(), memory=least - 1, distributed_optimizer=True)
    assert advice.gpus == 2
    assert advice.fits
    assert all(fit.largest < least for fit in advice.fits)
    hopeless = advise(SMALL, Parallelism(), memory=1000, distributed_optimizer=True)
    assert (hopeless.gpus, hopeless.fits) == (16, ())


def test_512_ranks_of_the_full_model_are_counted_at_once():
    """The issue's bound is 2 s a rank; this is all of them together."""
    parallelism = Parallelism(tp=8, pp=8, ep=64, etp=1, dp=8, layers_per_stage=spread_layers(62, 8))
    start = time.process_time()
    counted = holdings(FULL, parallelism)
    assert time.process_time() - start < 0.5
    assert sum(holding.expert for holding in counted) == 62 * 4 * 3 * 1536 * 3072
