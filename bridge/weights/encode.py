"""What a checkpoint stores of a running model's weights: each in its dtype on disk, or as float8 codes and scales."""

from typing import Literal

import torch
from torch import Tensor

from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.quantization import StoragePlan
from bridge.weights.shard_map import Source
from compiled import fp8
from compiled.fp8 import requantize_blockwise
from reference.checkpoint import SCALE_SUFFIX
from reference.fp8 import FP8, float32_scales
from reference.weights import Row


class WeightEncoder:
    """Encodes weights as a `storage` plan stores them.

    `dtypes` are those of the model's parameters. `scales` says where float8 scales come from: "source" keeps those of
    the source checkpoint for every block whose values have not changed, "fresh" makes all of them anew.
    """

    def __init__(
        self,
        checkpoint: HuggingFaceCheckpoint,
        storage: StoragePlan,
        dtypes: dict[Row, torch.dtype],
        scales: Literal["source", "fresh"] = "source",
    ):
        self._files, self._storage, self._dtypes, self._scales = checkpoint.files, storage, dtypes, scales

    def value_dtype(self, source: Source) -> torch.dtype:
        """The dtype in which a tensor is gathered: its parameter's if it is to be quantised, else the one stored."""
        if source.name in self._storage.quantized:
            return self._dtypes[source.row]
        stored = self._files.tensors[source.name].dtype
        return torch.bfloat16 if stored == FP8 else stored

    def stored(self, values: list[tuple[Source, Tensor]]) -> list[tuple[str, Tensor]]:
        """What is stored of gathered tensors, by name: each as it is, or its codes and then its scales.

        Raises:
            ValueError: a value is not finite, or the source's scales are damaged or changed; names the tensor.
        """
        alike: dict[tuple, list[tuple[Source, Tensor]]] = {}
        for source, value in values:
            if source.name in self._storage.quantized:
                kept = self._scales == "source" and self._files.tensors[source.name].dtype == FP8
                scale_dtype = self._files.tensors[source.name + SCALE_SUFFIX].dtype if kept else None
                alike.setdefault((scale_dtype, source.shape), []).append((source, value))
        quantized: dict[str, tuple[Tensor, Tensor]] = {}
        for (scale_dtype, _), group in alike.items():
            quantized |= self._quantized(group, kept=scale_dtype is not None)
        found = []
        for source, value in values:
            if source.name not in quantized:
                found.append((source.name, value))
            else:
                codes, scale_inv = quantized[source.name]
                found += [(source.name, codes), (source.name + SCALE_SUFFIX, scale_inv)]
        return found

    def _quantized(self, group: list[tuple[Source, Tensor]], *, kept: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """(codes, scales) by name, of matrices of one shape, quantised together as a stack."""
        # A single matrix is not stacked, so that errors say where in the matrix.
        stack = torch.stack([value for _, value in group]) if len(group) > 1 else group[0][1]
        config, name = self._storage.config, group[0][0].name
        assert config.quantization is not None
        options = {"block_size": config.block_size, "scale_fmt": config.quantization.scale_fmt, "name": name}
        try:
            if kept:
                scale_inv = self._source_scales([source for source, _ in group]).to(stack.device)
                scale_inv = scale_inv.view(*stack.shape[:-2], *scale_inv.shape[1:])
                codes, scale_inv = requantize_blockwise(stack, scale_inv, **options)
            else:
                codes, scale_inv = fp8.quantize_blockwise(stack, **options)
        except ValueError:
            if len(group) > 1:  # one by one, the damaged matrix raises with its own name
                for one in group:
                    self._quantized([one], kept=kept)
            raise
        pairs = zip(*(x.view(len(group), *x.shape[-2:]) for x in (codes, scale_inv)), strict=True)
        return {source.name: pair for (source, _), pair in zip(group, pairs, strict=True)}

    def _source_scales(self, sources: list[Source]) -> Tensor:
        """The source checkpoint's scales of matrices of one shape, alike in dtype, as a stack in float32."""
        names = [source.name + SCALE_SUFFIX for source in sources]
        stored = self._files.tensors[names[0]]
        scale_inv = torch.empty((len(names), *stored.shape), dtype=stored.dtype)
        places = scale_inv.flatten(1).view(torch.uint8).numpy()
        self._files.read_into((place, name, None) for place, name in zip(places, names, strict=True))
        return float32_scales(scale_inv, name=sources[0].name)
