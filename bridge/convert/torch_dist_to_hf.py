"""megatron-core `torch_dist` checkpoint -> Hugging Face, without a model or a GPU: `minimax-m2 export`.

A unit is one safetensors file. Its weights are read one parameter at a time, whatever layout they were saved from,
split into the on-disk tensors and, for FP8, encoded. With `scales="source"` a weight that equals the source's decoded
one (a float32 weight: decoded in float32, or rounded to bfloat16) is written with the source's own codes and scales;
one that differs keeps the source's scale wherever a block is untouched. With `scales="fresh"` every block gets a new
scale. Scales are written as float32, which holds those of narrower dtypes exactly. config.json, tokenizer and MTP
layers come from the source; without one, config.json and tokenizer are those that `minimax-m2 import` laid beside the
checkpoint.
"""

import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint, same_bits
from bridge.huggingface.companions import companions, say_left_behind
from bridge.huggingface.quantization import Quantization, StoragePlan, storage_plan, with_true_scale_format
from bridge.huggingface.read_json import read_object
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.huggingface.writer import (
    SHARD_BYTES,
    FilePlan,
    TensorPlan,
    finish_folder,
    folder_bytes,
    plan_files,
    replaces,
    write_file,
)
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import TorchrunRanks, is_rank_zero, raise_on_all_ranks
from bridge.jobs.resumable import Output, Work, run_resumable
from bridge.jobs.staging import unfinished
from bridge.jobs.target import check_apart, check_target, real_path
from bridge.torch_dist.checkpoint import MegatronCheckpoint, beside
from compiled.fp8 import dequantize_blockwise, quantize_blockwise, requantize_blockwise
from reference.checkpoint import PLAIN_DTYPES, SCALE_SUFFIX
from reference.dist_checkpoint import Entry
from reference.fp8 import FP8, possible_roundings

_log = logging.getLogger(__name__)
BAND_BYTES = 256 * 2**20  # of a large tensor, in memory at a time


class ExportJob(NamedTuple):
    """What is converted to what: everything that decides the output's bytes, and where it goes."""

    megatron: str
    out: str
    quantization: Quantization = "fp8"
    scales: Literal["source", "fresh"] = "source"
    source: str | None = None
    max_shard_bytes: int = SHARD_BYTES
    versions: tuple[tuple[str, int, int], ...] = ()  # (file, bytes, mtime_ns); export_checkpoint fills it in


class ExportSummary(NamedTuple):
    """What an export reads and writes (weights, index, config.json and what is carried along), and what became of them.

    `identical` ones have the source's codes, byte for byte, and its scales, which are float32 here whatever they are in
    the source; `requantised` ones do not, and `worst` is the one whose decoded value
    differs most from the weight, by `worst_error`: root mean square of the difference over that of the weight. Both
    counts are None where another process with the same job finished while this one waited. `mtp_tensors` are the
    source's, taken along; `trained_mtp` are those that the distributed checkpoint has, which are not converted.
    `reused` of the files with weights were finished by an earlier run; `left_behind` are names in the source's folder
    that belong to no model, `notes` what lies in its weights and is not read.
    """

    tensors: int
    bytes_read: int
    bytes_written: int
    files: int
    reused: int
    identical: int | None
    requantised: int | None
    worst: str
    worst_error: float
    notes: tuple[str, ...]
    mtp_tensors: int
    trained_mtp: int
    left_behind: tuple[str, ...]


class _Export(NamedTuple):
    """An export that is open: both checkpoints, and what will be written."""

    job: ExportJob
    megatron: MegatronCheckpoint
    source: HuggingFaceCheckpoint | None
    storage: StoragePlan
    config_json: dict[str, Any] | Path
    carried: dict[str, Path]
    left_behind: list[str]
    entries: dict[str, Entry]  # by the first on-disk tensor
    files: list[FilePlan]


