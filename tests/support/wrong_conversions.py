"""Mistakes of converters, planted into the tensors of a checkpoint by slicing, as the converters themselves would.

Nothing here knows of `reference`: each function changes a dictionary of tensors under on-disk names, of bfloat16 values
or of float8 codes with scales. `SIZES` is the model.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from support.checkpoints import SCALE

GROUPS, PER_GROUP, WIDTH, ROTATED = 2, 4, 32, 16
EXPERTS, LAYERS = 4, 4
SIZES = {
    **SMALL_CONFIG,
    "vocab_size": 300,
    "hidden_size": GROUPS * PER_GROUP * WIDTH,  # so that q_proj and o_proj are square
    "intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": GROUPS * PER_GROUP,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "rotary_dim": ROTATED,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}
Tensors = dict[str, Tensor]
Plant = Callable[[Tensors, Tensors], object]
"""(tensors to change, the original's float8 tensors)"""

LAYER = "model.layers.1."
Q, K, V, OUTPUT = (f"{LAYER}self_attn.{one}_proj.weight" for one in "qkvo")
Q_NORM, K_NORM = (f"{LAYER}self_attn.{one}_norm.weight" for one in "qk")
GATE, BIAS = f"{LAYER}block_sparse_moe.gate.weight", f"{LAYER}block_sparse_moe.e_score_correction_bias"
W1, W2, W3 = (f"{LAYER}block_sparse_moe.experts.2.w{one}.weight" for one in (1, 2, 3))
INPUT_NORM, POST_NORM = f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expert(number: int, part: int, layer: int = 1) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.w{part}.weight"


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def decoded(original: Tensors, name: str, scales: Callable[[Tensor], Tensor] = lambda scales: scales) -> Tensor:
    """In float32, by other scales."""
    codes = original[name].to(torch.float32)
    return codes * spread(scales(original[name + SCALE]), codes.shape)


def by_scales(name: str, scales: Callable[[Tensor], Tensor]) -> Plant:
    def plant(tensors: Tensors, original: Tensors) -> None:
        tensors[name] = decoded(original, name, scales).to(torch.bfloat16)

    return plant


def each(change: Callable[[Tensor], Tensor], *names: str) -> Plant:
    return lambda tensors, _: tensors.update({name: change(tensors[name]) for name in names})


def moved(names: dict[str, str]) -> Plant:
    """What a name has becomes another name's value, with its scales."""

    def plant(tensors: Tensors, _: Tensors) -> None:
        pairs = [(to + end, source + end) for to, source in names.items() for end in ("", SCALE)]
        tensors.update({to: tensors[source].clone() for to, source in pairs if to in tensors})

    return plant


def qkv_cut_as_concatenated(tensors: Tensors, _: Tensors) -> None:
    """Fused group by group, as Megatron has it, and cut as if it were [q; k; v]."""
    q, k, v = (tensors[name] for name in (Q, K, V))
    size = PER_GROUP * WIDTH
    groups = [
        (q[g * size : (g + 1) * size], k[g * WIDTH : (g + 1) * WIDTH], v[g * WIDTH : (g + 1) * WIDTH])
        for g in range(GROUPS)
    ]
    fused = torch.cat([rows for group in groups for rows in group])
    tensors[Q], tensors[K], tensors[V] = fused[: len(q)], fused[len(q) : len(q) + len(k)], fused[len(q) + len(k) :]


def heads_by_position(value: Tensor) -> Tensor:
    """Head 0 of each group, head 1 of each group, ..."""
    heads = value.split(WIDTH)
    return torch.cat([heads[g * PER_GROUP + i] for i in range(PER_GROUP) for g in range(GROUPS)])


def heads_reordered(tensors: Tensors, _: Tensors) -> None:
    tensors[Q], tensors[Q_NORM] = heads_by_position(tensors[Q]), heads_by_position(tensors[Q_NORM])
    tensors[OUTPUT] = heads_by_position(tensors[OUTPUT].T).T.contiguous()


def neighbours_paired(value: Tensor) -> Tensor:
    """Channels 0, 8, 1, 9, ... of the 16 that are rotated."""
    order = [i // 2 + (ROTATED // 2) * (i % 2) for i in range(ROTATED)] + list(range(ROTATED, WIDTH))
    return torch.cat([head[order] for head in value.split(WIDTH)])


def gate_up_cut_as_interleaved(tensors: Tensors, _: Tensors) -> None:
    fused = torch.cat((tensors[W1], tensors[W3]))
    tensors[W1], tensors[W3] = fused[0::2], fused[1::2]


def gate_up_of_two_ranks(tensors: Tensors, _: Tensors) -> None:
    gate, up = tensors[W1], tensors[W3]
    half = len(gate) // 2
    fused = torch.cat((gate[:half], up[:half], gate[half:], up[half:]))
    tensors[W1], tensors[W3] = fused[: len(gate)], fused[len(gate) :]


def swap_halves(value: Tensor) -> Tensor:
    half = len(value) // 2
    return torch.cat((value[half:], value[:half]))


def ranks_halves_swapped(tensors: Tensors, _: Tensors) -> None:
    tensors[W1], tensors[W3] = swap_halves(tensors[W1]), swap_halves(tensors[W3])
    tensors[W2] = swap_halves(tensors[W2].T).T.contiguous()


def cut_bits(value: Tensor) -> Tensor:
    """To bfloat16 by its upper bytes."""
    upper = value.to(torch.float32).contiguous().view(torch.uint8).view(*value.shape, 4)[..., 2:]
    return upper.contiguous().view(torch.bfloat16).view(value.shape)


def rounded(change: Callable[[Tensor], Tensor], *names: str) -> Plant:
    """The original's values in float32, rounded some way."""
    return lambda tensors, original: tensors.update({name: change(decoded(original, name)) for name in names})


def encoded_anew(tensors: Tensors, original: Tensors) -> None:
    """On scales of amax / 448 of each block."""
    value = decoded(original, W1).to(torch.bfloat16).to(torch.float32)
    blocks = [[block.abs().max() / 448 for block in rows.split(128, 1)] for rows in value.split(128)]
    scales = torch.tensor(blocks)
    tensors[W1], tensors[W1 + SCALE] = (value / spread(scales, value.shape)).to(torch.float8_e4m3fn), scales


def permuted_experts(order: list[int], layer: int = 1) -> Plant:
    return moved(
        {expert(to, part, layer): expert(source, part, layer) for to, source in enumerate(order) for part in (1, 2, 3)}
    )
