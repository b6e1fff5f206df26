"""A checkpoint whose slices start and end inside blocks, and models of it that lie on several ranks."""

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from reference.fp8 import dequantize_blockwise
from reference.parallelism import Parallelism
from support.checkpoints import SCALE, all_tensors

CONFIG = SMALL_CONFIG | {
    "vocab_size": 131,
    "hidden_size": 320,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "rotary_dim": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


class Truth(NamedTuple):
    """What a folder holds: its tensors as they are, and under their names what they stand for."""

    disk: dict[str, Tensor]
    whole: dict[str, Tensor]


@cache
def truth_of(folder: str) -> Truth:
    """By safetensors and `reference.fp8`; a rank reads it once."""
    disk = all_tensors(Path(folder))
    whole = {
        name: dequantize_blockwise(value, disk[name + SCALE]) if name + SCALE in disk else value
        for name, value in disk.items()
        if not name.endswith(SCALE)
    }
    return Truth(disk, whole)


def groups_of(layout: Parallelism) -> AbstractContextManager[None]:
    """megatron-core's process groups of a layout, on all ranks."""
    from bridge.model import process_groups

    return process_groups.groups_of(layout)
