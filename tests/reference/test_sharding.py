"""What every rank holds: against slices written out by hand, megatron-core's own attention, and put together again."""

import re
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import jaxtyping
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from megatron.core.transformer import attention
from support.oracles import FLOAT64, Case, disk_weights
from torch import Tensor, nn

from reference.config import ModelConfig
from reference.parallelism import Coordinates, Parallelism
from reference.sharding import Parameter, check_coverage, parameters, placements, shard, unshard
from reference.weights import Dialect

TE, LOCAL = Dialect.MEGATRON_TE, Dialect.MEGATRON_LOCAL
Held = dict[int, list[Parameter]]


class Setup(NamedTuple):
    case: Case
    parallelism: Parallelism
    layers_per_stage: tuple[int, ...]


def setup(
    *, groups: int, heads: int, layers: tuple[int, ...] = (1,), experts: int = 2, vocab: int = 8, **parallel: Any
) -> Setup:
    """A tiny model, its parallel sizes, and the layers of each stage (given to Parallelism where they are uneven)."""
    uneven = {"layers_per_stage": layers} if len(set(layers)) > 1 else {}
    parallelism = Parallelism(**parallel, **uneven)
    head_dim = 2
    while (heads + 2 * groups) * head_dim % parallelism.tp:
        head_dim += 2
    width = 2 * parallelism.expert_tp
    sizes = {"heads": heads, "groups": groups, "head_dim": head_dim, "hidden": 3, "width": width, "experts": experts}
    return Setup(Case(**sizes, rotary=2, top_k=1, layers=sum(layers), vocab=vocab), parallelism, layers)


@contextmanager
def types_unchecked():
    """A hundred times faster; the other tests have their types checked."""
    with patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield


def held_by(config: ModelConfig, parallelism: Parallelism, dialect: Dialect = TE) -> Held:
    return {rank: parameters(config, parallelism, rank, dialect) for rank in range(parallelism.world_size)}


# ------------------------------------------------------------------------------------------------- by hand


