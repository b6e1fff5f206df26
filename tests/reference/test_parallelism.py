"""Ranks and stages: against megatron-core's own rank generator and pipeline layouts."""

import itertools
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.models.hybrid import hybrid_layer_allocation
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from reference.config import ModelConfig
from reference.parallelism import Parallelism, hybrid_layer_pattern, padded_vocab_size, spread_layers

ORDER = "tp-cp-ep-dp-pp"


def model(**sizes: int) -> ModelConfig:
    defaults = {
        "num_hidden_layers": 12,
        "hidden_size": 8,
        "vocab_size": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 2,
        "rotary_dim": 2,
        "intermediate_size": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
    }
    return ModelConfig(**{**defaults, **sizes})


# ------------------------------------------------------------------------------------------------- ranks


def places(generator: RankGenerator, axis: str) -> dict[int, int]:
    """Each rank's index in its group along an axis."""
    return {rank: index for group in generator.get_ranks(axis) for index, rank in enumerate(group)}


def check_ranks(parallelism: Parallelism) -> None:
    p, experts_tp = parallelism, parallelism.expert_tp
    experts_dp = p.tp * p.cp * p.dp // (experts_tp * p.ep)
    decoder = RankGenerator(tp=p.tp, ep=1, dp=p.dp, pp=p.pp, cp=p.cp, order=ORDER)
    expert = RankGenerator(tp=experts_tp, ep=p.ep, dp=experts_dp, pp=p.pp, cp=1, order=ORDER)
    assert p.world_size == decoder.world_size == expert.world_size
    theirs = {name: places(decoder, name) for name in ("tp", "cp", "dp", "pp")}
    theirs |= {"etp": places(expert, "tp"), "ep": places(expert, "ep"), "edp": places(expert, "dp")}
    for rank in range(p.world_size):
        assert p.coordinates(rank)._asdict() == {axis: indices[rank] for axis, indices in theirs.items()}
    assert places(decoder, "pp") == places(expert, "pp")


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 8, "pp": 2, "ep": 8, "etp": 1},
        {"tp": 2, "dp": 8, "ep": 4},
        {"tp": 4, "cp": 2, "dp": 3, "pp": 2, "ep": 3, "etp": 2},
        {"tp": 2, "dp": 6, "pp": 3, "ep": 2, "etp": 3},  # more expert-tensor than tensor ranks
    ],
)
def test_coordinates_are_megatron_cores(sizes):
    check_ranks(Parallelism(**sizes))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_coordinates_are_megatron_cores_for_any_sizes(data):
    small = st.integers(1, 3)
    etp, ep = data.draw(small), data.draw(small)
    tp, cp, dp = data.draw(
        st.tuples(small, small, st.integers(1, 6)).filter(
            lambda sizes: sizes[0] * sizes[1] * sizes[2] % (etp * ep) == 0
        )
    )
    check_ranks(Parallelism(tp=tp, cp=cp, dp=dp, pp=data.draw(small), etp=etp, ep=ep))


def test_expert_tensor_parallel_follows_tensor_parallel_unless_given():
    assert Parallelism(tp=4).expert_tp == 4
    assert Parallelism(tp=4, etp=1).expert_tp == 1
    assert Parallelism(dp=4, etp=2).expert_tp == 2


