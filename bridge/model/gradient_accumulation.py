"""`gradient_accumulation_fusion` without APEX.

With it a layer's product adds a weight's gradient to the float32 sum (`main_grad`, which `DistributedDataParallel`
makes) itself. Without it the product writes a bfloat16 gradient, which is rounded, and another kernel adds that: for
each weight and microbatch 12 bytes an element are moved instead of 8. Transformer Engine's layers can do it for
themselves. megatron-core's output layer asks for an extension of APEX, and fails without it; so it alone goes without.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from bridge.model.wrap_once import Function, wrap_once


def build_accumulating[Model: nn.Module](
    make: Callable[..., Model], config: TransformerConfig, **arguments: Any
) -> Model:
    """`make(config=config, **arguments)`, with `gradient_accumulation_fusion` where `config` asks for it.

    Of other layers than Transformer Engine's, and where APEX is installed, megatron-core does it alone.
    """
    asked = config.gradient_accumulation_fusion
    fused = asked and config.transformer_impl == "transformer_engine"
    alone = fused and not layers._grad_accum_fusion_available
    if fused:
        _add_those_of_experts_together()
    config.gradient_accumulation_fusion = asked and not alone
    try:
        model = make(config=config, **arguments)
    finally:
        config.gradient_accumulation_fusion = asked
    modules: Any = model.modules()
    for module in modules if alone else ():
        if hasattr(module, "fuse_wgrad_accumulation"):  # Transformer Engine's name
            module.fuse_wgrad_accumulation = True
    return model


def _add_those_of_experts_together() -> None:
    """In every grouped layer of this process that accumulates in float32, from now on."""
    from transformer_engine.pytorch.module import grouped_linear  # pyright: ignore[reportMissingImports]

    wrap_once(grouped_linear, "general_grouped_gemm", _with_sums_together)


def _with_sums_together(theirs: Function) -> Function:
    from compiled.experts import add_weight_gradients

    def product(a: list[Any], b: list[Any], out: list[Any], *rest: Any, **named: Any) -> Any:
        """Of weights' gradients: inputs, gradients of outputs, and what to add to."""
        sums = named.get("layout") == "NT" and named.get("accumulate") and not named.get("use_bias")
        if not (sums and can_be_added(a[0], b[0], out[0])):
            return theirs(a, b, out, *rest, **named)
        add_weight_gradients(a, b, out)
        return out, [None] * len(out), None

    return product


def can_be_added(x: Any, grad: Any, total: Any) -> bool:
    """Whether the kernel is for these: not quantised, in half precision, rows of whole 16 bytes; and no capture."""
    plain = type(x) is Tensor and type(grad) is Tensor and total.dtype == torch.float32
    plain = plain and not torch.cuda.is_current_stream_capturing()  # numbers of rows are sent to the GPU
    return plain and x.dtype in (torch.bfloat16, torch.float16) and not (x.shape[1] % 8 or grad.shape[1] % 8)
