"""Both dialects of config.json give one ModelConfig; what the formulas do not cover is refused by the key's name."""

import re
from dataclasses import fields, replace

import pytest
from support.checks import without_type_checks
from support.oracles import CASES
from transformers import MiniMaxM2Config

from reference.config import ModelConfig, QuantizationConfig

# What the released M2 config.json says (keys that matter and some that do not), and what transformers does not know.
RELEASED = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"},
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 196608,
    "model_type": "minimax_m2",
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "output_router_logits": False,
    "qk_norm_type": "per_layer",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
    "a_key_of_the_future": {"nested": [1, 2]},
}
M2 = ModelConfig(rotary_dim=64, quantization=QuantizationConfig(), num_mtp_modules=3)
NEW_DIALECT = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
SIZES = [field.name for field in fields(ModelConfig) if field.type is int]


def changed(**changes) -> dict:
    """RELEASED with keys changed, and those set to `...` removed."""
    return {key: value for key, value in (RELEASED | changes).items() if value is not ...}


def test_released_m2():
    config = ModelConfig.from_hf(RELEASED)
    assert config == M2
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (62, 3072, 200064)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (48, 8, 128)
    assert (config.rotary_dim, config.rope_theta, config.heads_per_group) == (64, 5e6, 6)
    assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (256, 8, 1536)
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-6, 196608)
    assert config.quantization.block_size == 128
    assert config.quantization.modules_to_not_convert == ("gate", "e_score_correction_bias", "lm_head")


def test_keys_that_other_releases_change_or_lack():
    assert ModelConfig.from_hf(changed(max_position_embeddings=204800)).max_position_embeddings == 204800  # M2.7
    assert ModelConfig.from_hf(changed(router_aux_loss_coef=0.01)).router_aux_loss_coef == 0.01
    assert ModelConfig.from_hf(changed(quantization_config=...)) == replace(M2, quantization=None)
    minimal = {"model_type": "minimax_m2", "rotary_dim": 64}
    assert ModelConfig.from_hf(minimal) == ModelConfig(rotary_dim=64)
    assert ModelConfig.from_hf(minimal | dict.fromkeys(["head_dim", "attn_type_list", "rope_scaling"])) == ModelConfig(
        rotary_dim=64
    )


@pytest.mark.parametrize("name", CASES)
def test_transformers_dialect_gives_the_same_config(name):
    """transformers writes `rope_parameters`; it may keep `rotary_dim` beside it, or not have had it."""
    case = CASES[name]
    released = case.model_config()
    written = case.hf_config().to_dict()
    assert written["rope_parameters"]["partial_rotary_factor"] == case.rotary / case.head_dim
    only_new = {key: value for key, value in written.items() if key not in ("rotary_dim", "rope_theta")}
    assert ModelConfig.from_hf(written) == released
    assert ModelConfig.from_hf(only_new) == released
    assert (released.rotary_dim, released.hidden_size, released.head_dim) == (case.rotary, case.hidden, case.head_dim)
    assert (released.num_local_experts, released.num_experts_per_tok) == (case.experts, case.top_k)


def test_defaults_are_transformers():
    """All but the rotary width: a config that does not state it is refused, where transformers turns every channel."""
    theirs = MiniMaxM2Config()
    with pytest.raises(ValueError, match=r"neither rotary_dim nor rope_parameters\.partial"):
        ModelConfig.from_hf(theirs.to_dict())
    ours = ModelConfig(rotary_dim=64)
    own = ("rotary_dim", "rope_theta", "quantization", "num_mtp_modules")
    shared = [field.name for field in fields(ours) if field.name not in own]
    assert {name: getattr(ours, name) for name in shared} == {name: getattr(theirs, name) for name in shared}
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == theirs.default_theta


