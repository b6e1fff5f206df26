"""Whether two checkpoints hold the same weights, whatever format each of them has: `minimax-m2 verify A B`.

Two tensors of one dtype are compared by their bytes, block scales of different dtypes by their values. Where only one
side is float8, it is dequantised to the other's dtype, and the values are compared, exactly. For weights that differ
the report says by how much.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint, same_bits
from bridge.huggingface.companions import companions
from bridge.huggingface.quantization import SECTION, without_quantization
from bridge.huggingface.safetensors_folder import CONFIG_NAME, SafetensorsFolder
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.workers import run_units
from bridge.proof.checkpoint import Checkpoint, open_checkpoint
from bridge.proof.reference_logits import random_tokens, reference_logits
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from reference.checkpoint import PLAIN_DTYPES, SCALE_SUFFIX
from reference.config import ModelConfig
from reference.fp8 import FP8
from reference.names import all_names
from reference.weights import Dialect

UNIT = 64  # weights that a worker takes at a time
FILE_PIECE_BYTES = 2**20
MTP_PIECE_BYTES = 256 * 2**20


class Difference(NamedTuple):
    """A weight or file that is not the same: the largest difference, and its root mean square over the left side's."""

    name: str
    what: str
    largest: float = float("nan")
    relative: float = float("inf")


class Comparison(NamedTuple):
    """`same_bytes` of the `tensors` are equal byte for byte, `same_values` in value; the rest differ.

    Equal in value are a weight that is float8 on one side, dequantised, and block scales of different dtypes.
    """

    tensors: int
    nbytes: int
    files: int
    same_bytes: int
    same_values: int
    differences: list[Difference]


class Pair(NamedTuple):
    """Two checkpoints of one model, and the weights that both have, by name."""

    left: Checkpoint
    right: Checkpoint
    names: list[str]


def open_pair(left: Path | str, right: Path | str) -> Pair:
    """Open two checkpoints, of either format.

    Raises:
        ValueError: a checkpoint is not whole, or they are models of different sizes.
    """
    paths = Path(left).resolve(), Path(right).resolve()
    known = next((HuggingFaceCheckpoint(path) for path in paths if (path / CONFIG_NAME).is_file()), None)
    one, other = (
        known if known and known.files.folder == path else open_checkpoint(path, known and known.config)
        for path in paths
    )
    names, others = (all_names(side.config, Dialect.HF_DISK) for side in (one, other))
    if names != others:
        raise ValueError(f"{paths[0]} and {paths[1]} are models of different sizes: {one.config}, {other.config}")
    carried = set(other.carried_tensors)
    return Pair(one, other, names + [name for name in one.carried_tensors if name in carried])


def compare_checkpoints(
    left: Path | str, right: Path | str, *, workers: int = 1, progress: Progress = no_progress
) -> Comparison:
    """Every weight, with its scales; what is carried along (MTP layers, files) where both sides are Hugging Face's.

    How tensors are spread over files is not part of a checkpoint's content and may differ. In a process group all ranks
    must call it, and share the work; without one each process compares everything.

    Raises:
        ValueError: a checkpoint is not whole, or they are models of different sizes.
    """
    return compare_pair(open_pair(left, right), workers=workers, progress=progress)


