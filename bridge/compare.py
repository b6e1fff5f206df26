"""Whether two Hugging Face checkpoints are the same, byte for byte."""

from typing import NamedTuple

import torch

from bridge.hf_files import CONFIG_NAME, HFCheckpoint
from bridge.progress import Track, untracked


class Comparison(NamedTuple):
    """What was compared and what differs; `differences` has a line for each tensor or file that is not the same."""

    tensors: int
    nbytes: int
    files: int
    differences: list[str]


def compare_checkpoints(left: HFCheckpoint, right: HFCheckpoint, *, track: Track = untracked) -> Comparison:
    """Every tensor by name, dtype, shape and bytes; every other file, and config.json, by bytes.

    How tensors are spread over safetensors files is not part of a checkpoint's content and may differ.
    """
    differences = _one_sided("tensor", set(left.tensors), set(right.tensors))
    common = [name for name in left.tensors if name in right.tensors]
    for name in track(common, "compare", len(common)):
        a, b = left.tensors[name], right.tensors[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            differences.append(f"{name}: {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
            continue
        bytes_a, bytes_b = (side.read(name).flatten().view(torch.uint8) for side in (left, right))
        if not torch.equal(bytes_a, bytes_b):
            differences.append(f"{name}: {int((bytes_a != bytes_b).sum())} of {a.nbytes} bytes differ")
    files = [{str(path) for path in side.carried_files()} | {CONFIG_NAME} for side in (left, right)]
    differences += _one_sided("file", *files)
    shared = sorted(files[0] & files[1])
    for path in shared:
        if (left.folder / path).read_bytes() != (right.folder / path).read_bytes():
            differences.append(f"{path}: the files differ")
    return Comparison(len(common), left.nbytes, len(shared), differences)


def _one_sided(what: str, left: set[str], right: set[str]) -> list[str]:
    return [f"{name}: {what} only on the left" for name in sorted(left - right)] + [
        f"{name}: {what} only on the right" for name in sorted(right - left)
    ]
