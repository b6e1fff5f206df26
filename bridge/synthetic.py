"""Makes MiniMax-M2 checkpoints with random weights: real names, real dtypes, FP8 blocks, several files.

Weights are drawn at 1/sqrt(fan-in), so that activations keep their size through any number of layers; norms around 1;
the router's bias is large enough to change which experts are chosen.
"""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from bridge.hf_writer import SHARD_BYTES, HFWriter
from bridge.minimax_m2_bridge import FP8_SECTION
from bridge.progress import Track, untracked
from reference.checkpoint import SCALE_SUFFIX, expected_tensors
from reference.config import ModelConfig
from reference.fp8 import FP8, quantize_blockwise

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

_FLOAT32 = ("gate.weight", "e_score_correction_bias")


def make_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    mtp_layers: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    track: Track = untracked,
) -> None:
    """Write a checkpoint of random weights for a config.json; the same seed gives the same bytes.

    `mtp_layers` adds small layers past `num_hidden_layers`, as checkpoints with multi-token prediction have.

    Raises:
        ValueError: the config is not a MiniMax-M2's, or `folder` is not empty.
    """
    model = ModelConfig.from_hf(config)
    generator = torch.Generator().manual_seed(seed)
    specs = expected_tensors(model)
    with HFWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        for name, spec in track(specs.items(), "make checkpoint", len(specs)):
            if name.endswith(SCALE_SUFFIX):
                continue  # written with its weight
            value = _random(name, spec.shape, generator)
            if spec.dtypes == (FP8,):
                assert model.quantization is not None
                weight, scale_inv = quantize_blockwise(value, block_size=model.quantization.block_size)
                writer.add(name, weight)
                writer.add(name + SCALE_SUFFIX, scale_inv)
            else:
                writer.add(name, value if name.endswith(_FLOAT32) else value.to(torch.bfloat16))
        for layer in range(model.num_hidden_layers, model.num_hidden_layers + mtp_layers):
            for name in ("enorm.weight", "hnorm.weight"):
                value = torch.randn(model.hidden_size, generator=generator)
                writer.add(f"model.layers.{layer}.{name}", value.to(torch.bfloat16))
        with TemporaryDirectory() as scratch:
            for name, text in CARRIED_FILES.items():
                source = Path(scratch, name)
                source.write_text(text)
                writer.add_file(source, name)
        writer.finish(config)


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.1 * noise
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("embed_tokens.weight"):
        return noise
    return noise / math.sqrt(shape[-1])