def compare_pair(pair: Pair, *, workers: int = 1, progress: Progress = no_progress) -> Comparison:
    """`compare_checkpoints` for two that are open."""
    units = range(-(-len(pair.names) // UNIT))
    reopen = partial(open_pair, pair.left.files.folder, pair.right.files.folder)
    verdicts = run_units(_compare_unit, pair, units, reopen=reopen, workers=workers, what="compare", progress=progress)
    found = [verdict for unit in verdicts for verdict in unit]
    differences = [verdict.difference for verdict in found if verdict.difference]
    files = 0
    left, right = pair.left.files, pair.right.files
    if isinstance(left, SafetensorsFolder) and isinstance(right, SafetensorsFolder):
        files, others = _compare_files(left, right)
        differences += others
    differences += _compare_trained_mtp(pair.left, pair.right)
    return Comparison(
        tensors=sum(verdict.tensors for verdict in found),
        nbytes=sum(verdict.nbytes for verdict in found),
        files=files,
        same_bytes=sum(verdict.same_bytes for verdict in found),
        same_values=sum(verdict.same_values for verdict in found),
        differences=sorted(differences, key=lambda one: -one.relative),
    )


class _Verdict(NamedTuple):
    tensors: int
    nbytes: int
    same_bytes: int
    same_values: int
    difference: Difference | None


def _compare_unit(pair: Pair, unit: int) -> list[_Verdict]:
    return [_compare(name, pair.left, pair.right) for name in pair.names[unit * UNIT : (unit + 1) * UNIT]]


def _compare(name: str, left: Checkpoint, right: Checkpoint) -> _Verdict:
    if left.shape(name) != right.shape(name):
        return _differs(name, f"shape {list(left.shape(name))} against {list(right.shape(name))}")
    dtypes = left.dtype(name), right.dtype(name)
    for side, dtype in zip((left, right), dtypes, strict=True):
        if not isinstance(side, HuggingFaceCheckpoint) and dtype not in PLAIN_DTYPES:  # the other kind is checked
            return _differs(name, f"{dtypes[0]} against {dtypes[1]}, expected bfloat16, float16 or float32 weights")
    quantized = [dtype == FP8 for dtype in dtypes]
    if all(quantized):
        stored = left.stored(name), right.stored(name)
        nbytes = sum(tensor.nbytes for tensor in stored[0])
        if all(same_bits(a, b) for a, b in zip(*stored, strict=True)):
            return _Verdict(2, nbytes, 2, 0, None)
        if same_bits(stored[0][0], stored[1][0]) and torch.equal(*(scales.to(torch.float32) for _, scales in stored)):
            return _Verdict(2, nbytes, 1, 1, None)
        values = [side.read_weight(name, dtype=torch.float32) for side in (left, right)]
        return _measured(name, *values, tensors=2, what="codes or scales differ")
    if not any(quantized) and dtypes[0] != dtypes[1]:
        return _differs(name, f"{dtypes[0]} against {dtypes[1]}")
    dtype = next(dtype for dtype in dtypes if dtype != FP8)
    values = [side.read_weight(name, dtype=dtype) for side in (left, right)]
    if same_bits(*values):
        return _Verdict(1, values[0].nbytes, int(not any(quantized)), int(any(quantized)), None)
    return _measured(name, *values, tensors=1, what="values differ")


def _measured(name: str, a: Tensor, b: Tensor, *, tensors: int, what: str) -> _Verdict:
    a64, b64 = a.double(), b.double()
    error = b64 - a64
    size = a64.square().mean().sqrt().item()
    largest, rms = error.abs().max().item(), error.square().mean().sqrt().item()
    share = (a64 != b64).double().mean().item()
    relative = rms / size if size else float("inf")
    difference = Difference(name, f"{what} in {share:.2%} of the elements", largest, relative)
    return _Verdict(tensors, a.nbytes, 0, 0, difference)


def _differs(name: str, what: str) -> _Verdict:
    return _Verdict(1, 0, 0, 0, Difference(name, what))


def _compare_trained_mtp(left: Checkpoint, right: Checkpoint) -> list[Difference]:
    """Trained multi-token-prediction layers of distributed checkpoints, which have no names in other formats."""
    sides = [one if isinstance(one, MegatronCheckpoint) else None for one in (left, right)]
    keys = [set(side.trained_mtp) if side else set() for side in sides]
    differences = _one_sided("trained MTP tensor", *keys)
    for key in sorted(keys[0] & keys[1]):
        assert sides[0] is not None
        assert sides[1] is not None
        described = [(side.files.dtype(key), side.files.shapes[key]) for side in sides if side]
        if described[0] != described[1]:
            differences.append(Difference(key, f"{described[0]} against {described[1]}"))
        elif not all(
            same_bits(*(side.files.read(key, start, shape) for side in sides if side))
            for start, shape in _pieces(described[0][1], described[0][0].itemsize)
        ):
            differences.append(Difference(key, "values differ"))
    return differences


def _pieces(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of parts of a tensor, of at most `MTP_PIECE_BYTES` each unless a row is larger."""
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:]) * itemsize
    if row <= MTP_PIECE_BYTES or len(shape) == 1:
        band = max(1, MTP_PIECE_BYTES // max(1, row))
        for start in range(0, shape[0], band):
            yield (start, *(0 for _ in shape[1:])), (min(band, shape[0] - start), *shape[1:])
        return
    for index in range(shape[0]):
        for start, part in _pieces(shape[1:], itemsize):
            yield (index, *start), (1, *part)


def _compare_files(left: SafetensorsFolder, right: SafetensorsFolder) -> tuple[int, list[Difference]]:
    """config.json and what is carried along, by bytes; tensors that one side has alone."""
    names = [{str(path) for path in companions(side.folder).carried} | {CONFIG_NAME} for side in (left, right)]
    weights = [{name for name in side.tensors if not name.endswith(SCALE_SUFFIX)} for side in (left, right)]
    differences = [*_one_sided("file", *names), *_one_sided("tensor", *weights)]
    shared = sorted(names[0] & names[1])
    for name in shared:
        same_model = name == CONFIG_NAME and _same_model(left.config_json, right.config_json)
        if not same_model and not _same_bytes(left.folder / name, right.folder / name):
            differences.append(Difference(name, "the files differ"))
    return len(shared), differences


def _same_bytes(left: Path, right: Path) -> bool:
    """Compared piece by piece: a file may be larger than memory."""
    with left.open("rb") as one, right.open("rb") as other:
        while piece := one.read(FILE_PIECE_BYTES):
            if other.read(FILE_PIECE_BYTES) != piece:
                return False
        return not other.read(1)


def _same_model(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether one side's config is the other's with its quantisation removed."""
    without = [
        {key: value for key, value in without_quantization(side).items() if key != SECTION} for side in (left, right)
    ]
    return bool(left.get(SECTION)) != bool(right.get(SECTION)) and without[0] == without[1]


@torch.no_grad()
def compare_logits(pair: Pair, tokens: str = "", *, seed: int = 0, progress: Progress = no_progress) -> float:
    """The reference model's logits in float32 on both sides' weights: the error's root mean square over the left's.

    `tokens` are ids, separated by blanks or commas; by default two random sequences of 64.

    Raises:
        ValueError: `tokens` are not ids of the vocabulary.
    """
    ids = _tokens(tokens, pair.left.config, seed)
    a, b = (
        reference_logits(side, ids, weight_dtype=torch.bfloat16, compute_dtypes=(torch.float32,), progress=progress)[0]
        for side in (pair.left, pair.right)
    )
    return ((b - a).square().mean().sqrt() / a.square().mean().sqrt()).item()


def _tokens(text: str, config: ModelConfig, seed: int) -> Tensor:
    if not text.strip():
        return random_tokens(config, seed=seed)
    words = text.replace(",", " ").split()
    bad = [word for word in words if not word.isdecimal() or int(word) >= config.vocab_size]
    if bad:
        raise ValueError(f"tokens: found {bad[0]!r}, expected ids from 0 to {config.vocab_size - 1}, such as '5 17 3'")
    return torch.tensor([[int(word) for word in words]])


def _one_sided(what: str, left: set[str], right: set[str]) -> list[Difference]:
    alone: list[tuple[str, Sequence[str]]] = [("left", sorted(left - right)), ("right", sorted(right - left))]
    return [Difference(name, f"{what} only on the {side}") for side, names in alone for name in names]
