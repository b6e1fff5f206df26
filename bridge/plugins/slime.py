"""MiniMax-M2 in slime: its layer spec, a model provider, and what its weight sync needs to know of our parameters.

    --spec bridge.plugins.slime layer_spec        or        --custom-model-provider-path bridge.plugins.slime.model_provider

Both check slime's arguments, which are Megatron-LM's, against config.json of `--hf-checkpoint`, so that a forgotten
`--rotary-percent` is an error. Both also put our converters into slime's tables, where it looks for those of MiniMax-M2:
its own know the names of its own attention. `install` does that alone.

slime joins the tensor-parallel ranks' parts of a parameter itself, and gives a converter the whole.
"""

import argparse
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.huggingface.read_json import read_object
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.model.layer_spec import minimax_m2_block_spec
from bridge.plugins import megatron_lm
from bridge.plugins.megatron_lm_arguments import check_arguments
from reference.config import ModelConfig
from reference.fusion import merge_gate_up, merge_qkv, split_gate_up, split_qkv
from reference.model_class import ModelClass
from reference.names import WeightKey, find
from reference.weights import MODEL_DIALECTS, Dialect, Layout

Named = list[tuple[str, Tensor]]


class TensorReader(Protocol):
    """slime's reader of a Hugging Face folder."""

    def get_tensor(self, name: str) -> Tensor: ...


def layer_spec(
    args: argparse.Namespace, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, and the final norm.

    Raises:
        ValueError: an argument is not what `--hf-checkpoint` needs; names the option, the value found, what to pass.
    """
    _check(args)
    install()
    return minimax_m2_block_spec(config, megatron_lm.checked_backend(config), vp_stage=vp_stage)


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
    """One chunk of the model.

    Raises:
        ValueError: as `layer_spec`; or `--hybrid-layer-pattern` is given, whose names slime does not know.
    """
    from megatron.training import get_args

    _check(get_args())
    install()
    built: Any = megatron_lm.model_provider(pre_process, post_process, vp_stage)
    return built


def _check(arguments: argparse.Namespace) -> None:
    if getattr(arguments, "hybrid_layer_pattern", None) is not None:
        raise ValueError(
            f"--hybrid-layer-pattern: found {arguments.hybrid_layer_pattern!r}, expected none for slime, which gathers "
            "the weights of a GPTModel only; leave it out, and pass --num-layers"
        )
    config_json = Path(arguments.hf_checkpoint, CONFIG_NAME)
    check_arguments(arguments, ModelConfig.from_hf(read_object(config_json)) if config_json.is_file() else None)


# ------------------------------------------------------------------------------------------------------ weight sync


def convert_to_hf(args: argparse.Namespace, name: str, param: Tensor) -> Named:
    """What a whole parameter is on disk: (name, tensor) pairs, in the form of slime's own converters.

    Of ranks that share a key head each gives slime a copy, which it joins like parts: one of them is kept.

    Raises:
        ValueError: `name` is no parameter of MiniMax-M2's.
    """
    key = _key(name)
    names = key.row.format(Dialect.HF_DISK, key.layer, key.expert)
    match key.row.layout:
        case Layout.QKV:
            heads_per_group = args.num_attention_heads // args.num_query_groups
            parts = split_qkv(param, num_query_groups=args.num_query_groups, heads_per_group=heads_per_group)
        case Layout.GATE_UP:
            parts = split_gate_up(param)
        case Layout.KEY_HEADS:
            heads = param.view(-1, args.kv_channels)
            parts = (heads[:: len(heads) // args.num_query_groups].flatten(),)
        case _:
            parts = (param,)
    return list(zip(names, parts, strict=True))


def hf_tensor(name: str, reader: TensorReader, config: Any) -> Tensor:
    """A whole parameter, made of what `reader` reads from disk, in the form of slime's own loaders.

    Raises:
        ValueError: `name` is no parameter of MiniMax-M2's.
    """
    key = _key(name)
    parts = [reader.get_tensor(source) for source in key.row.format(Dialect.HF_DISK, key.layer, key.expert)]
    if key.row.layout is Layout.QKV:
        query, key_heads, value = parts
        return merge_qkv(query, key_heads, value, num_query_groups=config.num_key_value_heads)
    return merge_gate_up(*parts) if key.row.layout is Layout.GATE_UP else parts[0]


def _key(name: str) -> WeightKey:
    bare = name
    while bare.startswith("module."):
        bare = bare.removeprefix("module.")
    for dialect in MODEL_DIALECTS[ModelClass.GPT]:
        key = find(bare, dialect)
        if key is not None:
            return key
    raise ValueError(f"{name}: not a parameter of a MiniMax-M2 GPTModel; build it with bridge.plugins.slime")


def with_known_format(quantization_config: dict[str, Any] | None) -> dict[str, Any] | None:
    """`quantization_config` with `fmt` as slime's quantiser spells it: "e4m3" where files say "float8_e4m3fn"."""
    if quantization_config is None or quantization_config.get("fmt") != "float8_e4m3fn":
        return quantization_config
    return quantization_config | {"fmt": "e4m3"}


def install() -> None:
    """Put our converters where slime looks for MiniMax-M2's; in a process without slime, and a second time, nothing.

    Raises:
        ImportError: slime is imported, but has no such tables: it is another version than this was written for.
    """
    import sys

    if "slime" not in sys.modules:
        return
    from slime.backends.megatron_utils import hf_to_megatron, megatron_to_hf

    missing = [
        name
        for owner, name in (
            (megatron_to_hf, "convert_minimax_m2_to_hf"),
            (megatron_to_hf, "quantize_params"),
            (hf_to_megatron, "_LOADERS"),
        )
        if not hasattr(owner, name)
    ]
    if missing:
        raise ImportError(f"slime has no {', '.join(missing)}: this plug-in was written for its main branch of 2026-11")
    megatron_to_hf.convert_minimax_m2_to_hf = convert_to_hf
    hf_to_megatron._LOADERS["minimax_m2"] = hf_tensor