# ------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    ("pp", "vpp", "per_stage"),
    [
        (1, 1, (12,)),
        (3, 1, (3, 5, 4)),
        (4, 1, (0, 6, 6, 0)),
        (2, 2, (3, 3, 4, 2)),
        (2, 3, (1, 2, 3, 0, 4, 2)),
        (3, 2, (0, 3, 3, 3, 3, 0)),
    ],
)
def test_uneven_stages_are_megatron_cores(pp, vpp, per_stage, monkeypatch):
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", vpp)
    rows = [["decoder"] * count for count in per_stage]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    layout = PipelineParallelLayerLayout(rows, pp)
    layout.validate_layer_layout(num_layers=12, mtp_num_layers=0)
    stages = Parallelism(pp=pp, vpp=vpp, layers_per_stage=per_stage).stages(model())
    assert len(stages) == pp * vpp
    for chunk, rank in itertools.product(range(vpp), range(pp)):
        theirs = layout.get_layer_id_list(vp_stage=chunk, pp_rank=rank)
        assert list(stages[chunk * pp + rank]) == theirs, (chunk, rank)


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (3, 1), (2, 2), (2, 3), (4, 3)])
def test_even_stages_are_megatron_cores(pp, vpp):
    config = TransformerConfig(
        num_layers=12,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        pipeline_dtype=torch.float32,
    )
    stages = Parallelism(pp=pp, vpp=vpp).stages(model())
    for chunk, rank in itertools.product(range(vpp), range(pp)):
        start = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=rank)
        count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=rank)
        assert stages[chunk * pp + rank] == range(start, start + count)


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(1, 80), stages=st.integers(1, 24))
def test_layers_are_spread_evenly_and_more_in_the_middle(layers, stages):
    spread = spread_layers(layers, stages)
    assert len(spread) == stages
    assert sum(spread) == layers
    assert max(spread) - min(spread) <= 1
    full = [stage for stage, count in enumerate(spread) if count > min(spread)]
    if full:  # as many short stages before as after, or one more after
        assert full == list(range(full[0], full[-1] + 1))
        assert stages - 1 - full[-1] - full[0] in (0, 1)
    config = model(num_hidden_layers=layers)
    ranges = Parallelism(pp=stages, layers_per_stage=spread).stages(config)
    assert [layer for stage in ranges for layer in stage] == list(range(layers))


def test_the_released_model_over_eight_stages():
    assert spread_layers(62, 8) == (7, 8, 8, 8, 8, 8, 8, 7)


# ------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    ("vocab", "divisor", "tp", "expected"),
    [
        (200064, 1, 8, 200064),
        (200064, 128, 1, 200064),
        (200064, 128, 8, 200704),  # 200064 = 195.375 x 1024
        (32, 1, 3, 33),
        (33, 4, 8, 64),
        (64, 4, 8, 64),
        (5, 1, 8, 8),
    ],
)
def test_padded_vocabulary(vocab, divisor, tp, expected):
    parallelism = Parallelism(tp=tp, vocab_divisor=divisor)
    assert padded_vocab_size(model(vocab_size=vocab), parallelism) == expected


# ------------------------------------------------------------------------------------------------- errors

AXES = ("tp", "pp", "vpp", "ep", "cp", "dp", "vocab_divisor", "etp")


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2])
def test_sizes_are_positive(axis, size):
    with pytest.raises(ValueError, match=f"^{axis} must be a positive integer, found {size}$"):
        Parallelism(**{axis: size})


GRIDS = [
    ({"tp": 4, "ep": 2}, "4 ranks of a pipeline stage must divide by etp x ep = 4 x 2; raise dp or lower ep"),
    ({"tp": 2, "cp": 2, "dp": 3, "ep": 5, "etp": 1}, "12 ranks of a pipeline stage must divide by etp x ep = 1 x 5"),
    ({"dp": 4, "etp": 3}, "4 ranks of a pipeline stage must divide by etp x ep = 3 x 1"),
]


@pytest.mark.parametrize(("sizes", "message"), GRIDS)
def test_the_experts_grid_divides_the_ranks_of_a_stage(sizes, message):
    with pytest.raises(ValueError, match=re.escape(f"the tp x cp x dp = {message}")):
        Parallelism(**sizes)


@pytest.mark.parametrize("rank", [-1, 24, 100])
def test_a_rank_that_does_not_exist(rank):
    with pytest.raises(ValueError, match=f"^rank {rank} does not exist in a world of 24$"):
        Parallelism(tp=2, cp=2, dp=3, pp=2).coordinates(rank)


