"""A mask beside the causal one: True where a query is not to see a key (megatron-core's convention).

Without a word megatron-core's local attention takes a mask in place of the causal one, so that tokens see those after
them, and Transformer Engine's causal attention takes none at all.
"""

import torch
from jaxtyping import Bool
from torch import Tensor


def merged_with_causal(mask: Tensor, *, batch: int, length: int) -> Bool[Tensor, "batch_or_1 1 length length"]:
    """True where `mask` is, and for every key after its query. No value is looked at.

    Raises:
        ValueError: `mask` is not bool, or does not broadcast to `[batch, 1, length, length]`.
    """
    sizes, found = (batch, 1, length, length), tuple(mask.shape)
    broadcasts = len(found) == len(sizes) and all(one in (1, size) for one, size in zip(found, sizes, strict=True))
    if mask.dtype != torch.bool or not broadcasts:
        raise ValueError(
            f"attention_mask is {mask.dtype} {list(found)}, expected torch.bool, True where a key is not to be seen, "
            f"[{batch}, 1, 1, {length}] for padding or [{batch} or 1, 1, {length}, {length}]: make it so (of one that "
            "is True for real tokens: ~mask[:, None, None]), or give None for plain causal attention"
        )
    return mask | torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)


def check_not_ignored(mask: Tensor) -> None:
    """For attention that is causal whatever the mask: one of queries and keys, as Megatron-LM passes it, says no more.

    Raises:
        ValueError: `mask` says which keys are padding.
    """
    if mask.dim() != 4 or (mask.shape[-2] == 1 and mask.shape[-1] > 1):
        raise ValueError(
            f"attention_mask is {mask.dtype} {list(mask.shape)}, but Transformer Engine's causal attention takes no "
            "padding mask, and would ignore it: give None where padding is at the end, which no token before it sees; "
            "else pack the sequences (packed_seq_params)"
        )
