"""Hugging Face -> megatron-core `torch_dist` checkpoint, without a model or a GPU: `minimax-m2 import`.

It is one of a `GPTModel` or of a `HybridModel`. The source may be a `torch_dist` checkpoint too, of either class and
saved at whatever layout: its weights are written again, under the keys of the class that is asked for. The optimizer's
state is left out then.

Weights are read, dequantised and written one chunk at a time (`CHUNK_BYTES`), in units of `unit_bytes`: a unit is one
file of the checkpoint, and what an interrupted run is taken up by. The folder that results is what Megatron-LM loads
for fine-tuning (`--load OUT --finetune --ckpt-format torch_dist`): tracker file, iteration folder, training arguments.
What megatron-core has no place for (config.json, tokenizer) is laid beside, in `hugging_face/`, for the way back; MTP
layers and tensors that nothing needs are left out, so the way back takes them from the source. A folder of
Megatron-LM's that is there already gains an iteration, which has `hugging_face/` inside it.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.convert.import_source import Source, counts, open_source
from bridge.convert.training_arguments import common_state
from bridge.formats import FORMAT_NAME
from bridge.huggingface.companions import Companions, companions, say_left_behind
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.jobs.durable import copy_file, footprint, json_bytes, write_bytes
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import TorchrunRanks, is_rank_zero, raise_on_all_ranks
from bridge.jobs.resumable import Output, Work, run_resumable
from bridge.jobs.staging import unfinished
from bridge.jobs.target import check_apart, check_target, real_path
from bridge.torch_dist.checkpoint import HF_FOLDER, MegatronCheckpoint
from bridge.torch_dist.reader import TRACKER
from bridge.torch_dist.writer import (
    Chunk,
    Stored,
    finish,
    metadata_files,
    plan_chunks,
    plan_states,
    write_chunks,
    write_states,
)
from reference.dist_checkpoint import Entry, entries
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.sharding import Piece, rows_of
from reference.weights import CHECKPOINT_DIALECTS

CHUNK_BYTES = 64 * 2**20
UNIT_BYTES = 512 * 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WRITTEN_BY = "minimax_m2.json"  # in an iteration that an import wrote


class ImportJob(NamedTuple):
    """What is converted to what: everything that decides the output's bytes, and where it goes."""

    source: str
    out: str
    dtype: str | None = None  # None: bf16, or what a torch_dist source has
    iteration: int = 1
    unit_bytes: int = UNIT_BYTES
    model: str = DEFAULT_MODEL
    hugging_face: str | None = None  # with the config.json of a torch_dist source that has none beside it
    # import_checkpoint fills these in: whether `out` is a Megatron-LM folder that gains an iteration, and what of the
    # source was read (file, bytes, mtime_ns)
    adds: bool = False
    source_versions: tuple[tuple[str, int, int], ...] = ()

    @property
    def iteration_folder(self) -> str:
        """Megatron-LM's name for it."""
        return f"iter_{self.iteration:07d}"

    def staged_iteration(self, staged: Path) -> Path:
        """Where the iteration lies in what is put in place: below a new folder, or all of it."""
        return staged if self.adds else staged / self.iteration_folder


class ImportSummary(NamedTuple):
    """What an import reads and writes: weights, metadata, and the files of Hugging Face beside them.

    Of the `tensors`, MTP and unneeded ones are left out, and so are the `other_tensors` that a `torch_dist` source has
    besides the model: the optimizer's state. `reused` of the files with weights were finished by an earlier
    run. `notes` says what lies in the source's weights and is not read; `left_behind` are names in its folder that
    belong to no model.
    """

    tensors: int
    mtp_tensors: int
    unneeded_tensors: int
    other_tensors: int
    bytes_read: int
    bytes_written: int
    files: int
    reused: int
    notes: tuple[str, ...]
    left_behind: tuple[str, ...]


class _Part(NamedTuple):
    chunk: Chunk
    pieces: tuple[Piece, ...]


