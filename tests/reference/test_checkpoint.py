"""A checkpoint's header against its config: every way in which the two can differ, and what is said about it."""

import re
from dataclasses import replace

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from reference.checkpoint import check_tensors, expected_tensors, is_mtp, is_quantized, parameter_count, problems
from reference.config import ModelConfig, QuantizationConfig
from reference.names import all_names
from reference.weights import Dialect

BFLOAT16, FLOAT16, FLOAT32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
Header = dict[str, tuple[torch.dtype, tuple[int, ...]]]

CONFIG = ModelConfig(
    num_hidden_layers=2,
    hidden_size=200,
    vocab_size=50,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=50,
    rotary_dim=24,
    intermediate_size=130,
    num_local_experts=2,
    num_experts_per_tok=1,
    quantization=QuantizationConfig(),
)
LAYER: Header = {
    "input_layernorm.weight": (BFLOAT16, (200,)),
    "post_attention_layernorm.weight": (BFLOAT16, (200,)),
    "self_attn.q_proj.weight": (FP8, (300, 200)),
    "self_attn.q_proj.weight_scale_inv": (FLOAT32, (3, 2)),
    "self_attn.k_proj.weight": (FP8, (100, 200)),
    "self_attn.k_proj.weight_scale_inv": (FLOAT32, (1, 2)),
    "self_attn.v_proj.weight": (FP8, (100, 200)),
    "self_attn.v_proj.weight_scale_inv": (FLOAT32, (1, 2)),
    "self_attn.o_proj.weight": (FP8, (200, 300)),
    "self_attn.o_proj.weight_scale_inv": (FLOAT32, (2, 3)),
    "self_attn.q_norm.weight": (BFLOAT16, (300,)),
    "self_attn.k_norm.weight": (BFLOAT16, (100,)),
    "block_sparse_moe.gate.weight": (FLOAT32, (2, 200)),
    "block_sparse_moe.e_score_correction_bias": (FLOAT32, (2,)),
    "block_sparse_moe.experts.0.w1.weight": (FP8, (130, 200)),
    "block_sparse_moe.experts.0.w1.weight_scale_inv": (FLOAT32, (2, 2)),
    "block_sparse_moe.experts.0.w2.weight": (FP8, (200, 130)),
    "block_sparse_moe.experts.0.w2.weight_scale_inv": (FLOAT32, (2, 2)),
    "block_sparse_moe.experts.0.w3.weight": (FP8, (130, 200)),
    "block_sparse_moe.experts.0.w3.weight_scale_inv": (FLOAT32, (2, 2)),
    "block_sparse_moe.experts.1.w1.weight": (FP8, (130, 200)),
    "block_sparse_moe.experts.1.w1.weight_scale_inv": (FLOAT32, (2, 2)),
    "block_sparse_moe.experts.1.w2.weight": (FP8, (200, 130)),
    "block_sparse_moe.experts.1.w2.weight_scale_inv": (FLOAT32, (2, 2)),
    "block_sparse_moe.experts.1.w3.weight": (FP8, (130, 200)),
    "block_sparse_moe.experts.1.w3.weight_scale_inv": (FLOAT32, (2, 2)),
}
GOOD: Header = {
    "model.embed_tokens.weight": (BFLOAT16, (50, 200)),
    **{f"model.layers.0.{name}": entry for name, entry in LAYER.items()},
    **{f"model.layers.1.{name}": entry for name, entry in LAYER.items()},
    "model.norm.weight": (BFLOAT16, (200,)),
    "lm_head.weight": (BFLOAT16, (50, 200)),
}
ATTENTION, EXPERT = "model.layers.1.self_attn.", "model.layers.0.block_sparse_moe.experts.1."