@TorchrunRanks()
def export_checkpoint(
    job: ExportJob,
    *,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ExportSummary:
    """Convert `job.megatron` into `job.out`, whole or not at all; the same call again finishes an interrupted one.

    Under torchrun every rank calls it; without a process group they join for as long as it lasts.

    Raises:
        ValueError: a checkpoint is not whole or not MiniMax-M2's, `scales="source"` and there is no source, a weight is
            not finite, a file changed, or `out` is not fit.
        OSError: the disk is full, or a worker died; what was finished is kept.
    """
    if job.scales not in ("source", "fresh"):
        raise ValueError(f"scales must be 'source' or 'fresh', found {job.scales!r}")
    with raise_on_all_ranks():
        check_apart(job.out, [job.megatron, *([job.source] if job.source else [])])
        source = job.source and str(Path(job.source).resolve())
        megatron, out = str(Path(job.megatron).resolve()), str(real_path(job.out))
        opened = _open(job._replace(megatron=megatron, source=source, out=out, versions=()))
        if opened.source is not None and job.quantization == "fp8":
            config_json = with_true_scale_format(opened.config_json, opened.source, job.scales)
            opened = opened._replace(config_json=config_json)
        replaced = replaces(opened.carried) if overwrite else None
        if not unfinished(Path(out)):
            check_target(Path(out), replaces=replaced)
    if is_rank_zero():
        say_left_behind(opened.left_behind)
        _say_trained_mtp(opened)
    if dry_run:
        return _summary(opened, [], reused=0)
    work = Work(_open, _write_unit, opened.job, len(opened.files), Path(out))
    output = Output(partial(_complete, opened), replaced)
    done = run_resumable(work, opened, output, workers=workers, what="export", progress=progress)
    counts = None if done.results is None else [_Count(*result) for result in done.results]
    return _summary(opened, counts, reused=done.reused)


def _complete(opened: _Export, folder: Path, _: list[Any]) -> None:
    finish_folder(folder, opened.files, opened.config_json, carried=opened.carried)


def _say_trained_mtp(opened: _Export) -> None:
    """Weights that were trained and are not in the output are never dropped without a word."""
    if trained := opened.megatron.trained_mtp:
        kept = len(opened.source.mtp_tensors) if opened.source else 0
        _log.warning(
            "not converted: %d trained tensors of multi-token-prediction layers (%s, ...), which have no names in a "
            "Hugging Face checkpoint here; %s",
            len(trained),
            trained[0],
            f"the source's {kept} MTP tensors are written instead" if kept else "no MTP tensors are written",
        )


def _summary(opened: _Export, counts: "list[_Count] | None", *, reused: int) -> ExportSummary:
    """`counts` is None where another process finished, and kept its counts."""
    known = counts is not None
    worst = max(counts or [], key=lambda count: count.worst_error, default=_Count(0, 0, "", 0.0))
    nbytes, files = folder_bytes(opened.files, opened.config_json, carried=opened.carried)
    return ExportSummary(
        tensors=sum(len(file.tensors) for file in opened.files),
        bytes_read=opened.megatron.nbytes,
        bytes_written=nbytes,
        files=files,
        reused=reused,
        identical=sum(count.identical for count in counts) if known else None,
        requantised=sum(count.requantised for count in counts) if known else None,
        worst=worst.worst,
        worst_error=worst.worst_error,
        notes=tuple(opened.source.files.notes) if opened.source else (),
        mtp_tensors=len(opened.source.mtp_tensors) if opened.source else 0,
        trained_mtp=len(opened.megatron.trained_mtp),
        left_behind=tuple(opened.left_behind),
    )


# ------------------------------------------------------------------------------------------------------------ planning


def _open(job: ExportJob) -> _Export:
    """Open both checkpoints; a job that names their versions wants exactly these."""
    source = None if job.source is None else HuggingFaceCheckpoint(job.source)
    megatron = MegatronCheckpoint(job.megatron, source and source.config)
    versions = _versions(megatron, source)
    if job.versions and versions != job.versions:
        raise ValueError(f"{job.megatron}: its files, or the source's, changed since the export began; start again")
    if job.quantization == "fp8" and job.scales == "source" and not (source and source.quantized):
        raise ValueError(
            f"{job.megatron}: scales 'source' needs the FP8 checkpoint that the weights came from; give source, or ask "
            "for fresh scales"
        )
    folder = source.files.folder if source else beside(megatron.files)
    raw, others = read_object(folder / CONFIG_NAME), companions(folder)
    storage = storage_plan(raw, job.quantization, source.quantized if source else frozenset())
    groups = [_group(entry, megatron, source, storage) for entry in megatron.entries]
    kept: list[str] = []
    if source is not None:
        kept = source.carried_tensors
        groups += [{name: TensorPlan(source.dtype(name), source.shape(name))} for name in kept]
    files = plan_files(groups, max_shard_bytes=job.max_shard_bytes)
    storage.check(files, set(kept))
    return _Export(
        job._replace(versions=versions),
        megatron,
        source,
        storage,
        folder / CONFIG_NAME if storage.config_json == raw else storage.config_json,
        {str(path): folder / path for path in others.carried},
        others.left_behind,
        {entry.parameter.sources[0]: entry for entry in megatron.entries},
        files,
    )


def _versions(megatron: MegatronCheckpoint, source: HuggingFaceCheckpoint | None) -> tuple[tuple[str, int, int], ...]:
    if source:
        return (*megatron.files.versions, *source.files.versions)
    config = (beside(megatron.files) / CONFIG_NAME).stat()
    return (*megatron.files.versions, (CONFIG_NAME, config.st_size, config.st_mtime_ns))


def _group(
    entry: Entry, megatron: MegatronCheckpoint, source: HuggingFaceCheckpoint | None, storage: StoragePlan
) -> dict[str, TensorPlan]:
    """The on-disk tensors of one parameter, with the source's dtypes where there is one."""
    group: dict[str, TensorPlan] = {}
    for name in entry.parameter.sources:
        if (dtype := megatron.dtype(name)) not in PLAIN_DTYPES:
            raise ValueError(
                f"{entry.key}: found {dtype} in {megatron.files.folder}, expected one of "
                f"{', '.join(map(str, PLAIN_DTYPES))}; save the model's weights as floating-point numbers"
            )
        group |= storage.stored_tensors(name, megatron.shape(name), (source or megatron).dtype(name))
    return group


# ------------------------------------------------------------------------------------------------------------- writing


class _Count(NamedTuple):
    identical: int
    requantised: int
    worst: str
    worst_error: float


def _write_unit(opened: _Export, unit: int, folder: Path) -> tuple[list[str], _Count]:
    tally, file = _Tally(opened), opened.files[unit]
    write_file(folder, file, tally.tensors(file))
    return [file.file], tally.count


class _Tally:
    """Makes the tensors of one file, and counts what became of the quantised ones."""

    def __init__(self, opened: _Export):
        self._opened = opened
        self._carried = set(opened.source.carried_tensors) if opened.source else set()
        self.count = _Count(0, 0, "", 0.0)

    def tensors(self, file: FilePlan) -> Iterator[tuple[str, Tensor]]:
        opened = self._opened
        for name, wanted in file.tensors.items():
            if name in self._carried:
                assert opened.source is not None
                yield name, opened.source.files.read(name)
            elif wanted.dtype == FP8:
                codes, scale_inv = self._encode(name, opened.megatron.read_weight(name))
                yield name, codes
                yield name + SCALE_SUFFIX, scale_inv
            elif name in opened.entries and len(opened.entries[name].parameter.sources) == 1:
                yield from self._bands(name, opened.entries[name], wanted)
            elif not name.endswith(SCALE_SUFFIX):
                yield name, opened.megatron.read_weight(name).to(wanted.dtype)

    def _bands(self, name: str, entry: Entry, wanted: TensorPlan) -> Iterator[tuple[str, Tensor]]:
        """A weight in bands of rows: the embedding is larger than the memory this may take."""
        rows, *cols = entry.parameter.shape
        band = max(1, BAND_BYTES // (4 * math.prod(cols)))
        for start in range(0, rows, band):
            yield name, self._opened.megatron.read_rows(entry, start, min(start + band, rows)).to(wanted.dtype)

    def _encode(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        source, config = self._opened.source, self._opened.storage.config
        assert config.quantization is not None
        size, scale_fmt = config.block_size, config.quantization.scale_fmt
        decode = partial(dequantize_blockwise, block_size=size, name=name)
        if source is not None and source.dtype(name) == FP8 and self._opened.job.scales == "source":
            stored = codes, scale_inv = source.files.read(name), source.read_scales(name)
            roundings = (decode(*stored, dtype=dtype) for dtype in possible_roundings(weight.dtype))
            if not any(same_bits(decoded.to(weight.dtype), weight) for decoded in roundings):
                codes, scale_inv = requantize_blockwise(
                    weight, scale_inv, block_size=size, scale_fmt=scale_fmt, name=name
                )
            if same_bits(codes, stored[0]) and same_bits(scale_inv, stored[1]):
                self.count = self.count._replace(identical=self.count.identical + 1)
                return codes, scale_inv
        else:
            codes, scale_inv = quantize_blockwise(weight, block_size=size, scale_fmt=scale_fmt, name=name)
        self._count_error(name, decode(codes, scale_inv, dtype=weight.dtype), weight)
        return codes, scale_inv

    def _count_error(self, name: str, decoded: Tensor, weight: Tensor) -> None:
        size, off = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (weight, decoded - weight))
        error = (off / size).item() if size > 0 else 0.0  # the difference of neighbours is exact
        worse = {"worst": name, "worst_error": error} if error >= self.count.worst_error else {}
        self.count = self.count._replace(requantised=self.count.requantised + 1, **worse)
