"""Writing megatron-core's distributed checkpoint (`torch_dist`), one tensor at a time, without a model.

torch.distributed.checkpoint's own writer does the work; the planner here makes each tensor when its turn comes, so that
memory holds about two. A checkpoint has, besides the tensors of `reference.dist_checkpoint`, what megatron-core expects
to find: an empty extra state for every module of Transformer Engine that has one (the local spec's are a subset), and
the common state with the training arguments.
"""

import io
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    DEFAULT_SUFFIX,
    FileSystemWriter,
    _StorageInfo,
    _StoragePrefix,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from bridge.formats import BACKEND, FORMAT_NAME
from bridge.jobs.durable import write_bytes
from bridge.torch_dist.metadata import METADATA_NAME
from reference.config import ModelConfig
from reference.model_class import DEFAULT_MODEL, ModelClass

FORMAT = {"sharded_backend": BACKEND, "sharded_backend_version": 1}
COMMON_STATE = "common_state/shard_0_1"

# Modules with an extra state in megatron-core's Transformer Engine spec (seen, 0.19.2 with Transformer Engine 2.20).
EXTRA_STATES_OF_ATTENTION = ("self_attention.linear_proj", "self_attention.linear_qkv")
EXTRA_STATES_OF_MOE = ("pre_mlp_layernorm",)
EXTRA_STATES_OF_AN_EXPERT = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
EXTRA_STATES_OF_THE_MODEL = {
    ModelClass.GPT: ("decoder.final_layernorm",),
    ModelClass.HYBRID: ("decoder.final_norm", "output_layer"),  # GPTModel leaves its output layer's out
}


class Chunk(NamedTuple):
    """A rectangle of the tensor `key`: where it starts, its shape (as many axes as the tensor), the tensor's own."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Stored(NamedTuple):
    """Where a chunk (or, without `start`, an object) lies: a span of bytes in a file."""

    key: str
    start: tuple[int, ...] | None
    file: str
    offset: int
    nbytes: int


class _Writer(FileSystemWriter):
    """Writes one item after the other."""

    def __init__(self, folder: Path):
        super().__init__(folder, per_thread_copy_ahead=0)


class _LazyPlanner(DefaultSavePlanner):
    """Makes what is to be written when it is written."""

    def __init__(self, make: dict[MetadataIndex, Callable[[], Tensor | io.BytesIO]]):
        super().__init__()
        self._make = make

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._make[write_item.index]()


def write_chunks(folder: Path, unit: int, chunks: Iterable[tuple[Chunk, Callable[[], Tensor]]]) -> list[Stored]:
    """Write one file, `__{unit}_0.distcp`, of chunks whose values are made one at a time."""
    items, make = [], {}
    for chunk, value in chunks:
        index = MetadataIndex(chunk.key, torch.Size(chunk.start))
        data = TensorWriteData(_region(chunk), _properties(chunk), torch.Size(chunk.whole))
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        make[index] = lambda chunk=chunk, value=value: value().view(chunk.shape)
    return _write(folder, unit, items, make)


def write_states(
    folder: Path, unit: int, config: ModelConfig, common: dict[str, Any], model: ModelClass = DEFAULT_MODEL
) -> list[Stored]:
    """Write the file with the extra states of a model class and the common state."""
    extra, state = _states(common)
    make = {MetadataIndex(key): lambda: io.BytesIO(extra) for key in extra_state_keys(config, model)}
    make[MetadataIndex(COMMON_STATE)] = lambda: io.BytesIO(state)
    return _write(folder, unit, [WriteItem(index, WriteItemType.BYTE_IO) for index in make], make)


def plan_chunks(unit: int, chunks: Iterable[Chunk]) -> list[Stored]:
    """What `write_chunks` will return, without the values."""
    return _in_a_row(unit, [(chunk.key, chunk.start, _archive_bytes(chunk.shape, chunk.dtype)) for chunk in chunks])


def plan_states(
    unit: int, config: ModelConfig, common: dict[str, Any], model: ModelClass = DEFAULT_MODEL
) -> list[Stored]:
    """What `write_states` will return."""
    extra, state = _states(common)
    return _in_a_row(unit, [*((key, None, len(extra)) for key in extra_state_keys(config, model)),
                            (COMMON_STATE, None, len(state))])  # fmt: skip


def finish(folder: Path, chunks: Iterable[Chunk], stored: Iterable[Stored]) -> None:
    """Write `metadata.json` and `.metadata`: from here on the folder is a checkpoint.

    Raises:
        ValueError: what is stored is not exactly the chunks.
    """
    chunks, stored = list(chunks), list(stored)
    _check_all_stored(chunks, stored)
    for name, data in metadata_files(chunks, stored).items():
        write_bytes(folder / name, data)


def metadata_files(chunks: Iterable[Chunk], stored: Iterable[Stored]) -> dict[str, bytes]:
    """`metadata.json` and `.metadata`, as torch's `FileSystemWriter.finish` pickles it.

    pickle writes one string once and equal strings twice, so these are interned: units done by this process, by a
    worker and by an earlier run give the same bytes.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    for chunk in chunks:
        empty = TensorStorageMetadata(_properties(chunk), torch.Size(chunk.whole), [])
        tensors.setdefault(intern(chunk.key), empty).chunks.append(_region(chunk))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**tensors}
    spans = {}
    for key, start, file, offset, nbytes in stored:
        key, file = intern(key), intern(file)
        entries.setdefault(key, BytesStorageMetadata())
        spans[MetadataIndex(key, None if start is None else torch.Size(start))] = _StorageInfo(file, offset, nbytes)
    metadata = Metadata(entries, storage_data=spans, version=CURRENT_DCP_VERSION)
    return {FORMAT_NAME: json.dumps(FORMAT).encode(), METADATA_NAME: pickle.dumps(metadata)}