def test_the_header_written_out_above_is_expected_and_nothing_else():
    expected = expected_tensors(CONFIG)
    assert {name: spec.shape for name, spec in expected.items()} == {name: shape for name, (_, shape) in GOOD.items()}
    assert [name for name in expected if name in all_names(CONFIG, Dialect.HF_DISK)] == all_names(
        CONFIG, Dialect.HF_DISK
    )
    for name, (dtype, _) in GOOD.items():
        one_of = (BFLOAT16, FLOAT16, FLOAT32)
        if dtype == FP8:
            one_of = (dtype,)
        elif name.endswith("_scale_inv"):
            one_of = (FLOAT32, BFLOAT16, FLOAT16, torch.float8_e8m0fnu)
        assert expected[name].dtypes == one_of, name
    assert problems(GOOD, CONFIG) == []
    check_tensors(GOOD, CONFIG)
    assert parameter_count(CONFIG) == sum(
        torch.Size(shape).numel() for name, (_, shape) in GOOD.items() if not name.endswith("_scale_inv")
    )


# ------------------------------------------------------------------------------------------------- problems

# What is taken out of the good header, what is put in, and the one thing that is said (from its beginning).
ONE_PROBLEM: dict[str, tuple[list[str], Header, str]] = {
    "missing tensor": ([f"{ATTENTION}q_norm.weight"], {}, f"{ATTENTION}q_norm.weight: missing from the checkpoint; "),
    "missing quantised tensor, scale there": (
        [f"{EXPERT}w1.weight"],
        {},
        f"{EXPERT}w1.weight: missing from the checkpoint; fetch it again",
    ),
    "missing scale": (
        [f"{EXPERT}w2.weight_scale_inv"],
        {},
        f"{EXPERT}w2.weight_scale_inv: missing, expected the block scales of {EXPERT}w2.weight, which config.json says "
        "is quantised; fetch the checkpoint again, or name the module in quantization_config.modules_to_not_convert",
    ),
    "scale without its tensor": (
        [],
        {f"{ATTENTION}g_proj.weight_scale_inv": (FLOAT32, (1, 1))},
        f"{ATTENTION}g_proj.weight_scale_inv: scales without their tensor {ATTENTION}g_proj.weight; fetch",
    ),
    "scale of an excluded module": (
        [],
        {"lm_head.weight_scale_inv": (FLOAT32, (1, 2))},
        "lm_head.weight_scale_inv: scales of a tensor that config.json says is not quantised; correct",
    ),
    "scale of a module that is never quantised": (
        [],
        {"model.norm.weight_scale_inv": (FLOAT32, (2, 1))},
        "model.norm.weight_scale_inv: scales of a tensor that config.json says is not quantised; correct",
    ),
    "unknown tensor": (
        [],
        {f"{ATTENTION}rotary_emb.inv_freq": (FLOAT32, (12,))},
        f"{ATTENTION}rotary_emb.inv_freq: unknown tensor, MiniMax-M2 has none of this name; ",
    ),
    "expert out of range": (
        [],
        {f"{EXPERT[:-2]}2.w1.weight": (FP8, (130, 200))},
        f"{EXPERT[:-2]}2.w1.weight: unknown tensor",
    ),
    "name in memory": (
        [],
        {"model.layers.0.mlp.experts.gate_up_proj": (BFLOAT16, (2, 260, 200))},
        "model.layers.0.mlp.experts.gate_up_proj: a name of the model in memory, not of the file format; save it with",
    ),
    "quantised tensor in bfloat16": (
        [],
        {f"{ATTENTION}o_proj.weight": (BFLOAT16, (200, 300))},
        f"{ATTENTION}o_proj.weight: found dtype bfloat16, expected float8_e4m3fn; correct quantization_config",
    ),
    "the other float8": (
        [],
        {f"{ATTENTION}o_proj.weight": (torch.float8_e5m2, (200, 300))},
        f"{ATTENTION}o_proj.weight: found dtype float8_e5m2, expected float8_e4m3fn; ",
    ),
    "plain tensor in float8": (
        [],
        {"lm_head.weight": (FP8, (50, 200))},
        "lm_head.weight: found dtype float8_e4m3fn, expected bfloat16 or float16 or float32; ",
    ),
    **{
        f"scale in {dtype}": (
            [],
            {f"{ATTENTION}o_proj.weight_scale_inv": (dtype, (2, 3))},
            f"{ATTENTION}o_proj.weight_scale_inv: found dtype {str(dtype).removeprefix('torch.')}, expected float32 or "
            "bfloat16 or float16 or float8_e8m0fnu; store the scales as float32",
        )
        for dtype in (torch.float64, FP8, torch.float8_e5m2, torch.uint8, torch.int32)
    },
    "wrong shape": (
        [],
        {f"{ATTENTION}k_norm.weight": (BFLOAT16, (50,))},
        f"{ATTENTION}k_norm.weight: found shape [50], expected [100] from config.json's sizes; file and config do not ",
    ),
    "transposed": (
        [],
        {f"{EXPERT}w2.weight": (FP8, (130, 200))},
        f"{EXPERT}w2.weight: found shape [130, 200], expected [200, 130] from config.json's sizes; ",
    ),
    **{
        what: (
            [],
            {f"{ATTENTION}q_proj.weight_scale_inv": (FLOAT32, grid)},
            f"{ATTENTION}q_proj.weight_scale_inv: found a grid of scales {list(grid)}, expected [3, 2] from "
            "config.json's sizes and weight_block_size; file and config do not belong together",
        )
        for what, grid in {
            "too small a grid": (2, 2),
            "too large a grid": (3, 3),
            "transposed grid": (2, 3),
            "flat grid": (6,),
            "one scale": (),
        }.items()
    },
}


