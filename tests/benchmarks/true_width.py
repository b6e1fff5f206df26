"""A checkpoint of true width, made fast: random codes, no model that says anything."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from bridge.huggingface.writer import TensorPlan, finish_folder, plan_files, write_file
from reference.checkpoint import expected_tensors
from reference.config import ModelConfig
from reference.fp8 import FP8

TRUE_WIDTH = SMALL_CONFIG | {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 196608,
}


def few_layers(layers: int, experts: int = 256) -> dict[str, Any]:
    """The config of a checkpoint that is all layers: with a small vocabulary, two of them are 7.4 GB."""
    return TRUE_WIDTH | {"num_hidden_layers": layers, "num_local_experts": experts, "vocab_size": 8192}


def make(folder: Path, config: dict[str, Any]) -> None:
    """Write a checkpoint of random bytes, cut out of one block of them."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0x40  # no NaN
    noise = (0.02 * torch.randn(codes.numel() // 4, generator=generator)).abs() + 1e-4
    blocks = {FP8: codes.view(FP8), torch.bfloat16: noise.bfloat16(), torch.float32: noise}
    specs = expected_tensors(ModelConfig.from_hf(config))
    plans = {name: TensorPlan(_dtype(name, spec.dtypes), spec.shape) for name, spec in specs.items()}
    files = plan_files(({name: plan} for name, plan in plans.items()), max_shard_bytes=1 << 30)

    def bands(tensors: dict[str, TensorPlan]) -> Iterator[tuple[str, Tensor]]:
        for number, (name, plan) in enumerate(tensors.items()):
            block, (rows, *rest) = blocks[plan.dtype], plan.shape
            width = rest[0] if rest else 1
            step = min(rows, block.numel() // width)
            for start in range(0, rows, step):
                length = min(step, rows - start) * width
                offset = number * 4096 % (block.numel() - length + 1)
                yield name, block[offset : offset + length].view(-1, *rest)

    for file in files:
        write_file(folder, file, bands(file.tensors))
    finish_folder(folder, files, config)


def _dtype(name: str, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    if name.endswith(("gate.weight", "e_score_correction_bias")):
        return torch.float32
    return allowed[0]