class _Import(NamedTuple):
    """An import that is open: the source, the folder of its config.json, what else that holds, each unit's chunks."""

    job: ImportJob
    source: Source
    config_folder: Path
    others: Companions
    units: list[list[_Part]]

    @property
    def chunks(self) -> list[Chunk]:
        return [part.chunk for unit in self.units for part in unit]

    @property
    def common_state(self) -> dict[str, Any]:
        """What Megatron-LM keeps beside the weights."""
        dtype = self.chunks[0].dtype  # the embedding's
        return common_state(self.source.config, self.model, dtype, self.job.iteration)

    @property
    def model(self) -> ModelClass:
        """The class whose checkpoint is written."""
        return ModelClass(self.job.model)

    @property
    def laid_beside(self) -> list[Path]:
        """The files of Hugging Face that go into the output, relative to `config_folder`."""
        return [Path(CONFIG_NAME), *self.others.carried]


@TorchrunRanks()
def import_checkpoint(
    job: ImportJob,
    *,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ImportSummary:
    """Convert `job.source` into `job.out`, whole or not at all; the same call again finishes an interrupted one.

    Under torchrun every rank calls it; without a process group they join for as long as it lasts.

    Raises:
        ValueError: the source is not a whole MiniMax-M2, a tensor is damaged or a file changed, or `out` is not fit.
        OSError: the disk is full, or a worker died; what was finished is kept.
    """
    with raise_on_all_ranks():
        job = _checked(job)
        out = Path(job.out)
        if job.adds:
            _check_iteration(out, job, overwrite=overwrite)
        elif not unfinished(out):
            check_target(out)
        opened = _open(job)
    if is_rank_zero():
        say_left_behind(opened.others.left_behind)
    if dry_run:
        return _summary(opened, *_planned(opened))
    target = out / job.iteration_folder if job.adds else out
    work = Work(_open, _write_unit, opened.job, len(opened.units) + 1, target)
    output = Output(partial(_complete, opened))
    if job.adds:
        point_to_it = partial(write_bytes, out / TRACKER, _tracker(job))
        output = output._replace(replaces=_is_of_an_import, then=point_to_it)
    done = run_resumable(work, opened, output, workers=workers, what="import", progress=progress)
    nbytes, files = footprint(target, *([out / TRACKER] if job.adds else []))
    return _summary(opened, nbytes, files, reused=done.reused)


def _checked(job: ImportJob) -> ImportJob:
    """The job with its paths and what is known of its target; the source is not opened.

    Raises:
        ValueError: an argument is none of its choices, or the output is not apart from what is read.
    """
    if job.dtype is not None and job.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)} or None, found {job.dtype!r}")
    if job.iteration < 1:
        raise ValueError(f"iteration must be at least 1, as Megatron-LM asks, found {job.iteration}")
    check_apart(job.out, [job.source, *([job.hugging_face] if job.hugging_face else [])])
    out = real_path(job.out)
    return job._replace(
        source=str(Path(job.source).resolve()),
        hugging_face=job.hugging_face and str(Path(job.hugging_face).resolve()),
        model=str(ModelClass(job.model)),
        out=str(out),
        adds=(out / TRACKER).is_file() and not unfinished(out),
        source_versions=(),
    )


def _is_of_an_import(name: str) -> bool:
    """Whether an import writes a file of this name into an iteration."""
    own = (".metadata", FORMAT_NAME, WRITTEN_BY)
    return name in own or name.endswith(".distcp") or name.startswith(f"{HF_FOLDER}/")


def _check_iteration(out: Path, job: ImportJob, *, overwrite: bool) -> None:
    """A Megatron-LM folder that is there gains an iteration and loses none, but for one that an import wrote.

    Raises:
        ValueError: nobody asked for that, or the iteration is there and is not an import's.
    """
    if not overwrite:
        raise ValueError(
            f"{out}: is not empty but a Megatron-LM folder; overwrite adds iteration {job.iteration} to it and leaves "
            "the others as they are; or give another folder"
        )
    folder = out / job.iteration_folder
    if folder.exists() and not (folder / WRITTEN_BY).is_file():
        raise ValueError(
            f"{folder}: was not written by an import, so it stays; give another iteration, or write elsewhere"
        )


