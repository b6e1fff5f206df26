"""Weights and their gradients under any `Laws`: what a parameter is filled with, how it is read, what becomes of dw.

A layout goes wrong in one of two places. Where weights are *stored* wrongly, the parameter holds other values, and what
is under a weight's name in the gradients is the gradient of those values. Where they are *read* wrongly, parameters are
right and their gradients follow the wrong reading back.
"""

import torch
from torch import Tensor

from reference.config import ModelConfig
from reference.fp8 import divisors
from reference.fusion import merge_qkv, split_qkv
from reference.laws import Laws
from reference.names import SCALE_SUFFIX


def stored(
    weights: dict[str, Tensor], config: ModelConfig, laws: Laws, *, expert_tensor_parallel: int
) -> dict[str, Tensor]:
    """The values that parameters are filled with; block scales (`<name>_scale_inv`) are used and left out.

    `weights` are dequantised. Where one has scales, value x bfloat16(s) / s is what bfloat16 scales would have given.
    """
    scales = {name: value for name, value in weights.items() if name.endswith(SCALE_SUFFIX)}
    held = {name: value for name, value in weights.items() if name not in scales}
    if laws.fp8_scales == "bfloat16":
        for name, scale in scales.items():
            weight = name.removesuffix(SCALE_SUFFIX)
            held[weight] = held[weight] * _off_by(scale, held[weight], config.block_size)
    if laws.qkv_rows == "stored_as_blocks":
        for names in _parts(held, "self_attn.{}_proj.weight", "qkv"):
            blocks = torch.cat([held[name] for name in names])
            sizes = {"num_query_groups": config.num_key_value_heads, "heads_per_group": config.heads_per_group}
            held |= zip(names, split_qkv(blocks, **sizes), strict=True)
    if laws.expert_shards != "in_order":
        for w1, w3, w2 in _parts(held, "{}.weight", ("w1", "w3", "w2")):
            if laws.expert_shards == "reversed":
                held[w2] = torch.cat(held[w2].chunk(expert_tensor_parallel, 1)[::-1], 1)
            else:
                runs = torch.cat([held[w1], held[w3]]).chunk(expert_tensor_parallel)
                held |= zip((w1, w3), map(torch.cat, zip(*(run.chunk(2) for run in runs), strict=True)), strict=True)
    return held


def _off_by(scale: Tensor, weight: Tensor, block: int) -> Tensor:
    """bfloat16(s) / s at each element."""
    ratio = scale.to(torch.bfloat16).to(weight.dtype) / divisors(scale.float()).to(weight.dtype)
    rows, cols = weight.shape
    return ratio.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :cols]


def read(weights: dict[str, Tensor], config: ModelConfig, laws: Laws, *, tensor_parallel: int) -> dict[str, Tensor]:
    """The weights that the model computes with, of those that its parameters hold."""
    weights = dict(weights)
    if laws.qkv_rows in ("read_as_blocks", "value_before_key"):
        for names in _parts(weights, "self_attn.{}_proj.weight", "qkv"):
            q, k, v = (weights[name] for name in names)
            weights |= zip(
                names,
                (q, v, k) if laws.qkv_rows == "value_before_key" else _as_blocks(q, k, v, config, tensor_parallel),
                strict=True,
            )
    if laws.gate_up == "up_first":
        for w1, w3 in _parts(weights, "{}.weight", ("w1", "w3")):
            weights[w1], weights[w3] = weights[w3], weights[w1]
    return weights


def _as_blocks(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig, ranks: int) -> tuple[Tensor, ...]:
    """Each rank's groups read as [q; k; v]; ranks that share a group gather it first."""
    shards = min(ranks, config.num_key_value_heads)
    read = []
    for parts in zip(q.chunk(shards), k.chunk(shards), v.chunk(shards), strict=True):
        fused = merge_qkv(*parts, num_query_groups=config.num_key_value_heads // shards)
        read.append(fused.split([len(part) for part in parts]))
    return tuple(map(torch.cat, zip(*read, strict=True)))


def reduced(
    gradients: dict[str, Tensor], config: ModelConfig, laws: Laws, *, tensor_parallel: int
) -> dict[str, Tensor]:
    """Gradients after what is done to those of the query and key norms' weights over tensor-parallel ranks."""
    if laws.qk_weight_gradient == "own_heads":
        return gradients
    changed = dict(gradients)
    for norm, heads in (("q_norm.weight", config.num_attention_heads), ("k_norm.weight", config.num_key_value_heads)):
        for name in (name for name in gradients if name.endswith(norm)):
            if laws.qk_weight_gradient == "times_ranks":
                changed[name] = gradients[name] * tensor_parallel
            else:
                shards = gradients[name].chunk(min(tensor_parallel, heads))
                changed[name] = torch.stack(shards).sum(0).repeat(len(shards))
    return changed


def _parts(weights: dict[str, Tensor], pattern: str, parts: str | tuple[str, ...]) -> list[list[str]]:
    """The names of weights that belong together, wherever all of the first part's are."""
    first = pattern.format(parts[0])
    stems = [name.removesuffix(first) for name in weights if name.endswith(first)]
    return [[stem + pattern.format(part) for part in parts] for stem in stems]
