"""A checkpoint's header against its config: every way in which the two can differ, and what is said about it."""

import re
from dataclasses import replace

import pytest
import torch

from reference.checkpoint import check_tensors, contents, expected_tensors, parameter_count, problems
from reference.config import ModelConfig, QuantizationConfig
from reference.names import all_names
from reference.quantization import is_quantized
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
        f"{EXPERT}w2.weight_scale_inv: missing, expected the block scales of {EXPERT}w2.weight, which is float8_e4m3fn "
        "and has no value without them; fetch the checkpoint again with all its files, or ",
    ),
    "scale without its tensor": (
        [],
        {f"{ATTENTION}g_proj.weight_scale_inv": (FLOAT32, (1, 1))},
        f"{ATTENTION}g_proj.weight_scale_inv: scales without their tensor {ATTENTION}g_proj.weight; fetch",
    ),
    "scale of a plain matrix": (
        [],
        {"lm_head.weight_scale_inv": (FLOAT32, (1, 2))},
        "lm_head.weight: found dtype bfloat16 and scales lm_head.weight_scale_inv, expected float8_e4m3fn with ",
    ),
    "scale of a vector": (
        [],
        {"model.norm.weight_scale_inv": (FLOAT32, (2, 1))},
        "model.norm.weight: found dtype bfloat16 and scales model.norm.weight_scale_inv, expected ",
    ),
    "float8 vector": (
        [],
        {"model.norm.weight": (FP8, (200,)), "model.norm.weight_scale_inv": (FLOAT32, (2, 1))},
        "model.norm.weight: found dtype float8_e4m3fn, expected bfloat16 or float16 or float32: only matrices have ",
    ),
    "unknown tensor": (
        [],
        {f"{ATTENTION}q_proj.bias": (FLOAT32, (12,))},
        f"{ATTENTION}q_proj.bias: unknown tensor, MiniMax-M2 has none of this name; ",
    ),
    "expert out of range": (
        [],
        {f"{EXPERT[:-2]}2.w1.weight": (FP8, (130, 200))},
        f"{EXPERT[:-2]}2.w1.weight: unknown tensor: experts are 0 to 1; correct num_local_experts",
    ),
    "stacked and not": (
        [],
        {"model.layers.0.mlp.gate.weight": (BFLOAT16, (2, 200))},
        "model.layers.0.block_sparse_moe.gate.weight: is there, and in model.layers.0.mlp.gate.weight too; remove one",
    ),
    "quantised tensor in bfloat16": (
        [],
        {f"{ATTENTION}o_proj.weight": (BFLOAT16, (200, 300))},
        f"{ATTENTION}o_proj.weight: found dtype bfloat16 and scales {ATTENTION}o_proj.weight_scale_inv, expected ",
    ),
    "the other float8": (
        [],
        {f"{ATTENTION}o_proj.weight": (torch.float8_e5m2, (200, 300))},
        f"{ATTENTION}o_proj.weight: found dtype float8_e5m2, expected float8_e4m3fn with block scales, or bfloat16 or ",
    ),
    "plain tensor in float8": (
        [],
        {"lm_head.weight": (FP8, (50, 200))},
        "lm_head.weight_scale_inv: missing, expected the block scales of lm_head.weight, which is float8_e4m3fn ",
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
def test_the_first_eight_kinds_of_problems_are_listed_and_the_rest_counted(count):
    taken = [name for name in GOOD if not name.endswith("_scale_inv")][3 : 3 + count]
    found = {name: entry for name, entry in GOOD.items() if name not in taken}
    assert sorted(said.partition(":")[0] for said in problems(found, CONFIG)) == sorted(taken)
    with pytest.raises(ValueError, match="missing") as caught:
        check_tensors(found, CONFIG)
    lines = str(caught.value).splitlines()
    assert lines == problems(found, CONFIG)[:8] + ([f"... and {count - 8} more"] if count > 8 else [])


# What is done to every name; the lines that are said (from their beginning; * for the name of a tensor).
MERGE = "merge the adapter into the weights first"
PATTERNS = {
    "PEFT": (
        lambda n: f"base_model.model.{n}",
        ["begins with 'base_model.model.'; a save of a PEFT model: merge"],
    ),
    "wrapped": (
        lambda n: f"module.{n}",
        ["begins with 'module.'; a save of a wrapped model"],
    ),
    "compiled": (
        lambda n: f"_orig_mod.{n}",
        ["begins with '_orig_mod.'; a save of a compiled model"],
    ),
    "twice": (
        lambda n: n.replace("model.", "model.model.") if "model." in n else n,
        ["begins with 'model.'; rename"],
    ),
    "nested": (
        lambda n: n.replace("model.", "model.language_model."),
        ["begins with 'model.language_model.' instead of 'model.'; rename"],
    ),
    "inner model": (
        lambda n: n.removeprefix("model."),
        ["lacks 'model.' before it; rename the tensors to the names of the released files"],
    ),
    "another model": (
        lambda n: n.replace("block_sparse_moe.experts", "ffn").replace("w1", "gate"),
        ["unknown tensor, MiniMax-M2 has none of this name", "missing", "missing", "missing"],
    ),
}


@pytest.mark.parametrize(("rename", "lines"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_in_names_are_one_line(rename, lines):
    found = {rename(name): entry for name, entry in GOOD.items()}
    said = problems(found, CONFIG)
    if lines[-1] == "missing":
        assert [line.split(": ")[1].partition(" from")[0] for line in said if "missing" in line] == ["missing"] * 3
        said = [line for line in said if "missing" not in line]
        assert {line.split("; ")[-1].split(" in all")[0] for line in said} == {"4"}
        lines = [lines[0]] * len(said)
    for line, start in zip(said, lines, strict=True):
        name, _, what = line.partition(": ")
        assert name in found
        assert start in what


def test_adapters_are_named():
    lora = {f"base_model.model.{ATTENTION}q_proj.lora_{x}.weight": (FLOAT32, (4, 4)) for x in "AB"}
    (said, *missing) = problems(lora, CONFIG)
    assert said.startswith(f"base_model.model.{ATTENTION}q_proj.lora_A.weight: a part of an adapter (LoRA")
    assert MERGE in said
    assert "2 in all" in said
    assert all(": missing" in line for line in missing)
    wrapped = {name.replace("q_proj.weight", "q_proj.base_layer.weight"): entry for name, entry in GOOD.items()}
    assert [MERGE in line for line in problems(wrapped | lora, CONFIG)] == [True]


def test_what_is_missing_is_said_by_kind_of_weight():
    """60 lines for 62 layers of 256 experts would help nobody."""
    config = replace(CONFIG, num_hidden_layers=5, num_local_experts=7, num_experts_per_tok=1)
    whole = {name: (spec.dtypes[0], spec.shape) for name, spec in expected_tensors(config).items()}
    assert problems(whole, config) == []
    without = {name: entry for name, entry in whole.items() if not re.search(r"layers\.[123]\..*\.w2\.", name)}
    (said,) = problems(without, config)
    first = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    assert said.startswith(f"{first}: missing from the checkpoint; fetch it again")
    assert said.endswith("; 21 in all: model.layers.{1..3}.block_sparse_moe.experts.{0..6}.w2.weight")
    bare = {name: entry for name, entry in whole.items() if not name.endswith("_scale_inv")}
    said = problems(bare, config)
    assert len(said) == 7
    assert said[-2].endswith("; 35 in all: model.layers.{0..4}.block_sparse_moe.experts.{0..6}.w3.weight_scale_inv")


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 2**60}, {"num_local_experts": 2**60}])
def test_a_config_of_any_size_is_answered_at_once(sizes):
    said = problems(GOOD, replace(CONFIG, **sizes))
    assert any(re.search(r"^model\.layers\..*: missing.*; 2,305,843,009,213,693,9\d\d in all", line) for line in said)
    assert not [line for line in said if "unknown" in line]


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