def _open(job: ImportJob) -> _Import:
    """Open the source; a job that names its versions wants exactly these."""
    source, config_folder = open_source(Path(job.source), Path(job.hugging_face) if job.hugging_face else None)
    if job.source_versions and source.files.versions != job.source_versions:
        raise ValueError(
            f"{job.source}: its files changed since the import began; start again once nothing writes there"
        )
    units: list[list[_Part]] = []
    room = 0
    for entry in entries(source.config, dialect=CHECKPOINT_DIALECTS[ModelClass(job.model)][0]):
        for part in _parts(entry, _dtype(source, entry, job)):
            if not units or part.chunk.nbytes > room:
                units.append([])
                room = job.unit_bytes
            units[-1].append(part)
            room -= part.chunk.nbytes
    job = job._replace(source_versions=source.files.versions)
    return _Import(job, source, config_folder, companions(config_folder), units)


def _dtype(source: Source, entry: Entry, job: ImportJob) -> torch.dtype:
    if job.dtype is None and isinstance(source, MegatronCheckpoint):
        return source.dtype(entry.parameter.sources[0])
    return entry.row.plain_dtype(DTYPES[job.dtype or "bf16"])


def _summary(opened: _Import, nbytes: int, files: int, *, reused: int = 0) -> ImportSummary:
    left_behind = tuple(opened.others.left_behind)
    return ImportSummary(
        **counts(opened.source), bytes_written=nbytes, files=files, reused=reused, left_behind=left_behind
    )


def _planned(opened: _Import) -> tuple[int, int]:
    """Bytes and files that will be written."""
    job, config, units = opened.job, opened.source.config, opened.units
    stored = [item for unit, parts in enumerate(units) for item in plan_chunks(unit, [part.chunk for part in parts])]
    stored += plan_states(len(units), config, opened.common_state, opened.model)
    small = [*metadata_files(opened.chunks, stored).values(), _written_by(job), _tracker(job)]
    nbytes = sum(item.nbytes for item in stored) + sum(map(len, small))
    nbytes += sum((opened.config_folder / path).stat().st_size for path in opened.laid_beside)
    return nbytes, len(units) + 1 + len(small) + len(opened.laid_beside)


def _written_by(job: ImportJob) -> bytes:
    return json_bytes({"written_by": "minimax-m2 import", "dtype": job.dtype, "model": job.model})


def _tracker(job: ImportJob) -> bytes:
    return str(job.iteration).encode()


def _parts(entry: Entry, dtype: torch.dtype) -> Iterator[_Part]:
    """Bands of rows of at most CHUNK_BYTES, or single rows."""
    rows, *cols = entry.parameter.shape
    band = max(1, CHUNK_BYTES // (math.prod(cols) * dtype.itemsize))
    for start in range(0, rows, band):
        stop = min(start + band, rows)
        chunk = Chunk(
            key=entry.key,
            start=(*entry.index, start, *(0 for _ in cols)),
            shape=(*(1 for _ in entry.index), stop - start, *cols),
            whole=entry.shape,
            dtype=dtype,
        )
        yield _Part(chunk, tuple(rows_of(entry.parameter.pieces, start, stop)))


def _write_unit(opened: _Import, unit: int, folder: Path) -> tuple[list[str], list[Stored]]:
    target = opened.job.staged_iteration(folder)
    target.mkdir(exist_ok=True)
    if unit == len(opened.units):
        stored = write_states(target, unit, opened.source.config, opened.common_state, opened.model)
    else:
        parts = [(part.chunk, partial(_value, opened.source, part)) for part in opened.units[unit]]
        stored = write_chunks(target, unit, parts)
    files = sorted({(target / item.file).relative_to(folder).as_posix() for item in stored})
    return files, stored


def _value(source: Source, part: _Part) -> Tensor:
    out = torch.empty(part.chunk.shape, dtype=part.chunk.dtype)
    axes = 1 if part.pieces[0].cols is None else 2
    source.read_pieces(part.pieces, out.view(part.chunk.shape[-axes:]))
    return out


def _complete(opened: _Import, folder: Path, results: list[list[Any]]) -> None:
    """What makes the folder a checkpoint: metadata, the files of Hugging Face, and last the tracker."""
    target = opened.job.staged_iteration(folder)
    finish(target, opened.chunks, [Stored(*item) for stored in results for item in stored])
    write_bytes(target / WRITTEN_BY, _written_by(opened.job))
    for path in opened.laid_beside:
        copy = folder / HF_FOLDER / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy_file(opened.config_folder / path, copy)
    if not opened.job.adds:
        write_bytes(folder / TRACKER, _tracker(opened.job))