def by_hand(drawn: Setup, at: Coordinates, disk: dict[str, Tensor], dialect: Dialect) -> dict[tuple[int, str], Tensor]:
    """A rank's parameters by (chunk, name), sliced as SPEC section 5 says."""
    (case, p, per_stage), heads, d = drawn, drawn.case.heads, drawn.case.head_dim
    first_head, last_head = at.tp * heads // p.tp, (at.tp + 1) * heads // p.tp
    queries = slice(first_head * d, last_head * d)
    per_group = heads // case.groups
    keys = slice(first_head // per_group * d, ((last_head - 1) // per_group + 1) * d)  # those these queries attend to
    width, local_experts = case.width // p.expert_tp, case.experts // p.ep
    mine = slice(at.etp * width, (at.etp + 1) * width)
    out: dict[tuple[int, str], Tensor] = {}

    def vocabulary(table: Tensor) -> Tensor:
        rows = case.vocab
        while rows % (p.vocab_divisor * p.tp):
            rows += 1
        padded = torch.cat([table, torch.zeros(rows - case.vocab, case.hidden, dtype=table.dtype)])
        return padded[at.tp * rows // p.tp : (at.tp + 1) * rows // p.tp]

    def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = []
        for group in range(case.groups):
            for head in range(group * per_group, (group + 1) * per_group):
                rows += q[head * d : (head + 1) * d]
            rows += [*k[group * d : (group + 1) * d], *v[group * d : (group + 1) * d]]
        n = len(rows) // p.tp
        return torch.stack(rows[at.tp * n : (at.tp + 1) * n])

    if at.pp == 0:
        out[0, "embedding.word_embeddings.weight"] = vocabulary(disk["model.embed_tokens.weight"])
    if at.pp == p.pp - 1:
        out[p.vpp - 1, "decoder.final_layernorm.weight"] = disk["model.norm.weight"]
        out[p.vpp - 1, "output_layer.weight"] = vocabulary(disk["lm_head.weight"])
    for chunk in range(p.vpp):
        stage = chunk * p.pp + at.pp
        for i in range(per_stage[stage]):
            hf, here = f"model.layers.{sum(per_stage[:stage]) + i}.", f"decoder.layers.{i}."
            norm = "input_layernorm.weight" if dialect is LOCAL else "self_attention.linear_qkv.layer_norm_weight"
            out[chunk, here + norm] = disk[hf + "input_layernorm.weight"]
            qkv = (disk[f"{hf}self_attn.{part}_proj.weight"] for part in "qkv")
            out[chunk, here + "self_attention.linear_qkv.weight"] = interleaved(*qkv)
            out[chunk, here + "self_attention.qk_norm.q_weight"] = disk[hf + "self_attn.q_norm.weight"][queries]
            out[chunk, here + "self_attention.qk_norm.k_weight"] = disk[hf + "self_attn.k_norm.weight"][keys]
            out[chunk, here + "self_attention.linear_proj.weight"] = disk[hf + "self_attn.o_proj.weight"][:, queries]
            out[chunk, here + "pre_mlp_layernorm.weight"] = disk[hf + "post_attention_layernorm.weight"]
            out[chunk, here + "mlp.router.weight"] = disk[hf + "block_sparse_moe.gate.weight"]
            out[chunk, here + "mlp.router.expert_bias"] = disk[hf + "block_sparse_moe.e_score_correction_bias"]
            for e in range(local_experts):
                expert = f"{hf}block_sparse_moe.experts.{at.ep * local_experts + e}."
                local = f"{here}mlp.experts.local_experts.{e}.linear_fc%d.weight"
                fc = local if dialect is LOCAL else f"{here}mlp.experts.linear_fc%d.weight{e}"
                out[chunk, fc % 1] = torch.cat([disk[expert + "w1.weight"][mine], disk[expert + "w3.weight"][mine]])
                out[chunk, fc % 2] = disk[expert + "w2.weight"][:, mine]
    return out


@st.composite
def setups(draw) -> Setup:
    sizes = {name: draw(st.sampled_from([1, 2, 4, 8])) for name in ("tp", "groups")}
    sizes |= {"pp": draw(st.integers(1, 3)), "vpp": draw(st.integers(1, 2)), "cp": draw(st.integers(1, 2))}
    sizes |= {"etp": draw(st.sampled_from([None, 1, 2])), "ep": draw(st.integers(1, 3))}
    experts_grid = (sizes["etp"] or sizes["tp"]) * sizes["ep"]
    dp = draw(st.sampled_from([dp for dp in range(1, 13) if sizes["tp"] * sizes["cp"] * dp % experts_grid == 0]))
    assume(sizes["tp"] * sizes["cp"] * sizes["pp"] * dp <= 48)
    stages = sizes["pp"] * sizes["vpp"]
    layers = draw(st.lists(st.integers(0, 2), min_size=stages, max_size=stages).filter(any))
    return setup(
        **sizes,
        dp=dp,
        heads=max(sizes["tp"], sizes["groups"]) * draw(st.integers(1, 2)),
        layers=tuple(layers),
        experts=sizes["ep"] * draw(st.integers(1, 2)),
        vocab=draw(st.integers(1, 30)),
        vocab_divisor=draw(st.sampled_from([1, 3])),
    )


@settings(max_examples=40, deadline=None)
@given(drawn=setups(), dialect=st.sampled_from([TE, LOCAL]))
@example(setup(groups=1, heads=8, tp=8, vocab=1), TE)  # seven ranks hold nothing of the vocabulary
@example(setup(groups=4, heads=8, tp=8, etp=2, ep=4, experts=4, vocab=21), LOCAL)
@example(setup(groups=8, heads=8, tp=2, pp=2, vpp=2, layers=(1, 2, 0, 2), ep=2, dp=2), LOCAL)
@example(setup(groups=2, heads=4, tp=2, pp=3, layers=(0, 2, 0), cp=2, etp=4, vocab=7, vocab_divisor=3), TE)
@types_unchecked()
def test_every_rank_holds_the_slices_written_out_by_hand_and_together_the_model(drawn, dialect):
    case, parallelism, _ = drawn
    config, disk = case.model_config(), disk_weights(case, dtype=FLOAT64)
    held, values = held_by(config, parallelism, dialect), {}
    for rank, mine in held.items():
        expected = by_hand(drawn, parallelism.coordinates(rank), disk, dialect)
        assert sorted((parameter.chunk, parameter.name) for parameter in mine) == sorted(expected)
        for parameter in mine:
            value = values[rank, parameter.chunk, parameter.name] = shard(parameter, disk)
            assert tuple(value.shape) == parameter.shape, parameter
            assert torch.equal(value, expected[parameter.chunk, parameter.name]), parameter
    placed = placements(held)
    check_coverage(placed, config)
    assert placed.keys() == disk.keys()
    for name, places in placed.items():
        assert torch.equal(unshard(places, values), disk[name]), name


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_every_bit_comes_back(dtype):
    """NaN payloads and both zeros too, and padding is zero bits."""
    case, parallelism, _ = setup(groups=2, heads=4, tp=4, vocab=6)
    generator, disk = torch.Generator().manual_seed(0), {}
    for name, tensor in disk_weights(case).items():
        size = (*tensor.shape[:-1], tensor.shape[-1] * dtype.itemsize)
        disk[name] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)
    held = held_by(case.model_config(), parallelism)
    values = {(rank, 0, one.name): shard(one, disk) for rank, mine in held.items() for one in mine}
    for name, places in placements(held).items():
        assert torch.equal(unshard(places, values).view(torch.uint8), disk[name].view(torch.uint8)), name
    assert not values[3, 0, "output_layer.weight"].view(torch.uint8).any()


# ---------------------------------------------------------------------------------------------- replicas, coverage


def test_replicas_hold_the_same():
    """Who holds a parameter twice: context and data ranks, expert-data ranks, and the key norm's ranks of one head."""
    case, parallelism, _ = setup(groups=2, heads=4, tp=4, etp=1, cp=2, dp=2, ep=4, experts=4)
    copies: dict[tuple, list[tuple]] = defaultdict(list)
    for rank, mine in held_by(case.model_config(), parallelism).items():
        at = parallelism.coordinates(rank)
        for held in mine:
            where = (at.etp, at.ep) if ".experts." in held.name else at.tp
            where = at.tp // 2 if "k_weight" in held.name else where
            copies[held.name, where].append(held[2:])
    counts = {name: {len(found) for (other, *_), found in copies.items() if other == name} for name, *_ in copies}
    assert all(len(set(found)) == 1 for found in copies.values())
    assert counts.pop("decoder.layers.0.self_attention.qk_norm.k_weight") == {8}  # 2 ranks a head x cp x dp
    assert set.union(*counts.values()) == {4}  # cp x dp, and of 16 ranks a stage with 4 of experts


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"tp": 2, "pp": 2, "layers": (1, 1)}, {"tp": 4, "etp": 1, "ep": 4}])
def test_a_rank_that_is_missing_is_noticed(sizes):
    case, parallelism, _ = setup(groups=2, heads=4, experts=4, **sizes)
    config = case.model_config()
    held, shapes = held_by(config, parallelism), {name: list(w.shape) for name, w in disk_weights(case).items()}
    for rank in held:
        remaining = {other: mine for other, mine in held.items() if other != rank}
        with pytest.raises(ValueError, match=": the ranks hold rows and columns ") as caught:
            check_coverage(placements(remaining), config)
        name = str(caught.value).partition(":")[0]
        assert name in {source for parameter in held[rank] for source in parameter.sources}
        assert f"expected a tiling of {shapes[name]}; ranks are missing" in str(caught.value)


