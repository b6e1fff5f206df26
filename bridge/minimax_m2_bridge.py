"""MiniMax-M2 between Hugging Face checkpoints and megatron-core models.

One bridge stands for one source checkpoint. Weights stream between its files and the ranks that hold the model: each
rank reads its own slices (`bridge.weights.load`), gathers what it is to hand out (`bridge.weights.export`) and writes
its own files (`bridge.weights.save`), so that little memory is needed beyond the model. A model that goes back to FP8
is encoded on the source's scales wherever a block is untouched (`compiled.fp8.requantize`), which makes an untouched
weight byte-identical. Everything that megatron-core has no place for (MTP layers, tokenizer, unknown config keys) is
carried from the source.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, overload

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.hub import checkpoint_folder
from bridge.huggingface.quantization import Quantization, StoragePlan, storage_plan, with_true_scale_format
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.huggingface.writer import SHARD_BYTES
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import check_same_on_all_ranks, raise_on_all_ranks
from bridge.jobs.target import check_apart, real_path
from bridge.model.build import build_model, sizes_of_groups
from bridge.model.config import gpt_model_arguments, hybrid_model_arguments, transformer_config
from bridge.weights.encode import WeightEncoder
from bridge.weights.export import To, export_weights
from bridge.weights.fillable import check_fillable
from bridge.weights.load import load_weights
from bridge.weights.param_mapping import MappingRegistry
from bridge.weights.save import save_weights
from bridge.weights.sharded_model import sharded_model
from compiled.fp8 import dequantize_blockwise
from reference.checkpoint import SCALE_SUFFIX
from reference.config import ModelConfig
from reference.fp8 import FP8, float32_scales
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.parallelism import Parallelism
from reference.weights import Dialect


class GPTModelProvider(NamedTuple):
    """megatron-core's arguments for one MiniMax-M2: a `TransformerConfig`, and what else `GPTModel` takes."""

    transformer_config: TransformerConfig
    gpt_model_arguments: dict[str, Any]


class HybridModelProvider(NamedTuple):
    """megatron-core's arguments for one MiniMax-M2: a `TransformerConfig`, and what else `HybridModel` takes."""

    transformer_config: TransformerConfig
    hybrid_model_arguments: dict[str, Any]


