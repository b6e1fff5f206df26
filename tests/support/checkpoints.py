"""Small FP8 checkpoints, and ways to damage them."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from bridge.huggingface.safetensors_folder import INDEX_NAME

# Names of weights of each kind, and what makes the name of a weight that of its scales.
Q = "model.layers.1.self_attn.q_proj.weight"
W2 = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
GATE = "model.layers.0.block_sparse_moe.gate.weight"
SCALE = "_scale_inv"

# Sizes that are no multiples of the block: every quantised matrix has edge blocks.
EDGY_CONFIG = {
    **SMALL_CONFIG,
    "vocab_size": 131,
    "hidden_size": 160,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "rotary_dim": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "some_key_from_the_future": {"kept": [1, None, "two"]},
}


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors as a dictionary and store them as one file with a matching index."""
    tensors = all_tensors(folder)
    change(tensors)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "only.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "only.safetensors")}
    (folder / INDEX_NAME).write_text(json.dumps(index))