UNEVEN: list[tuple[dict[str, Any], str]] = [
    (
        {"pp": 8},
        "12 layers do not divide over pp x vpp = 8 stages; give layers_per_stage, for example (1, 1, 2, 2, 2, 2, 1, 1)",
    ),
    ({"pp": 3, "vpp": 3}, "12 layers do not divide over pp x vpp = 9 stages"),
    ({"pp": 2, "layers_per_stage": (12,)}, "must be 2 counts (pp x vpp) that add up to 12 layers, found 1 that add up"),
    ({"pp": 2, "vpp": 2, "layers_per_stage": (6, 6)}, "must be 4 counts (pp x vpp) that add up to 12 layers, found 2"),
    (
        {"pp": 2, "layers_per_stage": (6, 5)},
        "(6, 5) must be 2 counts (pp x vpp) that add up to 12 layers, found 2 that add up to 11",
    ),
    ({"pp": 2, "layers_per_stage": (13, -1)}, "layers_per_stage (13, -1) must be 2 counts"),
    ({"pp": 2, "layers_per_stage": ()}, "layers_per_stage () must be 2 counts"),
]


@pytest.mark.parametrize(("sizes", "message"), UNEVEN)
def test_stages_that_do_not_fit(sizes, message):
    for function in (Parallelism(**sizes).stages, Parallelism(**sizes).check):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(model())


INDIVISIBLE: list[tuple[dict[str, int], dict[str, int], str]] = [
    # model sizes, parallel sizes, complaint
    ({}, {"tp": 3}, "num_attention_heads (8) must be divisible by tp (3)"),
    ({}, {"ep": 3, "dp": 3}, "num_local_experts (8) must be divisible by ep (3)"),
    ({}, {"etp": 5, "dp": 5}, "intermediate_size (24) must be divisible by etp (5)"),
    ({"intermediate_size": 6}, {"tp": 4}, "intermediate_size (6) must be divisible by etp (4)"),
    (
        {"num_attention_heads": 12, "num_key_value_heads": 6},
        {"tp": 4},
        "tp (4) must divide num_key_value_heads (6) or be a multiple of it",
    ),
    ({"num_key_value_heads": 1}, {"tp": 8}, "linear_qkv's 20 rows must be divisible by tp (8)"),
]


@pytest.mark.parametrize(("model_sizes", "sizes", "message"), INDIVISIBLE)
def test_a_model_that_does_not_divide(model_sizes, sizes, message):
    config = model(**model_sizes)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Parallelism(**sizes).check(config)
    Parallelism().check(config)


# ------------------------------------------------------------------------------------------------- HybridModel


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (2, 2), (4, 2), (2, 4)])
def test_megatron_reads_the_stages_out_of_the_pattern(pp: int, vpp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own choice of a rank's layers: two of them for each of ours, in the order of the stages."""
    config = model(num_hidden_layers=62)
    parallelism = Parallelism(pp=pp, vpp=vpp, layers_per_stage=spread_layers(62, pp * vpp))
    pattern = hybrid_layer_pattern(config, parallelism)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: pp)
    monkeypatch.setattr(hybrid_layer_allocation, "log_on_each_pipeline_stage", lambda *_, **__: None)
    for rank, chunk in itertools.product(range(pp), range(vpp)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda _, rank=rank: rank)
        kinds, offset = hybrid_layer_allocation.select_pipeline_segment(
            pattern, "the pipeline", chunk if vpp > 1 else None
        )
        layers = parallelism.stages(config)[chunk * pp + rank]
        assert (kinds, offset) == (["*", "E"] * len(layers), 2 * layers.start)


def test_the_pattern_follows_the_layers_of_each_stage() -> None:
    layout = Parallelism(pp=3, layers_per_stage=(0, 1, 2))
    assert hybrid_layer_pattern(model(num_hidden_layers=3), layout) == "|*E|*E*E"
    assert hybrid_layer_pattern(model(num_hidden_layers=3), Parallelism()) == "*E*E*E"
    with pytest.raises(ValueError, match="3 layers do not divide over pp x vpp = 2 stages"):
        hybrid_layer_pattern(model(num_hidden_layers=3), Parallelism(pp=2))
