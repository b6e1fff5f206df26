"""MiniMax-M2 between Hugging Face checkpoints and megatron-core models.

One bridge stands for one source checkpoint. Weights stream: one parameter is read, dequantised and copied at a time,
and one is exported at a time, so that beyond the model itself little memory is needed. A model that goes back to FP8 is
re-encoded on the source's scales wherever a block is untouched (`reference.fp8.requantize_blockwise`), which makes an
untouched weight byte-identical; everything that megatron-core has no place for (MTP layers, tokenizer, unknown config
keys) is carried from the source.

Today one process holds the whole model.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bridge.hf_files import CONFIG_NAME, HFCheckpoint
from bridge.hf_writer import SHARD_BYTES, HFWriter
from bridge.hub import checkpoint_folder
from bridge.mapping import MappingRegistry, model_dialect
from bridge.progress import Track, untracked
from bridge.provider import build_gpt_model, gpt_model_arguments, transformer_config
from reference.checkpoint import SCALE_SUFFIX, check_tensors, is_mtp, is_quantized
from reference.config import ModelConfig, QuantizationConfig
from reference.fp8 import FP8, dequantize_blockwise, quantize_blockwise, requantize_blockwise
from reference.names import Dialect


class GPTModelProvider(NamedTuple):
    """megatron-core's arguments for one MiniMax-M2: a `TransformerConfig`, and what else `GPTModel` takes."""

    transformer_config: TransformerConfig
    gpt_model_arguments: dict[str, Any]


