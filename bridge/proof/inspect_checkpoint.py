"""What a checkpoint is, from its config and headers alone: `minimax-m2 inspect`."""

from collections import Counter
from typing import NamedTuple

from bridge.huggingface.companions import companions, named
from bridge.huggingface.safetensors_folder import SafetensorsFolder
from reference.checkpoint import Contents, contents, parameter_count
from reference.config import ModelConfig
from reference.findings import pattern


class Inspection(NamedTuple):
    """Facts as (what, value) pairs; what is not read; and what is missing, unexpected or wrong, a line each."""

    facts: list[tuple[str, str]]
    notes: list[str]
    problems: list[str]


def inspect_checkpoint(files: SafetensorsFolder) -> Inspection:
    """Architecture, dtypes, sizes, quantisation; and how the tensors differ from what the config asks for.

    Raises:
        ValueError: config.json is not a MiniMax-M2's.
    """
    config = ModelConfig.from_hf(files.config_json)
    held, others = contents(files.header, config), companions(files.folder)
    facts = [
        ("model", f"{files.config_json['model_type']}, {parameter_count(config) / 1e9:.4g} B parameters"),
        ("layers", f"{config.num_hidden_layers}, hidden size {config.hidden_size}, vocabulary {config.vocab_size}"),
        (
            "attention",
            f"{config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of "
            f"{config.head_dim}, rotary on {config.rotary_dim} channels, theta {config.rope_theta:g}",
        ),
        (
            "experts",
            f"{config.num_local_experts} of width {config.intermediate_size}, top {config.num_experts_per_tok}",
        ),
        ("quantisation", _quantisation(config, held)),
        ("excluded from it", _excluded(config)),
        ("MTP layers", f"{len(held.mtp)} tensors, carried unchanged" if held.mtp else "none in the files"),
        *([("stacked", _stacked(held))] if held.views else []),
        *([("not needed", _unneeded(held))] if held.unneeded else []),
        (
            "files",
            f"{files.num_files} safetensors files, {len(files.tensors)} tensors, "
            f"{files.nbytes:,} bytes; {len(others.carried)} other files",
        ),
        *([("left behind", named(others.left_behind))] if others.left_behind else []),
        *_by_dtype(files),
    ]
    return Inspection(facts, files.notes, held.problems)


def _quantisation(config: ModelConfig, held: Contents) -> str:
    """What the files hold."""
    if held.quantized:
        return f"{len(held.quantized):,} weights in float8_e4m3fn, in blocks of {config.block_size}x{config.block_size}"
    return "none" if config.quantization is None else "none; config.json's quantization_config is left over"


def _excluded(config: ModelConfig) -> str:
    """What config.json says."""
    if config.quantization is None:
        return "config.json has no quantization_config"
    return ", ".join(config.quantization.modules_to_not_convert) or "nothing"


def _stacked(held: Contents) -> str:
    stacks = {view.source for view in held.views.values()}
    return (
        f"{len(stacks)} tensors as transformers has them in memory, read as {len(held.views):,} of the released names"
    )


def _unneeded(held: Contents) -> str:
    return f"{len(held.unneeded)} tensors, carried unchanged: {pattern(held.unneeded)}"


def _by_dtype(files: SafetensorsFolder) -> list[tuple[str, str]]:
    tensors, nbytes = Counter(), Counter()
    for info in files.tensors.values():
        tensors[info.dtype] += 1
        nbytes[info.dtype] += info.nbytes
    return [
        (str(dtype).removeprefix("torch."), f"{tensors[dtype]} tensors, {nbytes[dtype]:,} bytes")
        for dtype in sorted(tensors, key=lambda dtype: -nbytes[dtype])
    ]