@pytest.mark.parametrize(("without", "with_", "complaint"), ONE_PROBLEM.values(), ids=ONE_PROBLEM)
def test_one_problem_is_named_with_what_was_found_and_expected(without, with_, complaint):
    found = {name: entry for name, entry in GOOD.items() if name not in without} | with_
    (said,) = problems(found, CONFIG)
    assert said.startswith(complaint)
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        check_tensors(found, CONFIG)


@pytest.mark.parametrize("count", [2, 8, 9, 11])
def test_the_first_eight_problems_are_listed_and_the_rest_counted(count):
    taken = list(GOOD)[3 : 3 + count]
    found = {name: entry for name, entry in GOOD.items() if name not in taken}
    assert [said.partition(":")[0] for said in problems(found, CONFIG)] == [
        n for n in expected_tensors(CONFIG) if n in taken
    ]
    with pytest.raises(ValueError, match="missing") as caught:
        check_tensors(found, CONFIG)
    lines = str(caught.value).splitlines()
    assert lines == problems(found, CONFIG)[:8] + ([f"... and {count - 8} more"] if count > 8 else [])


def test_every_dtype_that_training_writes_is_accepted_for_plain_tensors():
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        plain = {name: (dtype, shape) for name, (d, shape) in GOOD.items() if d != FP8 and not name.endswith("_inv")}
        assert problems(GOOD | plain, CONFIG) == []


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("every", [2, 1], ids=["some", "all"])
def test_every_dtype_of_scales_that_float32_holds_is_accepted(dtype, every):
    scales = [name for name in GOOD if name.endswith("_scale_inv")][::every]
    assert problems(GOOD | {name: (dtype, GOOD[name][1]) for name in scales}, CONFIG) == []


# ------------------------------------------------------------------------------------------------- MTP

MTP_NAMES = {
    "model.layers.2.eh_proj.weight": True,
    "model.layers.4.self_attn.q_proj.weight_scale_inv": True,
    "model.layers.2.anything.at.all": True,
    "model.layers.17.block_sparse_moe.experts.900.w1.weight": True,
    "model.layers.1.eh_proj.weight": False,
    "model.layers.2x.eh_proj.weight": False,
    "mtp.layers.2.eh_proj.weight": False,
    "model.norm.weight": False,
}