@pytest.mark.parametrize(
    ("changes", "rotary_dim", "theta"),
    [
        ({"rotary_dim": 32}, 32, 5e6),
        ({"rotary_dim": 128, "rope_theta": ...}, 128, 5e6),
        ({"rotary_dim": ..., "partial_rotary_factor": 0.25}, 32, 5e6),
        ({"rotary_dim": ..., "rope_theta": ..., "rope_parameters": NEW_DIALECT}, 64, 1e4),
        ({"rope_parameters": NEW_DIALECT | {"rope_theta": 5e6}}, 64, 5e6),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 123.0}}, 64, 123.0),
        ({"head_dim": 64, "partial_rotary_factor": 1.0}, 64, 5e6),
        ({"rope_scaling": {"type": "default"}}, 64, 5e6),
        ({"rope_scaling": {"rope_type": "default", "type": "default"}, "rope_parameters": None}, 64, 5e6),
        ({"rope_theta": ..., "rope_scaling": {"type": "default", "rope_theta": 1e6}}, 64, 1e6),
        ({"rotary_dim": ..., "rope_scaling": {"type": "default", "partial_rotary_factor": 0.75}}, 96, 5e6),
        ({"rotary_dim": ..., "rope_theta": ..., "rope_scaling": NEW_DIALECT}, 64, 1e4),
        ({"rotary_dim": ..., "rope_parameters": {"rope_type": None, "rotary_dim": 16}}, 16, 5e6),
        ({"rope_theta": ..., "rope_parameters": NEW_DIALECT, "rope_scaling": NEW_DIALECT}, 64, 1e4),
    ],
)  # fmt: skip
def test_every_place_that_can_state_the_rotary_width_and_theta(changes, rotary_dim, theta):
    config = ModelConfig.from_hf(changed(**changes))
    assert (config.rotary_dim, config.rope_theta) == (rotary_dim, theta)


# --------------------------------------------------------------------------------------------------------------- errors


# Values of another type are type errors under the hook, and must be value errors where users run without it.
UNCHECKED = without_type_checks("reference.config")


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", None])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, found {re.escape(repr(value))}"):
        UNCHECKED.ModelConfig(**{"rotary_dim": 64} | {name: value})


