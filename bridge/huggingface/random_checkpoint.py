"""Makes MiniMax-M2 checkpoints with random weights: real names, real dtypes, FP8 blocks, several files.

Weights are drawn at 1/sqrt(fan-in), so that activations keep their size through any number of layers; norms around 1;
the router's bias is large enough to change which experts are chosen.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.huggingface.quantization import FP8_SECTION, StoragePlan, storage_plan
from bridge.huggingface.writer import SHARD_BYTES, FilePlan, TensorPlan, finish_folder, plan_files, write_file
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.staging import Staging
from reference.checkpoint import SCALE_SUFFIX, TensorSpec, expected_tensors
from reference.config import ModelConfig
from reference.fp8 import FP8, quantize_blockwise
from reference.names import parse
from reference.weights import Dialect

# In the released files' dialect, with keys that the model does not need, as those files have them.
SMALL_CONFIG: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "dtype": "bfloat16",
    "vocab_size": 1024,
    "hidden_size": 384,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "rope_theta": 5000000,
    "max_position_embeddings": 4096,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "shared_intermediate_size": 0,
    "tie_word_embeddings": False,
    "use_mtp": True,
    "num_mtp_modules": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "quantization_config": FP8_SECTION,
}

CARRIED_FILES: dict[str, str] = {
    "generation_config.json": json.dumps({"do_sample": True, "temperature": 1.0, "top_p": 0.95}),
    "tokenizer_config.json": json.dumps({"model_max_length": 4096}),
    "chat_template.jinja": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
}


def make_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    mtp_layers: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    carried: Mapping[str, str] = CARRIED_FILES,
    progress: Progress = no_progress,
) -> None:
    """Write a checkpoint of random weights for a config.json; the same seed gives the same bytes.

    `mtp_layers` adds small layers past `num_hidden_layers`, as checkpoints with multi-token prediction have; `carried`
    are the texts of the files beside the weights.

    Raises:
        ValueError: the config is not a MiniMax-M2's, or `folder` is not empty.
    """
    model = ModelConfig.from_hf(config)
    storage = storage_plan(config, "none" if model.quantization is None else "fp8")
    generator = torch.Generator().manual_seed(seed)
    specs = expected_tensors(model).items()
    groups = [_group(name, spec, storage) for name, spec in specs if not name.endswith(SCALE_SUFFIX)]
    for layer in range(model.num_hidden_layers, model.num_hidden_layers + mtp_layers):
        for name in ("enorm.weight", "hnorm.weight"):
            groups.append({f"model.layers.{layer}.{name}": TensorPlan(torch.bfloat16, (model.hidden_size,))})
    files = plan_files(groups, max_shard_bytes=max_shard_bytes)
    with Staging(folder, inputs=None) as staging:
        for file in progress(files, "make checkpoint", len(files)):
            write_file(staging.folder, file, _tensors(file, model, generator))
        beside = {name: text.encode() for name, text in carried.items()}
        finish_folder(staging.folder, files, config, carried=beside)
        staging.publish()


def _group(name: str, spec: TensorSpec, storage: StoragePlan) -> dict[str, TensorPlan]:
    plain = parse(name, Dialect.HF_DISK, storage.config).row.plain_dtype(torch.bfloat16)
    return storage.stored_tensors(name, spec.shape, plain)


def _tensors(file: FilePlan, model: ModelConfig, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, plan in file.tensors.items():
        if name.endswith(SCALE_SUFFIX):
            continue  # comes with its weight
        value = _random(name, plan.shape, generator)
        if plan.dtype != FP8:
            yield name, value.to(plan.dtype)
            continue
        assert model.quantization is not None
        block_size, scale_fmt = model.quantization.block_size, model.quantization.scale_fmt
        weight, scale_inv = quantize_blockwise(value, block_size=block_size, scale_fmt=scale_fmt, name=name)
        yield name, weight
        yield name + SCALE_SUFFIX, scale_inv


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.1 * noise
    if name.endswith("norm.weight"):  # also enorm and hnorm
        return 1 + 0.1 * noise
    if name.endswith("embed_tokens.weight"):
        return noise
    return noise / math.sqrt(shape[-1])
