"""slime's converters, loader and calls: against the bytes on disk, and against slime's own source where it is.

`SLIME=folder pytest -m plugins tests/bridge/plugins/test_slime.py`, with a checkout. The package itself imports
inference engines; so functions of its files are run by themselves.
"""

import ast
import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import EDGY_CONFIG
from support.files import module_of
from support.megatron_lm import cpu_words, megatron_lm_runs, parsed
from torch import Tensor, nn

from bridge import MiniMaxM2Bridge, model_parallel
from bridge.plugins import slime
from bridge.plugins.megatron_lm_arguments import megatron_lm_arguments
from compiled.fp8 import dequantize_blockwise, quantize_blockwise
from reference.config import ModelConfig

CONFIG = ModelConfig.from_hf(EDGY_CONFIG)
SIZES = {name: getattr(CONFIG, name) for name in ("num_attention_heads", "hidden_size", "vocab_size")}
ARGS = Namespace(**SIZES, num_query_groups=CONFIG.num_key_value_heads, kv_channels=CONFIG.head_dim, q_lora_rank=None)


def slime_arguments(folder: Path, *more: str) -> Namespace:
    """slime adds its own arguments to Megatron-LM's."""
    found = parsed(cpu_words(megatron_lm_arguments(CONFIG)) + list(more))
    return Namespace(**vars(found) | {"hf_checkpoint": str(folder), "padded_vocab_size": CONFIG.vocab_size})


