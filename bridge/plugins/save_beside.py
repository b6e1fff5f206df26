"""Saving a checkpoint into a folder that a trainer uses too, with its arguments, optimizer states and logs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME
from bridge.jobs.ranks import is_rank_zero, raise_on_all_ranks
from bridge.minimax_m2_bridge import MiniMaxM2Bridge

INCOMING = "incoming"  # the folder in the folder in which the checkpoint becomes whole


def save_beside(source: MiniMaxM2Bridge, model: nn.Module | Sequence[nn.Module], out: Path, **options: Any) -> None:
    """Save the model in `out`, beside what is there; all ranks must call it.

    The checkpoint becomes whole in a folder of its own inside `out` and is then moved, file by file, config and index
    last: until then `out` is not a checkpoint, or still has the old one's index. `options` are those of
    `MiniMaxM2Bridge.save_hf_pretrained`.

    Raises:
        ValueError, OSError: as `MiniMaxM2Bridge.save_hf_pretrained`; `out` is as it was then.
    """
    incoming = out / INCOMING
    with raise_on_all_ranks():
        out.mkdir(parents=True, exist_ok=True)
    source.save_hf_pretrained(model, incoming, overwrite=True, **options)
    with raise_on_all_ranks():
        if is_rank_zero():
            _move(incoming, out)


def _move(incoming: Path, out: Path) -> None:
    last = (CONFIG_NAME, INDEX_NAME)
    files = sorted(path.relative_to(incoming) for path in incoming.rglob("*") if not path.is_dir())
    for file in sorted(files, key=lambda file: last.index(file.name) if file.name in last else -1):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(incoming / file, out / file)
    for folder in sorted((path for path in incoming.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()
    incoming.rmdir()