def _check_all_stored(chunks: list[Chunk], stored: list[Stored]) -> None:
    planned = Counter((chunk.key, chunk.start) for chunk in chunks)
    written = Counter((one.key, tuple(one.start)) for one in stored if one.start is not None)
    if planned != written:
        key, start = next(iter((planned - written) + (written - planned)))
        raise ValueError(
            f"{key} at {list(start)}: written {written[key, start]} times, planned {planned[key, start]} times; the "
            "processes that wrote this checkpoint did not have the same plan"
        )


def extra_state_keys(config: ModelConfig, model: ModelClass = DEFAULT_MODEL) -> Iterator[str]:
    """The keys of all extra states: `{module}._extra_state/shard_{index}_{sizes}`.

    As with weights, those of all layers of a `GPTModel` are one stack, and a `HybridModel`'s layers are apart.
    """
    layers, experts = config.num_hidden_layers, config.num_local_experts
    hybrid = model is ModelClass.HYBRID
    for layer in range(layers):
        attention, moe = (f"{2 * layer}.", f"{2 * layer + 1}.") if hybrid else ("", "")
        index, size = ("", "") if hybrid else (f"{layer}.", f"{layers}.")
        alone = "0_1" if hybrid else f"{layer}_{layers}"
        for module in EXTRA_STATES_OF_ATTENTION:
            yield f"decoder.layers.{attention}{module}._extra_state/shard_{alone}"
        for module in EXTRA_STATES_OF_MOE:
            yield f"decoder.layers.{moe}{module}._extra_state/shard_{alone}"
        for module in EXTRA_STATES_OF_AN_EXPERT:
            for expert in range(experts):
                yield f"decoder.layers.{moe}{module}._extra_state/shard_{index}{expert}_{size}{experts}"
    for module in EXTRA_STATES_OF_THE_MODEL[model]:
        yield f"{module}._extra_state/shard_0_1"


def _write(folder: Path, unit: int, items: list[WriteItem], make: dict) -> list[Stored]:
    plan = SavePlan(items, storage_data=_StoragePrefix(f"__{unit}_"))
    try:
        results = _Writer(folder).write_data(plan, _LazyPlanner(make)).value()
    except RuntimeError as error:  # what torch's archive says of the bytes it could not write
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    stored = []
    for result in results:
        start, info = result.index.offset, result.storage_data
        at = None if start is None else tuple(start)
        stored.append(Stored(result.index.fqn, at, info.relative_path, info.offset, info.length))
    return stored


def _region(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape))


def _properties(chunk: Chunk) -> TensorProperties:
    return TensorProperties(dtype=chunk.dtype)


def _states(common: dict[str, Any]) -> tuple[bytes, bytes]:
    """The extra state of a module, and the common state."""
    return _serialized([torch.empty(0, dtype=torch.uint8)]), _serialized([common])


def _in_a_row(unit: int, items: Iterable[tuple[str, tuple[int, ...] | None, int]]) -> list[Stored]:
    """Items of (key, start, bytes) as they lie in the file of a unit."""
    items = list(items)
    ends = accumulate(nbytes for *_, nbytes in items)
    return [
        Stored(key, start, f"__{unit}_0{DEFAULT_SUFFIX}", end - nbytes, nbytes)
        for (key, start, nbytes), end in zip(items, ends, strict=True)
    ]


@cache
def _archive_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of torch.save's archive of a tensor: they depend on nothing else."""
    return len(_serialized(torch.empty(shape, dtype=dtype)))


def _serialized(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
