"""The released model in full, 62 layers of 256 experts, as names, shapes and bytes: nothing is allocated."""

import math
from collections.abc import Iterator
from unittest.mock import patch

import jaxtyping
import pytest
import torch

from reference.checkpoint import expected_tensors, parameter_count
from reference.config import ModelConfig
from reference.names import all_names, parse
from reference.parallelism import Parallelism, spread_layers
from reference.quantization import is_quantized
from reference.sharding import check_coverage, parameters, placements
from reference.weights import Dialect, Scope, instances

BFLOAT16, FLOAT32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

# What M2.7's config.json says; sizes are repeated here so that the defaults are tested too.
RELEASED = {
    "model_type": "minimax_m2",
    "rotary_dim": 64,
    "max_position_embeddings": 204800,
    "use_mtp": True,
    "num_mtp_modules": 3,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "float8_e4m3fn",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}
QUANTIZED = {  # rows and columns of a matrix, rows and columns of its scales
    "self_attn.q_proj.weight": (6144, 3072, 48, 24),
    "self_attn.k_proj.weight": (1024, 3072, 8, 24),
    "self_attn.v_proj.weight": (1024, 3072, 8, 24),
    "self_attn.o_proj.weight": (3072, 6144, 24, 48),
    **{f"block_sparse_moe.experts.{e}.w1.weight": (1536, 3072, 12, 24) for e in range(256)},
    **{f"block_sparse_moe.experts.{e}.w3.weight": (1536, 3072, 12, 24) for e in range(256)},
    **{f"block_sparse_moe.experts.{e}.w2.weight": (3072, 1536, 24, 12) for e in range(256)},
}
PLAIN = {
    "self_attn.q_norm.weight": (BFLOAT16, (6144,)),
    "self_attn.k_norm.weight": (BFLOAT16, (1024,)),
    "block_sparse_moe.gate.weight": (FLOAT32, (256, 3072)),
    "block_sparse_moe.e_score_correction_bias": (FLOAT32, (256,)),
    "input_layernorm.weight": (BFLOAT16, (3072,)),
    "post_attention_layernorm.weight": (BFLOAT16, (3072,)),
}


@pytest.fixture(scope="module", autouse=True)
def types_unchecked() -> Iterator[None]:
    """Type checks would take minutes for these many calls."""
    with patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_hf(RELEASED)


@pytest.fixture(scope="module")
def released() -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The files' headers, written out from their description."""
    tensors = {
        "model.embed_tokens.weight": (BFLOAT16, (200064, 3072)),
        "lm_head.weight": (BFLOAT16, (200064, 3072)),
        "model.norm.weight": (BFLOAT16, (3072,)),
    }
    for layer in range(62):
        tensors |= {f"model.layers.{layer}.{name}": entry for name, entry in PLAIN.items()}
        for name, (rows, cols, scale_rows, scale_cols) in QUANTIZED.items():
            tensors[f"model.layers.{layer}.{name}"] = (FP8, (rows, cols))
            tensors[f"model.layers.{layer}.{name}_scale_inv"] = (FLOAT32, (scale_rows, scale_cols))
    return tensors


def test_the_files_are_what_is_expected(config, released):
    assert len(released) == 96_103
    assert sum(dtype.itemsize * math.prod(shape) for dtype, shape in released.values()) == 230_121_630_720
    expected = expected_tensors(config)
    assert {name: spec.shape for name, spec in expected.items()} == {n: shape for n, (_, shape) in released.items()}
    assert [name for name, (dtype, _) in released.items() if dtype not in expected[name].dtypes] == []
    assert {name for name, spec in expected.items() if spec.dtypes == (FP8,)} == {
        name for name, (dtype, _) in released.items() if dtype == FP8
    }


def test_dtypes_are_those_of_the_released_files(config, released):
    weights = {name: dtype for name, (dtype, _) in released.items() if not name.endswith("_scale_inv")}
    for name, dtype in weights.items():
        row = parse(name, Dialect.HF_DISK, config).row
        assert dtype == (FP8 if is_quantized(name, config) else row.plain_dtype(BFLOAT16)), name


def test_the_parameters_are_228_billion(config, released):
    sizes = {name: math.prod(shape) for name, (_, shape) in released.items() if not name.endswith("_scale_inv")}
    assert parameter_count(config) == sum(sizes.values())
    assert round(parameter_count(config) / 1e9, 1) == 228.7
    assert sorted(all_names(config, Dialect.HF_DISK)) == sorted(sizes)


# ------------------------------------------------------------------------------------------------- sharded

