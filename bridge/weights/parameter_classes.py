"""Which parameters weights can be loaded into and exported from: plain tensors with memory of their own.

A parameter that is stored otherwise takes a write to its slice without an error, in the wrong place or in a copy (seen:
bfloat16 values written into FP8 storage, then an illegal memory access). So it is found before anything is read.
"""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PLAIN = (Tensor, nn.Parameter)


def check_plain(chunk: nn.Module) -> None:
    """Look at every parameter and buffer of a rank's chunk.

    Raises:
        ValueError: one is a DTensor, on the meta device, or of another class of tensors, such as Transformer Engine's
            quantised ones; names the first.
    """
    for name, value in (*chunk.named_parameters(), *chunk.named_buffers()):
        found = _other_storage(value)
        if found is not None:
            raise ValueError(
                f"{name}: {found}; weights are loaded into and exported from plain tensors only: found "
                f"{type(value).__name__} on {value.device}"
            )


def _other_storage(value: Tensor) -> str | None:
    """What is the matter with a tensor, and what to do; None if it is plain."""
    if isinstance(value, DTensor):
        return (
            "a DTensor, as Megatron-FSDP and torch's FSDP make them; load before wrapping the model, and shard with "
            "the distributed optimizer (use_distributed_optimizer=True) instead"
        )
    if type(value) not in PLAIN:
        return "stored in another form; build the model with fp8_param=False and fp4_param=False"
    if value.is_meta:
        return "it has no values yet; build the model with init_model_with_meta_device=False"
    return None