class MiniMaxM2Bridge:
    """A Hugging Face checkpoint of MiniMax-M2, on its way into and out of megatron-core.

    Raises:
        ValueError: the checkpoint is not a whole and consistent MiniMax-M2 (see `reference.config`,
            `reference.checkpoint`, `bridge.huggingface.safetensors_folder`); every error names the file, tensor or key.
    """

    def __init__(self, checkpoint: HuggingFaceCheckpoint):
        self.checkpoint = checkpoint

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.checkpoint.config

    @classmethod
    def from_hf_pretrained(cls, path_or_hub_id: str | Path, *, revision: str | None = None) -> Self:
        """Open a local folder (no network is touched) or, where there is no such folder, a repository of the hub.

        Raises:
            ValueError: neither, or the checkpoint is bad.
        """
        return cls(HuggingFaceCheckpoint(checkpoint_folder(path_or_hub_id, revision=revision)))

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @overload
    def provider_bridge(
        self, *, model: Literal["gpt"] = ..., params_dtype: torch.dtype = ..., **overrides: Any
    ) -> GPTModelProvider: ...

    @overload
    def provider_bridge(
        self, *, model: Literal["hybrid"], params_dtype: torch.dtype = ..., **overrides: Any
    ) -> HybridModelProvider: ...

    def provider_bridge(
        self, *, model: str = DEFAULT_MODEL, params_dtype: torch.dtype = torch.bfloat16, **overrides: Any
    ) -> GPTModelProvider | HybridModelProvider:
        """The source's config as megatron-core's, for the class `model`; `overrides` are `TransformerConfig` fields.

        Parallel sizes are those of megatron-core's process groups, where they exist already; beside tensor parallelism
        sequence parallelism is on, without which experts cannot be trained.

        Raises:
            ValueError: `overrides` make another model or do not work together; the model does not divide by the sizes.
        """
        settings = sizes_of_groups(self.config) | overrides
        megatron = transformer_config(self.config, model=model, params_dtype=params_dtype, **settings)
        if ModelClass(model) is ModelClass.HYBRID:
            return HybridModelProvider(megatron, hybrid_model_arguments(self.config, megatron))
        return GPTModelProvider(megatron, gpt_model_arguments(self.config))

    def mapping_registry(
        self, dialect: Dialect = Dialect.MEGATRON_LOCAL, parallelism: Parallelism | None = None, rank: int = 0
    ) -> MappingRegistry:
        """How each megatron-core parameter of a rank is made of on-disk tensors, under the names of a layer spec."""
        return MappingRegistry(self.config, dialect, parallelism, rank)

    def maybe_modify_loaded_hf_weight(
        self,
        hf_param: str | dict[str, str],
        hf_state_dict: Mapping[str, Tensor],
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor | dict[str, Tensor]:
        """The weight of that name, dequantised to `dtype` if it is float8; a dictionary of names gives one of weights.

        Raises:
            ValueError: a weight or its scales are missing or unusable; names the tensor.
        """
        options = {"block_size": self.config.block_size, "dtype": dtype}
        if isinstance(hf_param, dict):
            return {part: plain_weight(name, hf_state_dict, **options) for part, name in hf_param.items()}
        return plain_weight(hf_param, hf_state_dict, **options)

    def to_megatron_model(
        self,
        *,
        model: ModelClass | str = DEFAULT_MODEL,
        params_dtype: torch.dtype = torch.bfloat16,
        load_weights: bool = True,
        progress: Progress = no_progress,
        **settings: Any,
    ) -> GPTModel | HybridModel | list[GPTModel] | list[HybridModel]:
        """This rank's part of a model of this checkpoint, with its weights: one chunk, or the list of its chunks.

        Call it inside `bridge.model.process_groups.model_parallel(...)`, or where megatron-core is set up already: the
        parallel sizes are those of its process groups. `model` is megatron-core's class: "gpt" or "hybrid"; `settings`
        are further ones of `bridge.model.build.build_model`.
        """
        settings = {"perform_initialization": not load_weights, **settings}
        with raise_on_all_ranks():
            built = build_model(self.config, model=model, params_dtype=params_dtype, **settings)
        if load_weights:
            self.load_hf_weights(built, progress=progress)
        return built

    def load_hf_weights(self, model: nn.Module | Sequence[nn.Module], *, progress: Progress = no_progress) -> None:
        """Fill a model with the source's weights, each rounded once to its parameter's dtype; all ranks must call it.

        Each rank reads only the rows that its own slices are in (`bridge.weights.read_plan` counts the bytes).

        Raises:
            ValueError: the model is not this checkpoint's, by its shapes or by what it computes (found out before
                anything is changed), or a weight is damaged. All ranks raise the same.

        Warns:
            UserWarning: an optimizer was made before; it needs `optimizer.reload_model_params()` afterwards.
        """
        self._check_same_on_all_ranks()
        sharded = sharded_model(model, self.config)
        with raise_on_all_ranks():
            check_fillable(model, self.config)
        load_weights(sharded, self.checkpoint, progress=progress)

    def export_hf_weights(
        self,
        model: nn.Module | Sequence[nn.Module],
        dtype: Literal["bf16", "fp8", "source"] = "bf16",
        *,
        to: To = "all",
        scales: Literal["source", "fresh"] = "source",
        device: str | torch.device | None = None,
        progress: Progress = no_progress,
    ) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the model under its on-disk name, in model order and in bounded memory.

        All ranks must call it, and go through all of what it gives.

        Args:
            model: the model, or the list of this rank's chunks.
            dtype: of the linear layers: "bf16"; "fp8", each followed by its `<name>_scale_inv`; or the "source"'s.
                Everything else has the source's dtype.
            to: which rank is given a tensor: "all" are (weight sync), or one rank by its number; "spread" gives each
                to one rank, evenly.
            scales: of float8: the "source"'s wherever a block is untouched, or all "fresh".
            device: "cpu" for host memory; None for the parameters' device.
            progress: shows progress.

        Raises:
            ValueError: an argument is none of these, or the model is not this checkpoint's; later, a weight that is not
                finite, or a source file that changed. All ranks raise the same.
        """
        self._check_same_on_all_ranks(dtype=dtype, scales=scales, to=to)
        choices = {"dtype": (dtype, ("bf16", "fp8", "source")), "scales": (scales, ("source", "fresh"))}
        for what, (found, allowed) in choices.items():
            if found not in allowed:
                raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, found {found!r}")
        quantized = dtype == "fp8" or (dtype == "source" and bool(self.checkpoint.quantized))
        storage = self._storage_plan("fp8" if quantized else "none")
        sharded = sharded_model(model, self.config)
        return export_weights(
            sharded,
            WeightEncoder(self.checkpoint, storage, sharded.dtypes, scales),
            to,
            device=device,
            progress=progress,
        )

    def save_hf_pretrained(
        self,
        model: nn.Module | Sequence[nn.Module],
        out: str | Path,
        *,
        quantization: Literal["fp8"] | None = "fp8",
        overwrite: bool = False,
        max_shard_bytes: int = SHARD_BYTES,
        progress: Progress = no_progress,
    ) -> None:
        """Write the model as a Hugging Face checkpoint, whole or not at all; all ranks must call it, and all write.

        Args:
            model: the model, or the list of this rank's chunks.
            out: a folder, new or empty, that all ranks can write to.
            quantization: "fp8" stores linear layers as float8: on the source's scales where a block is untouched, on
                fresh ones elsewhere. None stores them as bfloat16. Everything else has the source's dtype.
            overwrite: replace a checkpoint that is in `out`; it stays whole until the new one is.
            max_shard_bytes: size of a file.
            progress: shows progress.

        Raises:
            ValueError: `out` cannot be used, or the model is not this checkpoint's; nothing is written then. A weight
                is not finite, or the disk is full; then `out` is left as it was. All ranks raise the same.
        """
        self._check_same_on_all_ranks(
            out=str(real_path(out)), quantization=quantization, overwrite=overwrite, max_shard_bytes=max_shard_bytes
        )
        if quantization not in ("fp8", None):
            raise ValueError(f"quantization must be 'fp8' or None, found {quantization!r}")
        check_apart(out, [self.checkpoint.files.folder])  # its scales are still needed
        storage = self._storage_plan(quantization or "none")
        unchanged = storage.config_json == self.checkpoint.files.config_json
        config_json = self.checkpoint.files.folder / CONFIG_NAME if unchanged else storage.config_json
        if quantization:
            with raise_on_all_ranks():
                config_json = with_true_scale_format(config_json, self.checkpoint, "source")
        save_weights(
            sharded_model(model, self.config),
            self.checkpoint,
            storage,
            config_json,
            out,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )

    def _check_same_on_all_ranks(self, **arguments: Any) -> None:
        """Ranks that were given different sources or arguments would make one damaged result of them."""
        source = {"source": self.checkpoint.files.versions, "config.json": self.checkpoint.files.config_json}
        check_same_on_all_ranks(source | arguments)

    def _storage_plan(self, quantization: Quantization) -> StoragePlan:
        return storage_plan(self.checkpoint.files.config_json, quantization, self.checkpoint.quantized)


def plain_weight(name: str, state: Mapping[str, Tensor], *, block_size: int, dtype: torch.dtype) -> Tensor:
    """The weight of that name in a state dict, dequantised to `dtype` if it is float8.

    Raises:
        ValueError: it or its scales are missing or unusable; names the tensor.
    """
    if name not in state:
        raise ValueError(f"{name}: missing from the state dict")
    weight = state[name]
    if weight.dtype != FP8:
        return weight
    if name + SCALE_SUFFIX not in state:
        raise ValueError(f"{name}: float8 without its scales {name + SCALE_SUFFIX}; it cannot be dequantised")
    scale_inv = float32_scales(state[name + SCALE_SUFFIX], name=name)
    return dequantize_blockwise(weight, scale_inv, block_size=block_size, dtype=dtype, name=name)
