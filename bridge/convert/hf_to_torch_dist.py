"""Hugging Face -> megatron-core `torch_dist` checkpoint, without a model or a GPU: `minimax-m2 import`.

Weights are read, dequantised and written one chunk at a time (`CHUNK_BYTES`), in units of `unit_bytes`: a unit is one
file of the checkpoint, and what an interrupted run is taken up by. The folder that results is what Megatron-LM loads
for fine-tuning (`--load OUT --finetune --ckpt-format torch_dist`): tracker file, iteration folder, training arguments.
What megatron-core has no place for (config.json, tokenizer) is laid beside, in `hugging_face/`, for the way back; MTP
layers are left out, so the way back takes them from the source.
"""

import math
import shutil
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HFWeights, read_pieces
from bridge.huggingface.safetensors_folder import CONFIG_NAME, HFCheckpoint
from bridge.jobs.durable import sync, write_bytes
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.resumable import Work, run_resumable
from bridge.torch_dist.checkpoint import HF_FOLDER
from bridge.torch_dist.reader import TRACKER
from bridge.torch_dist.writer import Chunk, Stored, finish, write_chunks, write_states
from reference.checkpoint import is_mtp
from reference.config import ModelConfig
from reference.dist_checkpoint import Entry, entries
from reference.sharding import Piece, rows_of

CHUNK_BYTES = 64 * 2**20
UNIT_BYTES = 512 * 2**20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FLOAT32 = ("mlp.router.weight", "mlp.router.expert_bias")  # in every model (bridge.model.router)


class ImportJob(NamedTuple):
    """What is converted to what: everything that decides the output's bytes, and where it goes."""

    source: str
    out: str
    dtype: str = "bf16"
    iteration: int = 1
    unit_bytes: int = UNIT_BYTES
    source_versions: tuple[tuple[str, int, int], ...] = ()  # (file, bytes, mtime_ns); import_checkpoint fills it in


class ImportSummary(NamedTuple):
    """What an import reads and writes. `reused` of the `files` were finished by an earlier run."""

    tensors: int
    mtp_tensors: int
    bytes_read: int
    bytes_written: int
    files: int
    reused: int


class _Part(NamedTuple):
    chunk: Chunk
    pieces: tuple[Piece, ...]


class _Plan(NamedTuple):
    source: HFWeights
    units: list[list[_Part]]

    @property
    def chunks(self) -> list[Chunk]:
        return [part.chunk for unit in self.units for part in unit]


def import_checkpoint(
    job: ImportJob,
    *,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ImportSummary:
    """Convert `job.source` into `job.out`, whole or not at all; the same call again finishes an interrupted one.

    Under torchrun, in a process group, every rank calls it.

    Raises:
        ValueError: the source is not a whole MiniMax-M2, a tensor is damaged or a file changed, or `out` is not fit.
        OSError: the disk is full, or a worker died; what was finished is kept.
    """
    if job.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, found {job.dtype!r}")
    if job.iteration < 1:
        raise ValueError(f"iteration must be at least 1, as Megatron-LM asks, found {job.iteration}")
    with HFCheckpoint(job.source) as checkpoint:
        job = job._replace(source=str(Path(job.source).resolve()), source_versions=checkpoint.versions)
    plan = _plan(job)
    tensors = plan.source.checkpoint.tensors
    summary = ImportSummary(
        tensors=len(tensors),
        mtp_tensors=sum(is_mtp(name, plan.source.config) for name in tensors),
        bytes_read=plan.source.checkpoint.nbytes,
        bytes_written=sum(chunk.nbytes for chunk in plan.chunks),
        files=len(plan.units) + 1,
        reused=0,
    )
    if dry_run:
        return summary
    work = Work(_write_unit, job, len(plan.units) + 1)
    done = run_resumable(
        work,
        partial(_complete, job),
        marker=TRACKER,
        workers=workers,
        overwrite=overwrite,
        what="import",
        progress=progress,
    )
    return summary._replace(reused=done.reused)


@lru_cache(maxsize=1)  # a worker does many units of one job
def _plan(job: ImportJob) -> _Plan:
    source = HFWeights(job.source)
    if source.checkpoint.versions != job.source_versions:
        raise ValueError(
            f"{job.source}: its files changed since the import began; start again once nothing writes there"
        )
    units: list[list[_Part]] = []
    room = 0
    for entry in entries(source.config):
        dtype = torch.float32 if entry.key.endswith(FLOAT32) else DTYPES[job.dtype]
        for part in _parts(entry, dtype):
            if not units or part.chunk.nbytes > room:
                units.append([])
                room = job.unit_bytes
            units[-1].append(part)
            room -= part.chunk.nbytes
    return _Plan(source, units)


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


def _iteration_folder(job: ImportJob) -> str:
    return f"iter_{job.iteration:07d}"


def _write_unit(job: ImportJob, unit: int, folder: Path) -> tuple[list[str], list[Stored]]:
    plan = _plan(job)
    target = folder / _iteration_folder(job)
    target.mkdir(exist_ok=True)
    if unit == len(plan.units):
        stored = write_states(target, unit, plan.source.config, _common_state(job, plan.source.config))
    else:
        parts = [(part.chunk, partial(_value, plan, part)) for part in plan.units[unit]]
        stored = write_chunks(target, unit, parts)
    return [f"{_iteration_folder(job)}/{file}" for file in sorted({item.file for item in stored})], stored


def _value(plan: _Plan, part: _Part) -> Tensor:
    out = torch.empty(part.chunk.shape, dtype=part.chunk.dtype)
    axes = 1 if part.pieces[0].cols is None else 2
    read_pieces(plan.source.checkpoint, plan.source.config, part.pieces, out.view(part.chunk.shape[-axes:]))
    return out


def _complete(job: ImportJob, folder: Path, results: list[list[Any]]) -> None:
    """What makes the folder a checkpoint: metadata, the files of Hugging Face, and last the tracker."""
    plan = _plan(job)
    finish(folder / _iteration_folder(job), plan.chunks, [Stored(*item) for stored in results for item in stored])
    for path in (Path(CONFIG_NAME), *plan.source.checkpoint.carried_files()):
        target = folder / HF_FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(plan.source.checkpoint.folder / path, target)
        sync(target)
    write_bytes(folder / TRACKER, str(job.iteration).encode())


def _common_state(job: ImportJob, config: ModelConfig) -> dict[str, Any]:
    """The training arguments that describe the model, under Megatron-LM's names, at the layout one rank has."""
    arguments = Namespace(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        moe_ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=True,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        num_experts=config.num_local_experts,
        moe_router_topk=config.num_experts_per_tok,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_grouped_gemm=True,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=int(config.rope_theta),
        rotary_percent=config.rotary_dim / config.head_dim,
        normalization="RMSNorm",
        norm_epsilon=config.rms_norm_eps,
        qk_layernorm=True,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=True,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        bf16=job.dtype == "bf16",
        params_dtype=DTYPES[job.dtype],
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        ckpt_format="torch_dist",
        iteration=job.iteration,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    return {"args": arguments, "checkpoint_version": 3.0, "iteration": job.iteration}
