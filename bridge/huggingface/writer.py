"""Hugging Face checkpoint files: which tensor goes into which file, and one file written as a stream.

The plan follows from names, dtypes and shapes alone, so several processes can write different files of one checkpoint,
and a run that was killed writes the same files again. A file's header is known before its first tensor: tensors are
written one after the other, and memory holds one of them. `finish_folder` adds what makes the folder a checkpoint; the
index comes last. Where the folder stands and when it appears is `bridge.jobs.staging`'s.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from bridge.huggingface.regular_files import stays_inside
from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME, SHARD_SUFFIX, SINGLE_NAME
from bridge.huggingface.safetensors_header import DTYPES
from bridge.jobs.durable import copy_file, json_bytes, write_bytes

SHARD_BYTES = 2 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class TensorPlan(NamedTuple):
    """What a tensor will be on disk."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FilePlan(NamedTuple):
    """One safetensors file and its tensors, in the order in which they are written."""

    file: str
    tensors: dict[str, TensorPlan]

    @property
    def nbytes(self) -> int:
        """Of the file, header included."""
        return len(_header(self)) + sum(tensor.nbytes for tensor in self.tensors.values())


def plan_files(groups: Iterable[Mapping[str, TensorPlan]], *, max_shard_bytes: int = SHARD_BYTES) -> list[FilePlan]:
    """Fill files up in order. A group's tensors stay in one file; it has a file to itself if it is larger than one.

    Raises:
        ValueError: a name comes twice, safetensors has no such dtype, or there is no tensor.
    """
    files: list[dict[str, TensorPlan]] = []
    seen: set[str] = set()
    room = 0
    for group in groups:
        for name, plan in group.items():
            if name in seen:
                raise ValueError(f"{name}: planned twice; a tensor belongs in one file")
            if plan.dtype not in _NAMES:
                raise ValueError(f"{name}: is {plan.dtype}, expected one of {', '.join(map(str, _NAMES))}")
            seen.add(name)
        nbytes = sum(plan.nbytes for plan in group.values())
        if not files or nbytes > room:
            files.append({})
            room = max_shard_bytes
        files[-1].update(group)
        room -= nbytes
    if not seen:
        raise ValueError("no tensor to write; a checkpoint holds at least one")
    return [
        FilePlan(f"model-{number:05d}-of-{len(files):05d}{SHARD_SUFFIX}", tensors)
        for number, tensors in enumerate(files, 1)
    ]


def write_file(folder: Path, plan: FilePlan, tensors: Iterable[tuple[str, Shaped[Tensor, "..."]]]) -> None:
    """Write the planned tensors, which come in the plan's order; the file appears once it is on the disk.

    A tensor may come in bands: several in a row under one name, whose rows add up to the planned ones.

    Raises:
        ValueError: a tensor comes out of order, is missing, or is not as planned.
    """
    unnamed = folder / f".{plan.file}.tmp"  # the same for every process: what a killed one left is written over
    expected = iter(plan.tensors.items())
    current, left = "", 0
    try:
        with unnamed.open("wb") as file:
            file.write(_header(plan))
            for name, tensor in tensors:
                if left == 0:
                    current, wanted = next(expected, ("nothing more", TensorPlan(tensor.dtype, ())))
                    left = wanted.nbytes
                found = TensorPlan(tensor.dtype, tuple(tensor.shape))
                fits = found.dtype == wanted.dtype and found.shape[1:] == wanted.shape[1:] and found.nbytes <= left
                if name != current or not fits:
                    raise ValueError(_not_as_planned(plan, name, found, current, wanted))
                left -= found.nbytes
                data = tensor.detach().to("cpu").contiguous()
                if data.numel():
                    file.write(memoryview(data.view(-1).view(torch.uint8).numpy()))
            missing = current if left else next(expected, (None,))[0]
            if missing is not None:
                raise ValueError(f"{plan.file}: {missing} was planned and did not come whole")
            file.flush()
            os.fsync(file.fileno())
        unnamed.rename(folder / plan.file)
    finally:
        unnamed.unlink(missing_ok=True)


def _not_as_planned(plan: FilePlan, name: str, found: TensorPlan, wanted_name: str, wanted: TensorPlan) -> str:
    return (
        f"{plan.file}: found {name} as {found.dtype} {list(found.shape)}, expected {wanted_name} as {wanted.dtype} "
        f"{list(wanted.shape)}; tensors are written as they were planned"
    )


def replaces(names: Iterable[str]) -> Callable[[str], bool]:
    """Of an existing checkpoint's files those that a new one takes the place of: its weights, and what it has too.

    `names` are the new one's files besides weights, config and index.
    """
    known = {CONFIG_NAME, INDEX_NAME, SINGLE_NAME, *names}
    return lambda name: name in known or _SHARD.fullmatch(name) is not None


def finish_folder(
    folder: Path,
    files: list[FilePlan],
    config: dict[str, Any] | Path,
    *,
    carried: Mapping[str, Path | bytes] | None = None,
) -> None:
    """Add the `carried` files (name: bytes, or where they are), config.json (a path: that file), and last the index.

    Raises:
        ValueError: a carried file's name leaves the folder or is one that is written here, or it is no regular file; or
            a planned file is not there with the size that was planned.
    """
    for name, source in (carried or {}).items():
        path = Path(name)
        if not stays_inside(name) or name in (CONFIG_NAME, INDEX_NAME) or path.suffix == SHARD_SUFFIX:
            raise ValueError(
                f"{folder}: cannot carry a file as {name!r}; expected a path inside the checkpoint other than "
                f"{CONFIG_NAME}, {INDEX_NAME} and *{SHARD_SUFFIX}, which are written here"
            )
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            write_bytes(folder / path, source)
        else:
            copy_file(source, folder / path)
    if isinstance(config, Path):
        copy_file(config, folder / f".{CONFIG_NAME}.tmp")
        (folder / f".{CONFIG_NAME}.tmp").rename(folder / CONFIG_NAME)
    else:
        write_bytes(folder / CONFIG_NAME, json_bytes(config))
    _check_sizes(folder, files)
    write_bytes(folder / INDEX_NAME, _index(files))


def folder_bytes(
    files: list[FilePlan], config: dict[str, Any] | Path, *, carried: Mapping[str, Path | bytes] | None = None
) -> tuple[int, int]:
    """Bytes and files of the folder that `finish_folder` completes."""
    others = [config if isinstance(config, Path) else json_bytes(config), _index(files), *(carried or {}).values()]
    nbytes = sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in others)
    return sum(plan.nbytes for plan in files) + nbytes, len(files) + len(others)


def _index(files: list[FilePlan]) -> bytes:
    weight_map = {name: plan.file for plan in files for name in plan.tensors}
    total = sum(plan.nbytes for file in files for plan in file.tensors.values())
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _check_sizes(folder: Path, files: list[FilePlan]) -> None:
    for plan in files:
        found = (folder / plan.file).stat().st_size if (folder / plan.file).is_file() else 0
        if found != plan.nbytes:
            raise ValueError(
                f"{folder / plan.file}: found {found:,} bytes, expected the {plan.nbytes:,} that were planned; write "
                "again"
            )


def _header(plan: FilePlan) -> bytes:
    """safetensors: the header's length, then JSON, filled up with blanks so that the data begin at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in plan.tensors.items():
        span = [offset, offset + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
