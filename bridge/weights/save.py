"""A live model as a Hugging Face checkpoint, written by all ranks at once.

The files are planned first, by names and shapes. Each has one rank that writes it, one that holds some of what is in it
where that can be; its tensors are collected there as they leave the model, and written one after the other. When every
rank is done, the first one adds config and index and puts the folder in place.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.quantization import stored_tensors
from bridge.huggingface.writer import FilePlan, TensorPlan, finish_folder, plan_files, replaces, write_file
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import raise_on_all_ranks
from bridge.jobs.staging import Staging
from bridge.weights.encode import WeightEncoder
from bridge.weights.export import export_weights
from bridge.weights.shard_map import ShardMap
from bridge.weights.sharded_model import ShardedModel
from reference.checkpoint import is_mtp
from reference.config import ModelConfig

Named = Iterator[tuple[str, Tensor]]


def save_weights(
    sharded: ShardedModel,
    checkpoint: HuggingFaceCheckpoint,
    target: ModelConfig,
    config_json: dict[str, Any] | bytes,
    out: Path | str,
    *,
    overwrite: bool,
    max_shard_bytes: int,
    progress: Progress = no_progress,
) -> None:
    """Write a model and what its source carries along, whole or not at all; all ranks must call it.

    Raises:
        ValueError: `out` is not fit, or a weight is not finite. All ranks raise the same, also for a full disk.
    """
    files = _files(sharded.shard_map, checkpoint, target, max_shard_bytes)
    owners = _owners(sharded.shard_map, files)
    leads = sharded.rank == 0
    with raise_on_all_ranks():
        carried = checkpoint.files.carried_files()
        replaced = replaces(map(str, carried)) if overwrite else None
        staging = Staging(out, inputs=None, replaces=replaced) if leads else None
    with staging or Staging.join(out, None) as folder:
        to = {name: owners[file.file] for file in files for name in file.tensors}
        stream = export_weights(
            sharded, WeightEncoder(checkpoint, target, sharded.dtypes), to, device="cpu", progress=progress
        )
        mine = [file for file in files if owners[file.file] == sharded.rank]
        failure = _write(mine, folder.folder, _with_mtp(mine, stream, checkpoint), stream)
        with raise_on_all_ranks():
            if failure is not None:
                raise failure
        with raise_on_all_ranks():
            if leads:
                source = checkpoint.files
                companions = {str(path): source.folder / path for path in carried}
                finish_folder(folder.folder, files, config_json, carried=companions)
                folder.publish()


def _files(
    shard_map: ShardMap, checkpoint: HuggingFaceCheckpoint, target: ModelConfig, max_shard_bytes: int
) -> list[FilePlan]:
    groups = [
        stored_tensors(source.name, source.shape, target, checkpoint.dtype(source.name)) for source in shard_map.sources
    ]
    mtp = [{name: TensorPlan(checkpoint.dtype(name), checkpoint.shape(name))} for name in checkpoint.mtp_tensors]
    return plan_files(groups + mtp, max_shard_bytes=max_shard_bytes)


def _owners(shard_map: ShardMap, files: list[FilePlan]) -> dict[str, int]:
    """The rank that writes each file: as many bytes on all, on a rank that holds the file's first tensor."""
    sources = {source.name: source for source in shard_map.sources}
    load = [0] * shard_map.parallelism.world_size
    owners = {}
    for file in files:
        first = next((sources[name] for name in file.tensors if name in sources), None)
        held = range(len(load)) if first is None else {rank for one in shard_map.replicas(first) for rank in one.ranks}
        owners[file.file] = min(held, key=lambda rank: (load[rank], rank))
        load[owners[file.file]] += sum(tensor.nbytes for tensor in file.tensors.values())
    return owners


def _write(mine: list[FilePlan], folder: Path, tensors: Named, stream: Named) -> Exception | None:
    """This rank's files. If that fails it still takes its part in what the others collect, who wait for it."""

    def write() -> None:
        for file in mine:
            write_file(folder, file, islice(tensors, len(file.tensors)))

    failure = None
    for act in (write, lambda: deque(stream, maxlen=0)):
        try:
            act()
        except Exception as error:
            failure = failure or error
    return failure


def _with_mtp(mine: list[FilePlan], stream: Named, checkpoint: HuggingFaceCheckpoint) -> Named:
    """The tensors of this rank's files: from the model, and for MTP layers from the source."""
    for file in mine:
        for name in file.tensors:
            yield (name, checkpoint.files.read(name)) if is_mtp(name, checkpoint.config) else next(stream)