PAST = "model.layers.2."
# Names of a layer past the last; what the first is said to be, or nothing: then all are an MTP layer's.
BEYOND = {
    "enorm": (["enorm.weight"], None),
    "hnorm and a projection": (["hnorm.weight", "self_attn.q_proj.weight_scale_inv"], None),
    "whole, with eh_proj": (["eh_proj.weight", *LAYER], None),
    "whole, with its own embedding": ([*LAYER, "embed_tokens.weight"], None),
    "whole, with a head": (["shared_head.head.weight", "shared_head.norm.weight", *LAYER], None),
    "with scales of a cache": (["enorm.weight", "self_attn.k_scale"], None),
    "whole": ([*LAYER], "num_hidden_layers, which is at least 3"),
    "one norm": (["input_layernorm.weight"], "num_hidden_layers, which is at least 3"),
    "one expert": (["block_sparse_moe.experts.900.w1.weight"], "num_hidden_layers, which is at least 3"),
    "anything": (["anything.at.all"], "num_hidden_layers, which is at least 3"),
    "alike at the end": (["my_enorm.weight", "self_attn.eh_proj.weight"], "num_hidden_layers, which is at least 3"),
}


@pytest.mark.parametrize(("members", "wrong"), BEYOND.values(), ids=BEYOND)
def test_layers_past_the_last_are_multi_token_prediction_if_they_look_like_it(members, wrong):
    extra = {PAST + name: LAYER.get(name, (torch.int8, (1, 2, 3))) for name in members}
    held = contents(GOOD | extra, CONFIG)
    if wrong is None:
        assert (held.problems, held.mtp, held.unneeded) == ([], list(extra), [])
    else:
        (said,) = held.problems
        assert said.startswith(f"{PAST}{members[0]}: layer 2, past the 2 of num_hidden_layers")
        assert wrong in said
        assert held.mtp == []


