"""MiniMax-M2 in slime: its layer spec, a model provider, and what its weight sync needs to know of our parameters.

    --spec bridge.plugins.slime layer_spec
    --custom-model-provider-path bridge.plugins.slime.model_provider    (either will do)

Both check slime's arguments, which are Megatron-LM's, against config.json of `--hf-checkpoint`, so that a forgotten
`--rotary-percent` is an error. Both also put our converters where slime looks for those of MiniMax-M2 (`install`): its
own know the names of its own attention, refuse the `fmt` of the released files, and read FP8 with rounded scales.

slime joins the tensor-parallel ranks' parts of a parameter itself, and gives a converter the whole.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
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


class FolderReader(Protocol):
    """slime's reader of a Hugging Face folder."""

    path: Path


def layer_spec(
    args: argparse.Namespace, config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, and the final norm.

    Raises:
        ValueError: an argument is not what `--hf-checkpoint` needs; names the option, the value found, what to pass.
    """
    _prepare(args)
    return minimax_m2_block_spec(config, megatron_lm.checked_backend(config), vp_stage=vp_stage)


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> GPTModel:
    """One chunk of the model.

    Raises:
        ValueError: as `layer_spec`; or `--hybrid-layer-pattern` is given, whose names slime does not know.
    """
    from megatron.training import get_args

    arguments: Any = get_args()  # megatron-core says None
    _prepare(arguments)
    built: Any = megatron_lm.model_provider(pre_process, post_process, vp_stage)
    return built


def _prepare(arguments: argparse.Namespace) -> None:
    """Check the arguments, and in slime's own process put our converters into its tables."""
    pattern = getattr(arguments, "hybrid_layer_pattern", None)
    if pattern is not None:
        raise ValueError(
            f"--hybrid-layer-pattern: found {pattern!r}, expected none for slime, which gathers the weights of a "
            "GPTModel only; leave it out, and pass --num-layers"
        )
    config_json = Path(arguments.hf_checkpoint, CONFIG_NAME)
    check_arguments(arguments, ModelConfig.from_hf(read_object(config_json)))
    if arguments.tensor_model_parallel_size > arguments.num_query_groups:
        raise ValueError(
            f"--tensor-model-parallel-size: found {arguments.tensor_model_parallel_size}, expected at most the "
            f"{arguments.num_query_groups} key heads for slime, whose gathering does not know of ranks that share one; "
            "choose a smaller size"
        )
    if "slime.backends.megatron_utils" in sys.modules:
        from slime.backends.megatron_utils import (  # pyright: ignore[reportMissingImports]
            hf_to_megatron,
            megatron_to_hf,
        )

        install(megatron_to_hf, hf_to_megatron)


# ------------------------------------------------------------------------------------------------------ weight sync


def convert_to_hf(args: argparse.Namespace, name: str, param: Tensor) -> Named:
    """What a whole parameter is on disk: (name, tensor) pairs, in the form of slime's own converters.

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
        case _:
            parts = (param,)
    return list(zip(names, parts, strict=True))


def hf_tensor(name: str, reader: FolderReader, config: Any) -> Tensor:
    """A whole parameter of the folder that slime reads, in the form of slime's own loaders; float8 is dequantised.

    Raises:
        ValueError: `name` is no parameter of MiniMax-M2's, or the folder is no checkpoint of it.
    """
    key, checkpoint = _key(name), _opened(reader.path)
    parts = [checkpoint.read_weight(source) for source in key.row.format(Dialect.HF_DISK, key.layer, key.expert)]
    if key.row.layout is Layout.QKV:
        query, key_heads, value = parts
        return merge_qkv(query, key_heads, value, num_query_groups=config.num_key_value_heads)
    return merge_gate_up(*parts) if key.row.layout is Layout.GATE_UP else parts[0]


@cache
def _opened(folder: Path) -> HuggingFaceCheckpoint:
    return HuggingFaceCheckpoint(folder)


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


@dataclass(frozen=True)
class QuantizeParams:
    """slime's `quantize_params`, given a `quantization_config` that it knows."""

    of_slime: Callable[..., Named]

    def __call__(
        self,
        args: argparse.Namespace,
        megatron_name: str,
        converted_named_params: Named,
        quantization_config: dict[str, Any] | None,
        transform_ue8m0: bool = True,
    ) -> Named:
        """As slime's."""
        known = with_known_format(quantization_config)
        return self.of_slime(args, megatron_name, converted_named_params, known, transform_ue8m0)


def install(megatron_to_hf: Any, hf_to_megatron: Any) -> None:
    """Put our converters where slime's packages of these names look for MiniMax-M2's; a second time does nothing."""
    megatron_to_hf.convert_minimax_m2_to_hf = convert_to_hf
    if not isinstance(megatron_to_hf.quantize_params, QuantizeParams):
        megatron_to_hf.quantize_params = QuantizeParams(megatron_to_hf.quantize_params)
    hf_to_megatron._LOADERS["minimax_m2"] = hf_tensor
