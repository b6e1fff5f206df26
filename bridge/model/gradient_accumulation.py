"""`gradient_accumulation_fusion` without APEX.

With it a layer's product adds a weight's gradient to the float32 sum (`main_grad`, which `DistributedDataParallel`
makes) itself. Without it the product writes a bfloat16 gradient, which is rounded, and another kernel adds that: for
each weight and microbatch 12 bytes an element are moved instead of 8. Transformer Engine's layers can do it for
themselves. megatron-core's output layer asks for an extension of APEX, and fails without it; so it alone goes without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Accumulate = Callable[[nn.Module], None]
TOGETHER = "adds_together"  # an attribute, which other wrappers hand on


@contextmanager
def accumulating_in_transformer_engine(config: TransformerConfig) -> Iterator[Accumulate]:
    """Inside, a model of this configuration can be made where APEX is not installed; then call what is yielded on it.

    The configuration is as it was afterwards. Of other layers than Transformer Engine's, and where APEX is installed,
    nothing is changed.
    """
    fused = config.gradient_accumulation_fusion and config.transformer_impl == "transformer_engine"
    alone = fused and not layers._grad_accum_fusion_available
    if fused:
        _add_those_of_experts_together()

    def accumulate(model: nn.Module) -> None:
        modules: Iterator[Any] = model.modules()
        for module in modules if alone else ():
            if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's name
                module.fuse_wgrad_accumulation = True

    config.gradient_accumulation_fusion = config.gradient_accumulation_fusion and not alone
    try:
        yield accumulate
    finally:
        config.gradient_accumulation_fusion = config.gradient_accumulation_fusion or alone


def _add_those_of_experts_together() -> None:
    """In every grouped layer of this process that accumulates in float32, from now on."""
    from transformer_engine.pytorch.module import grouped_linear  # pyright: ignore[reportMissingImports]

    from compiled.experts import add_weight_gradients

    theirs = grouped_linear.general_grouped_gemm
    if hasattr(theirs, TOGETHER):
        return

    @wraps(theirs)
    def product(a: list[Any], b: list[Any], out: list[Any], *rest: Any, **named: Any) -> Any:
        """Of weights' gradients: inputs, gradients of outputs, and what to add to."""
        sums = named.get("layout") == "NT" and named.get("accumulate") and not named.get("use_bias")
        if not (sums and can_be_added(a[0], b[0], out[0])):
            return theirs(a, b, out, *rest, **named)
        add_weight_gradients(a, b, out)
        return out, [None] * len(out), None

    setattr(product, TOGETHER, True)
    grouped_linear.general_grouped_gemm = product


def can_be_added(x: Any, grad: Any, total: Any) -> bool:
    """Whether the kernel is for these: not quantised, in half precision, rows of whole 16 bytes; and no capture."""
    plain = type(x) is Tensor and type(grad) is Tensor and total.dtype == torch.float32
    plain = plain and not torch.cuda.is_current_stream_capturing()  # numbers of rows are sent to the GPU
    return plain and x.dtype in (torch.bfloat16, torch.float16) and not (x.shape[1] % 8 or grad.shape[1] % 8)