def test_data_parallel_ranks_stand_in_for_each_other_but_different_layouts_do_not():
    case, parallelism, _ = setup(groups=2, heads=4, tp=2, dp=2)
    config = case.model_config()
    held = held_by(config, parallelism)
    check_coverage(placements({rank: held[rank] for rank in (1, 2)}), config)
    for other in (Parallelism(), Parallelism(tp=4)):
        mixed = {0: held[0], 1: parameters(config, other, 0, TE)}
        with pytest.raises(ValueError, match=r"^model\.embed_tokens\.weight: the ranks hold .*or come from different"):
            check_coverage(placements(mixed), config)


@pytest.mark.parametrize("missing", ["k_proj", "q_norm", "embed_tokens"])
def test_a_source_that_was_not_given_is_named(missing):
    case, parallelism, _ = setup(groups=1, heads=8, tp=8, vocab=1)
    disk = {name: tensor for name, tensor in disk_weights(case).items() if missing not in name}
    found = [held for held in parameters(case.model_config(), parallelism, 0, TE) if missing in "".join(held.sources)]
    assert found
    for held in found:
        with pytest.raises(
            ValueError, match=rf"^{re.escape(held.name)}: needs model\.\S*{missing}.weight, which was not"
        ):
            shard(held, disk)


@pytest.mark.parametrize(("parallel", "rank"), [({"tp": 2}, 2), ({"tp": 3}, 0)])
def test_no_such_rank_or_division(parallel, rank):
    case, _, _ = setup(groups=2, heads=4)
    with pytest.raises(
        ValueError, match=r"rank 2 does not exist|num_attention_heads \(4\) must be divisible by tp \(3\)"
    ):
        parameters(case.model_config(), Parallelism(**parallel), rank, TE)