@pytest.mark.parametrize(("name", "mtp"), MTP_NAMES.items())
def test_layers_past_the_model_are_multi_token_prediction(name, mtp):
    assert is_mtp(name, CONFIG) == mtp
    said = problems(GOOD | {name: GOOD.get(name, (torch.int8, (1, 2, 3)))}, CONFIG)
    assert [line.partition(":")[0] for line in said] == ([] if mtp or name in GOOD else [name])


def test_multi_token_prediction_layers_do_not_stand_in_for_the_models():
    found = {name.replace("layers.1.", "layers.2."): entry for name, entry in GOOD.items()}
    assert {line.partition(":")[0] for line in problems(found, CONFIG)} == {n for n in GOOD if "layers.1." in n}


# ------------------------------------------------------------------------------------------------- quantisation

EXCLUDED = [
    # modules_to_not_convert, and the ends of the names that it leaves unquantised (of quantised ones)
    ((), r"$^"),
    (("gate", "e_score_correction_bias", "lm_head"), r"^lm_head\.weight$"),
    (("lm_head", "o_proj"), r"^lm_head\.weight$|\.o_proj\.weight$"),
    (("model.layers.1",), r"^model\.layers\.1\."),
    (("model.layers.1.self_attn", "lm_head"), r"^model\.layers\.1\.self_attn\.|^lm_head\."),
    (("model.layers.10.block_sparse_moe.experts.1.w2",), r"^model\.layers\.10\.block_sparse_moe\.experts\.1\.w2\."),
    (("q_pro", "proj", "model.layers.1.self", "head"), None),  # parts of components are none
]


@pytest.mark.parametrize(("modules", "pattern"), EXCLUDED)
def test_modules_to_not_convert(modules, pattern):
    """And `transformers`, which also matches ends of components, agrees wherever these are none."""
    config = replace(CONFIG, num_hidden_layers=11, quantization=QuantizationConfig(modules_to_not_convert=modules))
    matrices = re.compile(r"(_proj|\.w[123]|^lm_head)\.weight$")
    for name in all_names(config, Dialect.HF_DISK):
        excluded = pattern is not None and re.search(pattern, name) is not None
        assert is_quantized(name, config) == (matrices.search(name) is not None and not excluded), name
        if matrices.search(name) and pattern is not None:
            assert is_quantized(name, config) == should_convert_module(name.removesuffix(".weight"), list(modules)), (
                name
            )


@pytest.mark.parametrize("name", ["model.norm", "lm_head.weight_scale_inv", "model.layers.0.mlp.gate.weight", ""])
def test_what_is_no_weight_on_disk_is_not_quantised(name):
    assert not is_quantized(name, replace(CONFIG, quantization=QuantizationConfig(modules_to_not_convert=())))


def test_an_unquantised_model_has_no_scales_and_no_float8():
    config = replace(CONFIG, quantization=None)
    plain = {name: (BFLOAT16, shape) for name, (_, shape) in GOOD.items() if not name.endswith("_scale_inv")}
    assert problems(plain, config) == []
    said = problems(GOOD, config)
    assert {line.partition(":")[0] for line in said} == {
        name for name in GOOD if GOOD[name][0] == FP8 or "_inv" in name
    }


@pytest.mark.parametrize(
    ("block", "grids"),
    [
        (32, {"q_proj": (10, 7), "k_proj": (4, 7), "o_proj": (7, 10)}),
        (100, {"q_proj": (3, 2), "k_proj": (1, 2), "o_proj": (2, 3)}),
        (256, {"q_proj": (2, 1), "k_proj": (1, 1), "o_proj": (1, 2)}),
    ],
)
def test_grids_of_other_block_sizes(block, grids):
    """300 x 200, 100 x 200 and 200 x 300 in blocks, the last of a row or column smaller."""
    expected = expected_tensors(replace(CONFIG, quantization=QuantizationConfig(block_size=block)))
    assert {part: expected[f"{ATTENTION}{part}.weight_scale_inv"].shape for part in grids} == grids
