"""Saving a running model as a Hugging Face checkpoint; all ranks write files at once.

The files are planned first, from names and shapes. Each is written by one rank, which holds a piece of the file's first
tensor if the model has it: tensors are gathered there one after another and written as they come. When every rank has
finished, rank 0 adds config and index and publishes the folder.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.companions import companions, say_left_behind
from bridge.huggingface.quantization import StoragePlan
from bridge.huggingface.writer import FilePlan, TensorPlan, finish_folder, plan_files, replaces, write_file
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import raise_on_all_ranks
from bridge.jobs.staging import Staging
from bridge.weights.encode import WeightEncoder
from bridge.weights.export import export_weights
from bridge.weights.shard_map import ShardMap
from bridge.weights.sharded_model import ShardedModel

Named = Iterator[tuple[str, Tensor]]


def save_weights(
    sharded: ShardedModel,
    checkpoint: HuggingFaceCheckpoint,
    storage: StoragePlan,
    config_json: dict[str, Any] | Path,
    out: Path | str,
    *,
    overwrite: bool,
    max_shard_bytes: int,
    progress: Progress = no_progress,
) -> None:
    """Write the model, and its source's MTP layers and other files, whole or not at all; all ranks must call it.

    Raises:
        ValueError: `out` cannot be written to or replaced, a file cannot be taken along, a weight is not finite, or a
            source file changed.
        OSError: a file cannot be written, as when the disk is full. All ranks raise the same error.
    """
    files = _files(sharded.shard_map, checkpoint, storage, max_shard_bytes)
    owners = _owners(sharded.shard_map, files)
    leads = sharded.rank == 0
    with raise_on_all_ranks():
        source, carried = checkpoint.files.folder, dict[str, Path]()
        if leads:
            others = companions(source)
            say_left_behind(others.left_behind)
            carried = {str(path): source / path for path in others.carried}
        replaced = replaces(carried) if overwrite else None
        staging = Staging(out, inputs=None, replaces=replaced) if leads else None
    with staging or Staging.join(out, None) as folder:
        to = {name: owners[file.file] for file in files for name in file.tensors}
        stream = export_weights(
            sharded, WeightEncoder(checkpoint, storage, sharded.dtypes), to, device="cpu", progress=progress
        )
        mine = [file for file in files if owners[file.file] == sharded.rank]
        failure = _write(mine, folder.folder, _with_carried(mine, stream, checkpoint), stream)
        with raise_on_all_ranks():
            if failure is not None:
                raise failure
        with raise_on_all_ranks():
            if leads:
                finish_folder(folder.folder, files, config_json, carried=carried)
                folder.publish()


def _files(
    shard_map: ShardMap, checkpoint: HuggingFaceCheckpoint, storage: StoragePlan, max_shard_bytes: int
) -> list[FilePlan]:
    groups = [
        storage.stored_tensors(source.name, source.shape, checkpoint.dtype(source.name)) for source in shard_map.sources
    ]
    carried = [
        {name: TensorPlan(checkpoint.dtype(name), checkpoint.shape(name))} for name in checkpoint.carried_tensors
    ]
    files = plan_files(groups + carried, max_shard_bytes=max_shard_bytes)
    storage.check(files, set(checkpoint.carried_tensors))
    return files


def _owners(shard_map: ShardMap, files: list[FilePlan]) -> dict[str, int]:
    """The rank that writes each file: one that holds a piece of its first tensor, with the fewest bytes so far."""
    sources = {source.name: source for source in shard_map.sources}
    load = [0] * shard_map.parallelism.world_size
    owners = {}
    for file in files:
        first = next((sources[name] for name in file.tensors if name in sources), None)
        ranks = range(len(load)) if first is None else {rank for one in shard_map.replicas(first) for rank in one.ranks}
        owners[file.file] = min(ranks, key=lambda rank: (load[rank], rank))
        load[owners[file.file]] += sum(tensor.nbytes for tensor in file.tensors.values())
    return owners


def _write(mine: list[FilePlan], folder: Path, tensors: Named, stream: Named) -> Exception | None:
    """Write this rank's files. If that fails, go on gathering: the other ranks wait for this one's pieces."""

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


def _with_carried(mine: list[FilePlan], stream: Named, checkpoint: HuggingFaceCheckpoint) -> Named:
    """The tensors of this rank's files in order: what is not the model's from the source, the rest of the stream."""
    carried = set(checkpoint.carried_tensors)
    for file in mine:
        for name in file.tensors:
            yield (name, checkpoint.files.read(name)) if name in carried else next(stream)
