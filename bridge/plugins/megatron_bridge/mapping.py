"""megatron-bridge's mapping registry for MiniMax-M2, made from `reference.weights.TABLE`.

The host's own loops use it: for models with adapters, with other norms than ours, and for conversion tasks. A parameter
has a row for each name under which it may occur: that of the Transformer Engine and of the local layer spec, and for
the query and key norms also that of megatron-core's own slots.
"""

# The host is not in the project's own environment.
# pyright: reportMissingImports=false

from collections.abc import Iterator

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
)
from torch import Tensor, nn

from bridge.model.router import Float32Router
from reference.weights import TABLE, Dialect, Layout, Row

# A live model's names; the norms' names in checkpoints are those of megatron-core's slots.
LIVE_DIALECTS = (Dialect.MEGATRON_TE, Dialect.MEGATRON_LOCAL)
SLOT_DIALECT = Dialect.TORCH_DIST_LAYERS

# `TransformerConfig` field with the number of heads that a norm's weight is over.
HEADS = {Layout.QUERY_HEADS: "num_attention_heads", Layout.KEY_HEADS: "num_query_groups"}
_NORMS = {row.names[Dialect.HF_DISK][0].rpartition("self_attn.")[2]: row.layout for row in TABLE if row.layout in HEADS}

# By how a parameter is put together, the mapping and what it calls the on-disk tensors; `AutoMapping` for the rest.
FUSED = {Layout.QKV: (QKVMapping, ("q", "k", "v")), Layout.GATE_UP: (GatedMLPMapping, ("gate", "up"))}

AutoMapping.register_module_type(Float32Router.__name__, "replicated")


class _FullDimQKNormMapping(MegatronParamMapping[Tensor]):
    """The weight of a norm over all heads, of which a tensor-parallel rank holds its heads' part, or all of it.

    Where there are more ranks than key heads, neighbouring ranks hold the same part.
    """

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: nn.Module) -> Tensor:
        """This rank's part, in the parameter's dtype and on its device; every rank has the whole, nothing is sent.

        Raises:
            ValueError: the ranks' parts do not make up the whole.
        """
        target = getattr(megatron_module, self.megatron_param.rpartition(".")[2])
        parts = self._parts(len(target), len(hf_weights))
        start = self.tp_rank * parts // self.tp_size * len(target)
        return hf_weights[start : start + len(target)].to(device=target.device, dtype=target.dtype)

    def megatron_to_hf(self, megatron_weights: Tensor | None, megatron_module: nn.Module | None) -> dict[str, Tensor]:
        """The whole on every rank; nothing where no pipeline stage holds the parameter.

        Raises:
            ValueError: the ranks' parts do not make up the whole.
        """
        whole = None if megatron_module is None else self._whole(megatron_module)
        weight = self.broadcast_from_pp_rank(megatron_weights, cache_key=str(self.hf_param))
        whole = self.broadcast_obj_from_pp_rank(whole, "whole")
        if weight is None:
            return {}
        weight = self.maybe_dequantize(weight)
        parts = self._parts(len(weight), whole)
        if parts > 1:
            weight = torch.cat(self.gather_from_tp_ranks(weight)[:: self.tp_size // parts])
        return {str(self.hf_param): weight}

    def _parts(self, part: int, whole: int) -> int:
        """How many different parts there are."""
        parts, rest = divmod(whole, part)
        if rest or not parts or self.tp_size % parts:
            raise ValueError(
                f"{self.megatron_param}: {self.tp_size} tensor-parallel ranks of {part} channels do not hold "
                f"{whole} channels equally often; model and checkpoint have different sizes"
            )
        return parts

    def _whole(self, module: nn.Module) -> int:
        """All heads x head_dim: the norm's own `global_dim`, or else from the model's config."""
        if hasattr(module, "global_dim"):
            return int(module.global_dim)  # pyright: ignore[reportArgumentType]  # torch declares a tensor or a module
        config = self._get_config(module)
        layout = next(layout for name, layout in _NORMS.items() if str(self.hf_param).endswith(name))
        return (getattr(config, HEADS[layout]) or config.num_attention_heads) * config.kv_channels


def mapping_registry() -> MegatronMappingRegistry:
    """A mapping for every parameter of a MiniMax-M2, whatever its size and its layer spec."""
    return MegatronMappingRegistry(*(mapping for row in TABLE for mapping in _mappings(row)))


def _mappings(row: Row) -> Iterator[MegatronParamMapping]:
    sources = row.names[Dialect.HF_DISK]
    dialects = (*LIVE_DIALECTS, SLOT_DIALECT) if row.layout in HEADS else LIVE_DIALECTS
    for name in dict.fromkeys(_pattern(name) for dialect in dialects for name in row.names[dialect]):
        if row.layout in FUSED:
            mapping, parts = FUSED[row.layout]
            yield mapping(name, **dict(zip(parts, map(_pattern, sources), strict=True)))
        else:
            mapping = _FullDimQKNormMapping if row.layout in HEADS else AutoMapping
            yield mapping(name, _pattern(sources[0]))


def _pattern(name: str) -> str:
    """A name of the table in the host's spelling: a star for a number."""
    return name.format(layer="*", expert="*")