# ------------------------------------------------------------------------------------------------- megatron-core


class Module(nn.Module):
    """A function, for megatron-core, which wants a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    ("tp", "groups", "heads"), [(1, 2, 4), (2, 4, 8), (4, 2, 8), (8, 2, 16), (4, 1, 12), (2, 2, 2)]
)
def test_megatron_cores_attention_finds_each_ranks_heads(tp, groups, heads, monkeypatch):
    """Its own code, run on the shards of every rank: rank r has heads r*H/tp and on, their key head, and their norms.

    The input is the identity, so that the projections are the weights themselves, and the norms are only multiplied by:
    every number is one product, and equal to the bit.
    """
    case, parallelism, _ = setup(groups=groups, heads=heads, tp=tp)
    config, disk, d = case.model_config(), disk_weights(case, dtype=FLOAT64), case.head_dim
    attn, held = "model.layers.0.self_attn.", held_by(config, parallelism)
    values = [{p.sources[0]: shard(p, disk) for p in mine} for mine in held.values()]
    projected = [value[f"{attn}q_proj.weight"].T[:, None] for value in values]  # [seq, batch, rows]
    monkeypatch.setattr(
        attention, "all_gather_last_dim_from_tensor_parallel_region", lambda x, group: torch.cat(projected, -1)
    )
    monkeypatch.setattr(attention, "get_pg_rank", lambda rank: rank)
    q, k = (disk[f"{attn}{part}_proj.weight"] * disk[f"{attn}{part}_norm.weight"][:, None] for part in "qk")
    for rank, value in enumerate(values):
        norms = {
            f"{part}_layernorm": Module(lambda x, w=value[f"{attn}{part}_norm.weight"]: x * w.view(-1, d))
            for part in "qk"
        }
        gathers = groups < tp  # SelfAttention.__init__ computes these two
        layer = SimpleNamespace(
            **norms,
            linear_qkv=Module(lambda _, rank=rank: (projected[rank], None)),
            num_query_groups_per_partition=1 if gathers else groups // tp,
            num_attention_heads_per_partition=heads // groups if gathers else heads // tp,
            hidden_size_per_attention_head=d,
            config=SimpleNamespace(num_query_groups=groups, test_mode=False),
            pg_collection=SimpleNamespace(tp=rank),
            world_size=tp,
        )
        query, key, v = attention.SelfAttention.get_query_key_value_tensors(layer, torch.eye(case.hidden))
        first, last = rank * heads // tp, (rank + 1) * heads // tp
        keys = slice(first * groups // heads * d, ((last - 1) * groups // heads + 1) * d)
        assert torch.equal(query.flatten(2)[:, 0].T, q[first * d : last * d])
        assert torch.equal(key.flatten(2)[:, 0].T, k[keys])
        assert torch.equal(v.flatten(2)[:, 0].T, disk[attn + "v_proj.weight"][keys])
        output = value[f"{attn}o_proj.weight"]
        assert torch.equal(output, disk[attn + "o_proj.weight"][:, first * d : last * d])
