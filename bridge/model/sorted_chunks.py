"""Tokens that come from one rank are in the order of their experts: they are not sorted once more.

Every rank sends its tokens expert by expert, so one that gets them from several ranks sorts their chunks by expert, and
back afterwards. megatron-core does so also where there is but one rank, and copies every token twice for nothing, in
the forward and in the backward pass.
"""

from typing import Any

from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from bridge.model.wrap_once import Function, wrap_once

ORDERS = ("sort_input_by_local_experts", "restore_output_by_local_experts")


def leave_sorted(model: nn.Module) -> None:
    """In every layer of experts whose tokens all come from this rank."""
    wrap_once(token_dispatcher, "sort_chunks_by_idxs", _but_not_what_has_no_order)
    for module in model.modules():
        dispatcher: Any = getattr(module, "token_dispatcher", None)
        if type(dispatcher) is MoEAlltoAllTokenDispatcher and dispatcher.tp_size * dispatcher.ep_size == 1:
            for name in ORDERS:
                setattr(dispatcher, name, None)


def _but_not_what_has_no_order(theirs: Function) -> Function:
    def sort_chunks(
        input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor | None, probs: Tensor | None = None, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        if sorted_idxs is None:
            return input, probs
        return theirs(input, split_sizes, sorted_idxs, probs=probs, **named)

    return sort_chunks