@pytest.mark.parametrize(("allowed", "refused"), [(None, None), (3, None), (2, 4), (1, 3), (0, 2)])
def test_num_mtp_modules_says_how_many_there_may_be(allowed, refused):
    extra = {f"model.layers.{layer}.{n}norm.weight": (BFLOAT16, (200,)) for layer in (2, 3, 4) for n in "eh"}
    held = contents(GOOD | extra, replace(CONFIG, num_mtp_modules=allowed))
    assert held.mtp == [name for name in extra if refused is None or int(name.split(".")[2]) < refused]
    assert [line.partition(":")[0] for line in held.problems] == (
        [] if refused is None else [f"model.layers.{refused}.enorm.weight"]
    )


@pytest.mark.parametrize(
    "name", ["model.layers.1.eh_proj.weight", "mtp.layers.2.eh_proj.weight", f"{PAST[:-1]}x.enorm.w"]
)
def test_what_is_in_no_layer_past_the_last_is_unknown(name):
    assert [line.partition(":")[0] for line in problems(GOOD | {name: (BFLOAT16, (1,))}, CONFIG)] == [name]


def test_multi_token_prediction_layers_do_not_stand_in_for_the_models():
    found = {name.replace("layers.1.", "layers.2."): entry for name, entry in GOOD.items()}
    said = problems(found, CONFIG)
    assert said[0].startswith("model.layers.2.input_layernorm.weight: layer 2, past the 2 of num_hidden_layers")
    missing = {n for n in GOOD if "layers.1." in n and not n.endswith("_scale_inv") and "experts.1" not in n}
    assert {line.partition(":")[0] for line in said[1:]} == missing


# ------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize("name", ["model.norm", "lm_head.weight_scale_inv", "model.layers.0.mlp.gate.weight", ""])
def test_what_is_no_weight_on_disk_is_not_quantised(name):
    assert not is_quantized(name, replace(CONFIG, quantization=QuantizationConfig(modules_to_not_convert=())))


def test_an_unquantised_model_has_no_scales_and_no_float8():
    config = replace(CONFIG, quantization=None)
    plain = {name: (BFLOAT16, shape) for name, (_, shape) in GOOD.items() if not name.endswith("_scale_inv")}
    assert problems(plain, config) == []
    assert problems(plain, CONFIG) == []


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, quantization=None)])
def test_the_files_decide_what_is_quantised(config):
    """Any of the matrices may be float8, with its scales, or plain, without."""
    matrices = [name for name, (_, shape) in GOOD.items() if len(shape) == 2 and not name.endswith("_scale_inv")]
    for chosen in (matrices, matrices[::2], matrices[1::3], ["model.layers.1.block_sparse_moe.gate.weight"], []):
        found = {name: entry for name, entry in GOOD.items() if not name.endswith("_scale_inv")}
        found |= {name: (FLOAT16, found[name][1]) for name in matrices}
        for name in chosen:
            rows, cols = found[name][1]
            found[name] = (FP8, (rows, cols))
            found[name + "_scale_inv"] = (FLOAT32, (-(-rows // 128), -(-cols // 128)))
        held = contents(found, config)
        assert (held.problems, held.quantized) == ([], set(chosen))


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
