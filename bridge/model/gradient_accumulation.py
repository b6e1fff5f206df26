"""`gradient_accumulation_fusion` without APEX.

With it a layer's product adds a weight's gradient to the float32 sum (`main_grad`, which `DistributedDataParallel`
makes) itself. Without it the product writes a bfloat16 gradient, which is rounded, and another kernel adds that: for
each weight and microbatch 12 bytes an element are moved instead of 8. Transformer Engine's layers can do it for
themselves. megatron-core's output layer asks for an extension of APEX, and fails without it; so it alone goes without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

Accumulate = Callable[[nn.Module], None]


@contextmanager
def accumulating_in_transformer_engine(config: TransformerConfig) -> Iterator[Accumulate]:
    """Inside, a model of this configuration can be made where APEX is not installed; then call what is yielded on it.

    The configuration is as it was afterwards. Of other layers than Transformer Engine's, and where APEX is installed,
    nothing is changed.
    """
    alone = (
        config.gradient_accumulation_fusion
        and config.transformer_impl == "transformer_engine"
        and not layers._grad_accum_fusion_available
    )

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