class MiniMaxM2Bridge:
    """A Hugging Face checkpoint of MiniMax-M2, on its way into and out of megatron-core.

    Raises:
        ValueError: the checkpoint is not a whole and consistent MiniMax-M2 (see `reference.config`,
            `reference.checkpoint`, `bridge.hf_files`); every error names the file, tensor or key.
    """

    def __init__(self, checkpoint: HFCheckpoint):
        self.checkpoint = checkpoint
        self.config = ModelConfig.from_hf(checkpoint.config)
        check_tensors({name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}, self.config)

    @classmethod
    def from_hf_pretrained(cls, path_or_hub_id: str | Path, *, revision: str | None = None) -> Self:
        """Open a local folder (no network is touched) or, where there is no such folder, a repository of the hub.

        Raises:
            ValueError: neither, or the checkpoint is bad.
        """
        return cls(HFCheckpoint(checkpoint_folder(path_or_hub_id, revision=revision)))

    def close(self) -> None:
        """Close the checkpoint's files."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def mtp_tensors(self) -> list[str]:
        """Tensors of multi-token-prediction layers: not part of the megatron-core model, carried over unchanged."""
        return [name for name in self.checkpoint.tensors if is_mtp(name, self.config)]

    def provider_bridge(self, *, params_dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> GPTModelProvider:
        """The source's config as megatron-core's; `overrides` are `TransformerConfig` fields."""
        megatron = transformer_config(self.config, params_dtype=params_dtype, **overrides)
        return GPTModelProvider(megatron, gpt_model_arguments(self.config))

    def mapping_registry(self, dialect: Dialect = Dialect.MEGATRON_LOCAL) -> MappingRegistry:
        """How each megatron-core parameter is made of on-disk tensors, under the names of a layer spec."""
        return MappingRegistry(self.config, dialect)

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
        if isinstance(hf_param, dict):
            return {part: self._weight(name, hf_state_dict, dtype) for part, name in hf_param.items()}
        return self._weight(hf_param, hf_state_dict, dtype)

    def _weight(self, name: str, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        if name not in state:
            raise ValueError(f"{name}: missing from the state dict")
        weight = state[name]
        if weight.dtype != FP8:
            return weight
        if name + SCALE_SUFFIX not in state:
            raise ValueError(f"{name}: float8 without its scales {name + SCALE_SUFFIX}; it cannot be dequantised")
        return dequantize_blockwise(
            weight, state[name + SCALE_SUFFIX], block_size=self._block_size, dtype=dtype, name=name
        )

    @property
    def _block_size(self) -> int:
        return (self.config.quantization or QuantizationConfig()).block_size

    def read_weight(self, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A weight of the source, dequantised to `dtype` if it is float8, else as it is on disk."""
        return self._weight(name, _Lazy(self.checkpoint), dtype)

    def to_megatron_model(
        self, *, params_dtype: torch.dtype = torch.bfloat16, load_weights: bool = True, **overrides: Any
    ) -> GPTModel:
        """A `GPTModel` of this checkpoint with its weights; `overrides` are `TransformerConfig` fields.

        Call it inside `bridge.single_process.model_parallel()`, or where megatron-core is set up already.
        """
        overrides = {"perform_initialization": not load_weights, **overrides}
        model = build_gpt_model(self.config, params_dtype=params_dtype, **overrides)
        if load_weights:
            self.load_hf_weights(model)
        return model

    @torch.no_grad()
    def load_hf_weights(self, model: nn.Module, *, track: Track = untracked) -> None:
        """Fill a model with the source's weights, each rounded once to its parameter's dtype.

        Raises:
            ValueError: the model is not this checkpoint's (found out before anything is changed), or a weight is
                damaged.
        """
        registry = self.mapping_registry(model_dialect(model))
        state = registry.bind(model)
        for mapping in track(registry, "load", len(registry)):
            target = state[mapping.megatron_param]
            tensors = {name: self.read_weight(name, dtype=target.dtype) for name in mapping.hf_params}
            target.copy_(mapping.hf_to_megatron(tensors))

    @torch.no_grad()
    def export_hf_weights(self, model: nn.Module, *, track: Track = untracked) -> Iterator[tuple[str, Tensor]]:
        """Every weight of the model under its on-disk name, in the parameter's dtype, one parameter at a time.

        Raises:
            ValueError: the model is not this checkpoint's.
        """
        registry = self.mapping_registry(model_dialect(model))
        state = registry.bind(model)
        for mapping in track(registry, "export", len(registry)):
            yield from mapping.megatron_to_hf(state[mapping.megatron_param].detach()).items()

    def save_hf_pretrained(
        self,
        model: nn.Module,
        out: str | Path,
        *,
        quantization: Literal["fp8"] | None = "fp8",
        overwrite: bool = False,
        max_shard_bytes: int = SHARD_BYTES,
        track: Track = untracked,
    ) -> None:
        """Write the model as a Hugging Face checkpoint, whole or not at all.

        Args:
            model: the model.
            out: a folder, new or empty.
            quantization: "fp8" stores linear layers as float8: on the source's scales where a block is untouched, on
                fresh ones elsewhere. None stores them as bfloat16. Everything else has the source's dtype.
            overwrite: replace a checkpoint that is in `out`; it stays whole until the new one is.
            max_shard_bytes: size of a file; as much is held in memory.
            track: shows progress.

        Raises:
            ValueError: `out` cannot be used, or the model is not this checkpoint's; nothing is written then.
        """
        if quantization not in ("fp8", None):
            raise ValueError(f"quantization must be 'fp8' or None, found {quantization!r}")
        if Path(out).resolve() == self.checkpoint.folder.resolve():
            raise ValueError(f"{out}: is the source checkpoint itself, whose scales are still needed; write elsewhere")
        self.mapping_registry(model_dialect(model)).bind(model)
        target_config, config_json = self._target_config(quantization)
        with HFWriter(out, overwrite=overwrite, max_shard_bytes=max_shard_bytes) as writer:
            for name, value in self.export_hf_weights(model, track=track):
                for stored_name, stored in self._stored(name, value.cpu(), target_config):
                    writer.add(stored_name, stored)
            for name in self.mtp_tensors:
                writer.add(name, self.checkpoint.read(name))
            for path in self.checkpoint.carried_files():
                writer.add_file(self.checkpoint.folder / path, path)
            writer.finish(config_json)

    def _stored(self, name: str, value: Tensor, target: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """A weight as it goes on disk: float8 and scales, or the dtype it has in the source."""
        source_dtype = self.checkpoint.tensors[name].dtype
        if not is_quantized(name, target):
            yield name, value.to(torch.bfloat16 if source_dtype == FP8 else source_dtype)
            return
        assert target.quantization is not None
        block_size = target.quantization.block_size
        if source_dtype == FP8:
            scale_inv = self.checkpoint.read(name + SCALE_SUFFIX)
            weight, scale_inv = requantize_blockwise(value, scale_inv, block_size=block_size, name=name)
        else:
            weight, scale_inv = quantize_blockwise(value, block_size=block_size, name=name)
        yield name, weight
        yield name + SCALE_SUFFIX, scale_inv

    def _target_config(self, quantization: str | None) -> tuple[ModelConfig, dict[str, Any] | bytes]:
        """The config of what is written: the source's own bytes, unless it gains or loses its quantisation."""
        raw = dict(self.checkpoint.config)
        if (quantization is None) == (self.config.quantization is None):
            return self.config, (self.checkpoint.folder / CONFIG_NAME).read_bytes()
        if quantization is None:
            del raw["quantization_config"]
        else:
            raw["quantization_config"] = FP8_SECTION
        return ModelConfig.from_hf(raw), raw


FP8_SECTION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [QuantizationConfig().block_size] * 2,
    "modules_to_not_convert": list(QuantizationConfig().modules_to_not_convert),
}


class _Lazy(Mapping[str, Tensor]):
    """A checkpoint as a state dict whose tensors are read when asked for."""

    def __init__(self, checkpoint: HFCheckpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)
