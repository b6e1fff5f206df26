"""What a checkpoint written by megatron-bridge has of its source beyond the weights that a model holds.

The host's writer drops config.json's quantisation, strips one MTP layer and fails at a second. It asks the source's
state for the files, so that is where ours comes in: `CheckpointSource` adds what the model does not hold, and writes
the config.json that fits what was written. The host's writer does the rest, with the source's file names.

For a checkpoint that appears whole or not at all, use `bridge.MiniMaxM2Bridge.save_hf_pretrained`.
"""

# The host is not in the project's own environment.
# pyright: reportMissingImports=false

import json
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from megatron.bridge.models.conversion.model_bridge import HFWeightTuple
from megatron.bridge.models.hf_pretrained.state import SafeTensorsStateSource
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.hub import checkpoint_folder
from bridge.huggingface.quantization import StoragePlan, storage_plan, with_true_scale_format
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.jobs.ranks import is_rank_zero
from bridge.weights.encode import WeightEncoder
from bridge.weights.shard_map import ShardMap, Source
from reference.checkpoint import SCALE_SUFFIX
from reference.parallelism import Parallelism
from reference.weights import Dialect, Layout


def checkpoint_folder_of(hf_pretrained: Any) -> Path | None:
    """The local folder whose safetensors files a host's pretrained model reads; None if it is not backed by files."""
    source = getattr(getattr(hf_pretrained, "state", None), "source", None)
    if not isinstance(source, SafeTensorsStateSource):
        return None
    return checkpoint_folder(hf_pretrained.model_name_or_path, revision=hf_pretrained.init_kwargs.get("revision"))


def use_checkpoint_source(hf_pretrained: Any, *, plain: bool) -> None:
    """Have the host's writer save what the next export gives; nothing where there are no files."""
    folder = checkpoint_folder_of(hf_pretrained)
    if folder is not None:
        hf_pretrained.state.source = CheckpointSource(folder, plain=plain)


class CheckpointSource(SafeTensorsStateSource):
    """The host's source of tensors in files, whose saved copies are complete.

    `plain` says that the next export has no float8 weights of the model, whatever the files have.
    """

    def __init__(self, path: str | Path, *, plain: bool):
        super().__init__(path)
        self.plain = plain

    def save_generator(
        self,
        generator: Iterable[tuple[str, Tensor]],
        output_path: str | Path,
        strict: bool = True,
        distributed_save: bool = False,
        save_every_n_ranks: int = 1,
        ignored_source_key_prefixes: Iterable[str] | None = None,
    ) -> None:
        """Write the given weights and the source's further tensors; all ranks must call it.

        `ignored_source_key_prefixes` are the host's, of MTP layers that the model lacks: they are carried instead.
        """
        with HuggingFaceCheckpoint(self.path) as checkpoint:
            storage = _storage(checkpoint, plain=self.plain)
            writer = _Expected(self.path, _files(checkpoint, storage))
            carried = ((name, checkpoint.files.read(name)) for name in checkpoint.carried_tensors)
            weights = chain(generator, carried)
            writer.save_generator(weights, output_path, strict, distributed_save, save_every_n_ranks)
            if is_rank_zero():
                _write_config(checkpoint, storage, Path(output_path))


class _Expected(SafeTensorsStateSource):
    """A source of which the host's writer expects certain tensors in certain files."""

    def __init__(self, path: str | Path, files: dict[str, str]):
        super().__init__(path)
        self._files = files

    @property
    def key_to_filename_map(self) -> dict[str, str]:
        return self._files


def _storage(checkpoint: HuggingFaceCheckpoint, *, plain: bool) -> StoragePlan:
    quantization = "fp8" if checkpoint.quantized and not plain else "none"
    return storage_plan(checkpoint.files.config_json, quantization, checkpoint.quantized)


def _files(checkpoint: HuggingFaceCheckpoint, storage: StoragePlan) -> dict[str, str]:
    """The file of each tensor that is written: the source's."""
    scales = {name + SCALE_SUFFIX for name in checkpoint.quantized - storage.quantized}
    return {name: tensor.file for name, tensor in checkpoint.files.tensors.items() if name not in scales}


def _write_config(checkpoint: HuggingFaceCheckpoint, storage: StoragePlan, out: Path) -> None:
    written = storage.config_json
    if storage.quantized:
        written = with_true_scale_format(written, checkpoint, "source")
    (out / CONFIG_NAME).write_text(json.dumps(written, indent=2) + "\n")


class SourceEncoding:
    """The `export_hook` of conversion tasks: a weight as its source stores it.

    Names are the source's, or those of a layer beneath an adapter. What has other names is left as it is. Rows that
    fill up the vocabulary are cut off, which the host does not do.
    """

    def __init__(self, folder: Path, *, plain: bool):
        self._folder, self._plain = folder, plain

    def __call__(self, name: str, tensor: Tensor) -> Iterator[HFWeightTuple]:
        on_disk = name.replace(".base_layer.", ".")
        source = self._sources.get(on_disk)
        if source is None:
            yield HFWeightTuple(name, tensor)
            return
        if source.row.layout is Layout.VOCABULARY:
            tensor = tensor[: source.shape[0]]
        if self._plain:
            yield HFWeightTuple(name, tensor)
            return
        if on_disk not in self._storage.quantized:
            tensor = tensor.to(self._encoder.value_dtype(source))
        for stored, value in self._encoder.stored([(source, tensor)]):
            yield HFWeightTuple(name + stored.removeprefix(on_disk), value)

    @cached_property
    def _checkpoint(self) -> HuggingFaceCheckpoint:
        checkpoint = HuggingFaceCheckpoint(self._folder)
        weakref.finalize(self, checkpoint.close)
        return checkpoint

    @cached_property
    def _storage(self) -> StoragePlan:
        return _storage(self._checkpoint, plain=self._plain)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        shard_map = ShardMap(self._checkpoint.config, Parallelism(), Dialect.MEGATRON_TE)
        return {source.name: source for source in shard_map.sources}

    @cached_property
    def _encoder(self) -> WeightEncoder:
        return WeightEncoder(self._checkpoint, self._storage, {})