@pytest.mark.parametrize("value", [0, -1.0, True, "1", float("inf"), float("nan"), None])
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps"])
def test_constants_are_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number, found {re.escape(repr(value))}"):
        UNCHECKED.ModelConfig(**{"rotary_dim": 64, name: value})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_attention_heads": 10, "num_key_value_heads": 4},
            "num_attention_heads (10) must be divisible by num_key",
        ),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, "num_attention_heads (4) must be divisible by num_key"),
        ({"rotary_dim": 130}, "rotary_dim must be even and at most head_dim (128), found 130"),
        ({"rotary_dim": 63}, "rotary_dim must be even and at most head_dim (128), found 63"),
        ({"num_local_experts": 4}, "num_experts_per_tok (8) must be at most num_local_experts (4)"),
    ],
)
def test_sizes_that_do_not_go_together(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**{"rotary_dim": 64} | sizes)


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("model_type", "minimax"),
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("use_qk_norm", False),
        ("qk_norm_type", "per_head"),
        ("use_routing_bias", False),
        ("shared_intermediate_size", 1536),
        ("sliding_window", 4096),
        ("tie_word_embeddings", True),
        ("attention_bias", True),
    ],
)
def test_another_computation_is_refused(key, found):
    with pytest.raises(ValueError, match=re.escape(f"config.json: {key} is {found!r}, but only ")):
        ModelConfig.from_hf(changed(**{key: found}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ...}, "config.json has no model_type; expected 'minimax_m2'"),
        ({"attn_type_list": [1, 0, 1]}, "attn_type_list must hold only 1 (softmax attention), found [0, 1]"),
        ({"rotary_dim": ...}, "gives neither rotary_dim nor rope_parameters.partial_rotary_factor"),
        ({"rotary_dim": 64.5}, "rotary_dim must be a positive integer, found 64.5"),
        ({"head_dim": -128}, "head_dim must be a positive integer, found -128"),
        ({"head_dim": 0}, "head_dim must be a positive integer, found 0"),
        ({"partial_rotary_factor": 1.0}, "{'rotary_dim': 64, 'partial_rotary_factor x head_dim': 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "{'rotary_dim': 64, 'rope_parameters.partial_rotary"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "itself: {'rope_theta': 5000000, 'rope_parameters.rope_theta': 1"),
        ({"rotary_dim": ..., "partial_rotary_factor": 0.33}, "the rotary width must be a whole number of channels"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type is 'yarn', but MiniMax-M2 uses 'de"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling: rope_type is 'linear'"),
        ({"rope_scaling": {"type": "default", "rope_theta": 1e4}}, "{'rope_theta': 5000000, 'rope_scaling.rope_"),
        ({"rope_scaling": {"partial_rotary_factor": 1.0}}, "{'rotary_dim': 64, 'rope_scaling.partial_rotary_factor x"),
        ({"rope_parameters": {"rotary_dim": 32}}, "{'rotary_dim': 64, 'rope_parameters.rotary_dim': 32}"),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": 1}, "rope_scaling": {"rope_theta": 2}}, "itself: {'"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "rope_scaling: rope_type is 'linear'"),
        ({"rope_scaling": {"rope_theta": "1e4"}}, "rope_scaling.rope_theta must be a positive number, found '1e4'"),
        ({"attn_type_list": [1] * 61}, "attn_type_list has 61 entries and num_hidden_layers is 62"),
        ({"num_hidden_layers": 4}, "attn_type_list has 62 entries and num_hidden_layers is 4"),
        ({"num_hidden_layers": ..., "attn_type_list": [1] * 4}, "attn_type_list has 4 entries and num_hidden"),
        ({"num_mtp_modules": -1}, "num_mtp_modules must be an integer, 0 or more, found -1"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, found 'yarn'"),
    ],
)  # fmt: skip
def test_unreadable_configs(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(changed(**changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [("router_jitter_noise", 0.1), ("attention_dropout", 0.1), ("hidden_dropout", 0.5), ("classifier_dropout", 0.2)],
)
def test_settings_of_training_do_not_change_the_model(key, value):
    assert ModelConfig.from_hf(changed(**{key: value})) == M2


@pytest.mark.parametrize("section", [None, {}])
def test_an_empty_quantization_section_is_none(section):
    assert ModelConfig.from_hf(changed(quantization_config=section)).quantization is None


def read_quantization(**changes) -> QuantizationConfig:
    section = {key: value for key, value in (RELEASED["quantization_config"] | changes).items() if value is not ...}
    return ModelConfig.from_hf(changed(quantization_config=section)).quantization


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": ...}, "quantization_config has no quant_method; expected 'fp8'"),
        ({"quant_method": "gptq"}, "quantization_config: quant_method is 'gptq', but only 'fp8' is supported"),
        ({"fmt": "e5m2"}, "quantization_config: fmt is 'e5m2', but only 'float8_e4m3fn' or 'e4m3'"),
        *(
            (
                {"scale_fmt": value},
                f"quantization_config: scale_fmt is {value!r}, but only 'float' or 'ue8m0'",
            )
            for value in ("e8m0", "UE8M0", "fp8", "", 0, ["ue8m0"], {})
        ),
        ({"activation_scheme": "static"}, "quantization_config: activation_scheme is 'static', but only 'dynamic'"),
        ({"weight_block_size": [1, 128]}, "must be two equal sizes such as [128, 128], found [1, 128]"),
        ({"weight_block_size": [128]}, "must be two equal sizes such as [128, 128], found [128]"),
        (
            {"ignored_layers": ["gate"]},
            "contradicts itself: {'modules_to_not_convert': ['gate', 'e_s",
        ),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of names, found 'lm_head'"),
        ({"modules_to_not_convert": ..., "ignored_layers": [1]}, "ignored_layers must be a list of names, found [1]"),
        ({"weight_block_size": [0, 0]}, "weight_block_size must be a positive integer, found 0"),
    ],
)
def test_unreadable_quantization(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_quantization(**changes)


def test_quantization_section():
    read = read_quantization
    assert read(weight_block_size=[64, 64]).block_size == 64
    assert read(weight_block_size=...).block_size == 128
    assert read(modules_to_not_convert=["gate"]).modules_to_not_convert == ("gate",)
    assert read(modules_to_not_convert=[]).modules_to_not_convert == ()
    assert read(modules_to_not_convert=...) == QuantizationConfig()
    for absent in (..., None, "float"):
        assert read(scale_fmt=absent) == QuantizationConfig(scale_fmt="float")
    assert read(scale_fmt="ue8m0") == QuantizationConfig(scale_fmt="ue8m0")
    assert read(scale_fmt="ue8m0", modules_to_not_convert=...).scale_fmt == "ue8m0"
    assert read(modules_to_not_convert=..., ignored_layers=["gate"]).modules_to_not_convert == ("gate",)
    assert read(modules_to_not_convert=["a", "b"], ignored_layers=["b", "a"]).modules_to_not_convert == ("a", "b")
    assert read(ignored_layers=None) == QuantizationConfig()
    assert read(fmt=..., activation_scheme=...) == QuantizationConfig()