# Rows of one rank: vocabulary, linear_qkv, query heads' channels, key heads' channels; experts and their width on it.
EIGHT = {"vocabulary": 25008, "qkv": 1024, "queries": 768, "keys": 128, "experts": 32, "width": 1536}
SIXTEEN = {"vocabulary": 12512, "qkv": 512, "queries": 384, "keys": 128, "experts": 32, "width": 768}
LAYOUTS = {
    "tp8_pp8_ep8": (
        Parallelism(tp=8, pp=8, ep=8, etp=1, layers_per_stage=spread_layers(62, 8)),
        (7, 8, 8, 8, 8, 8, 8, 7),
        EIGHT,
    ),
    "tp16_pp2_vpp2_ep8_etp2": (  # two ranks for each key head; 200064 rows are filled up to 16 x 12512
        Parallelism(tp=16, pp=2, vpp=2, ep=8, etp=2, layers_per_stage=(15, 16, 16, 15), vocab_divisor=32),
        (15, 16, 16, 15),
        SIXTEEN,
    ),
}


def shapes_by_hand(
    parallelism: Parallelism, layers: tuple[int, ...], rank: int, sizes: dict[str, int]
) -> dict[tuple[int, str], tuple[int, ...]]:
    """A rank's parameters by (chunk, name); ranks of a stage are consecutive, and all alike but for their contents."""
    shapes: dict[tuple[int, str], tuple[int, ...]] = {}
    stage, last = rank // parallelism.tp, parallelism.vpp - 1
    if stage == 0:
        shapes[0, "embedding.word_embeddings.weight"] = (sizes["vocabulary"], 3072)
    if stage == parallelism.pp - 1:
        shapes[last, "decoder.final_layernorm.weight"] = (3072,)
        shapes[last, "output_layer.weight"] = (sizes["vocabulary"], 3072)
    for chunk in range(parallelism.vpp):
        for layer in range(layers[chunk * parallelism.pp + stage]):
            here = f"decoder.layers.{layer}."
            shapes[chunk, here + "self_attention.linear_qkv.layer_norm_weight"] = (3072,)
            shapes[chunk, here + "self_attention.linear_qkv.weight"] = (sizes["qkv"], 3072)
            shapes[chunk, here + "self_attention.qk_norm.q_weight"] = (sizes["queries"],)
            shapes[chunk, here + "self_attention.qk_norm.k_weight"] = (sizes["keys"],)
            shapes[chunk, here + "self_attention.linear_proj.weight"] = (3072, sizes["queries"])
            shapes[chunk, here + "pre_mlp_layernorm.weight"] = (3072,)
            shapes[chunk, here + "mlp.router.weight"] = (256, 3072)
            shapes[chunk, here + "mlp.router.expert_bias"] = (256,)
            for expert in range(sizes["experts"]):
                shapes[chunk, f"{here}mlp.experts.linear_fc1.weight{expert}"] = (2 * sizes["width"], 3072)
                shapes[chunk, f"{here}mlp.experts.linear_fc2.weight{expert}"] = (3072, sizes["width"])
    return shapes


@pytest.mark.parametrize(("parallelism", "layers", "sizes"), LAYOUTS.values(), ids=LAYOUTS)
def test_shapes_on_the_ranks_of_a_large_run(config, parallelism, layers, sizes):
    for rank in range(0, parallelism.world_size, 5):  # some of each stage, and of each expert rank
        mine = parameters(config, parallelism, rank, Dialect.MEGATRON_TE)
        shapes = {(parameter.chunk, parameter.name): parameter.shape for parameter in mine}
        assert len(shapes) == len(mine)
        assert shapes == shapes_by_hand(parallelism, layers, rank, sizes), rank


def test_the_64_ranks_of_a_large_run_hold_every_tensor_once(config, released):
    parallelism, *_ = LAYOUTS["tp8_pp8_ep8"]
    placed = placements({rank: parameters(config, parallelism, rank, Dialect.MEGATRON_TE) for rank in range(64)})
    check_coverage(placed, config)
    assert sorted(placed) == sorted(name for name in released if not name.endswith("_scale_inv"))


# ------------------------------------------------------------------------------------------------- HybridModel


@pytest.mark.parametrize("dialect", [Dialect.HYBRID_TE, Dialect.HYBRID_LOCAL, Dialect.TORCH_DIST_HYBRID])
def test_every_weight_has_its_name_in_a_hybrid_model_and_back(config, dialect):
    """Of all 62 layers and 256 experts: layer i is layers 2i and 2i + 1 there, and no two weights share a name."""
    found = set()
    for row, layer, expert in instances(config):
        (name,) = row.format(dialect, layer, expert)
        key = parse(name, dialect, config)
        stacked = dialect is Dialect.TORCH_DIST_HYBRID and row.scope is Scope.EXPERT
        assert key == (row, 0, layer, 0 if stacked else expert), name
        if row.scope is not Scope.MODEL:
            assert name.startswith(f"decoder.layers.{2 * layer + (row.scope is not Scope.ATTENTION)}."), name
        found.add(name)
    assert found == set(all_names(config, dialect))
    weights = sum(1 for _ in instances(config))
    assert len(found) == weights if dialect is not Dialect.TORCH_DIST_HYBRID else 3 + 62 * (8 + 2)