@pytest.fixture(scope="module")
def whole(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors on disk, dequantised by themselves."""
    scale = "_scale_inv"
    return {
        name: dequantize_blockwise(value, source[name + scale]) if name + scale in source else value
        for name, value in source.items()
        if not name.endswith(scale) and f"layers.{CONFIG.num_hidden_layers}." not in name
    }


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[nn.Module]:
    """What slime builds by `--spec`, with the checkpoint's weights."""
    from megatron.core.models.gpt import GPTModel

    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        provider = bridge.provider_bridge()
        spec: Any = slime.layer_spec(slime_arguments(checkpoint), provider.transformer_config, None)
        model = GPTModel(provider.transformer_config, spec, **provider.gpt_model_arguments)
        bridge.load_hf_weights(model)
        yield model


@pytest.fixture(scope="module")
def named(model: nn.Module) -> dict[str, Tensor]:
    """As slime names what it synchronises: parameters, and the router's bias."""
    buffers = {name: value for name, value in model.named_buffers() if "expert_bias" in name}
    return {
        f"module.module.{name}": value.detach() for name, value in {**dict(model.named_parameters()), **buffers}.items()
    }


def test_every_parameter_becomes_what_is_on_disk(named: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    converted = [pair for name, value in named.items() for pair in slime.convert_to_hf(ARGS, name, value)]
    assert sorted(name for name, _ in converted) == sorted(whole)
    for name, value in converted:
        assert torch.equal(value, whole[name].to(value.dtype)), name


def test_every_parameter_is_made_of_what_is_on_disk(named: dict[str, Tensor], checkpoint: Path) -> None:
    reader = SimpleNamespace(path=checkpoint)
    config = SimpleNamespace(num_key_value_heads=CONFIG.num_key_value_heads)
    for name, value in named.items():
        assert torch.equal(slime.hf_tensor(name, reader, config).to(value.dtype), value), name


@pytest.mark.parametrize("convert", [slime.convert_to_hf, slime.hf_tensor])
def test_a_parameter_of_another_model_is_named(convert: Any) -> None:
    with pytest.raises(ValueError, match=r"^module\.module\.decoder\.x: not a parameter of a MiniMax-M2 GPTModel"):
        convert(
            *(
                (ARGS, "module.module.decoder.x", None)
                if convert is slime.convert_to_hf
                else ("module.module.decoder.x", None, None)
            )
        )


def test_the_model_provider_makes_the_same_model(model: nn.Module, checkpoint: Path) -> None:
    from support.small_model import logits_of

    arguments = slime_arguments(checkpoint)
    tokens = torch.arange(18).view(2, 9)
    with model_parallel(), megatron_lm_runs(arguments):
        made = slime.model_provider(vp_stage=None)
        made.load_state_dict(model.state_dict())
        made.bfloat16()
        assert {name for name, _ in made.named_parameters()} == {name for name, _ in model.named_parameters()}
        assert torch.equal(logits_of(made, tokens), logits_of(model, tokens))


def test_arguments_are_held_against_the_checkpoint(checkpoint: Path) -> None:
    wrong = {
        "--rotary-base": Namespace(**vars(slime_arguments(checkpoint)) | {"rotary_base": 10000}),
        "--num-layers": Namespace(**vars(slime_arguments(checkpoint)) | {"num_layers": CONFIG.num_hidden_layers + 1}),
        "--hybrid-layer-pattern": Namespace(**vars(slime_arguments(checkpoint)) | {"hybrid_layer_pattern": "*E"}),
        "--tensor-model-parallel-size": Namespace(
            **vars(slime_arguments(checkpoint)) | {"tensor_model_parallel_size": 2 * CONFIG.num_key_value_heads}
        ),
    }
    for option, arguments in wrong.items():
        with pytest.raises(ValueError, match=rf"^{option}: found .*, expected ") as caught:
            slime.layer_spec(arguments, None)
        assert len(str(caught.value).splitlines()) == 1


def test_only_the_spelling_of_the_format_changes(checkpoint: Path) -> None:
    released = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert released["fmt"] == "float8_e4m3fn"
    assert slime.with_known_format(released) == released | {"fmt": "e4m3"}
    for other in (None, {"quant_method": "fp8"}, {"quant_method": "fp8", "fmt": "e5m2"}):
        assert slime.with_known_format(other) == other


# ------------------------------------------------------------------------------------------------ slime's own source


@pytest.fixture(scope="module")
def sources() -> Path:
    folder = os.environ.get("SLIME")
    if not folder:
        pytest.skip("SLIME is not set to a checkout of slime")
    return Path(folder, "slime", "backends", "megatron_utils")


def functions_of(file: Path, names: set[str], **around: Any) -> SimpleNamespace:
    """Functions of a file whose imports are not here, with what they use of them."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert {node.name for node in tree.body} == names
    exec(compile(tree, str(file), "exec"), around)
    return SimpleNamespace(**{name: around[name] for name in names}, around=around)


@pytest.mark.plugins
def test_our_converter_says_what_slimes_says(sources: Path, named: dict[str, Tensor]) -> None:
    """Names of a model of Transformer Engine's, which is all that slime's converter knows."""
    theirs = module_of(sources / "megatron_to_hf" / "minimax_m2.py").convert_minimax_m2_to_hf
    compared = 0
    for name, value in named.items():
        te = re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)
        te = te.replace("0.input_layernorm.", "0.self_attention.linear_qkv.layer_norm_")
        te = te.replace("1.input_layernorm.", "1.self_attention.linear_qkv.layer_norm_")
        ours = slime.convert_to_hf(ARGS, te, value)
        expected = theirs(ARGS, re.sub(r"qk_norm\.([qk])_weight", r"\1_norm.weight", te), value)
        assert [one for one, _ in ours] == [one for one, _ in expected]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(ours, expected, strict=True))
        compared += len(ours)
    assert compared > 30


@pytest.mark.plugins
def test_with_our_converters_slimes_own_calls_give_float8(
    sources: Path, named: dict[str, Tensor], source: dict[str, Tensor], checkpoint: Path
) -> None:
    """`convert_to_hf` and `quantize_params_fp8` of slime's; only its kernel, which needs a GPU, is ours here."""

    def quantized(name: str, weight: Tensor, *_: Any) -> list[tuple[str, Tensor]]:
        codes, scale_inv = quantize_blockwise(weight)
        return [(name, codes), (name + "_scale_inv", scale_inv)]

    folder = sources / "megatron_to_hf"
    fp8 = functions_of(
        folder / "processors" / "quantizer_fp8.py", {"quantize_params_fp8"}, re=re, _quantize_param=quantized
    )
    theirs = module_of(folder / "minimax_m2.py").convert_minimax_m2_to_hf
    padding = functions_of(
        folder / "processors" / "padding_remover.py",
        {"remove_padding"},
        torch=torch,
        strip_param_name_prefix=lambda name: name.removeprefix("module.module."),
    )
    calls = functions_of(
        folder / "__init__.py",
        {"convert_to_hf", "_convert_to_hf_core"},
        convert_minimax_m2_to_hf=theirs,
        quantize_params=lambda args, name, pairs, config, ue8m0: fp8.quantize_params_fp8(
            args, name, pairs, config, ue8m0
        ),
        remove_padding=padding.remove_padding,
    )
    released = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    name, value = next((name, value) for name, value in named.items() if "linear_proj" in name)
    with pytest.raises(AssertionError, match="Unsupported FP8 format: float8_e4m3fn"):
        calls.convert_to_hf(ARGS, "minimax_m2", name, value, released)

    tables = SimpleNamespace(_LOADERS={"minimax_m2": None})
    namespace = SimpleNamespace(quantize_params=calls.around["quantize_params"])
    for _ in range(2):
        slime.install(namespace, tables)
    assert tables._LOADERS["minimax_m2"] is slime.hf_tensor
    assert not isinstance(namespace.quantize_params.of_slime, slime.QuantizeParams)
    calls.around.update(vars(namespace))
    for name, value in named.items():
        te = re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)
        for disk, made in calls.convert_to_hf(ARGS, "minimax_m2", te, value, released):
            assert made.dtype == source[disk].dtype, disk
            assert made.shape == source[disk].shape, disk
