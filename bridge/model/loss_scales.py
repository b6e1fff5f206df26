"""Scales that megatron-core's schedules leave in the process, and that another loop there would train with.

An auxiliary loss has no place in the loss that a schedule runs backward: a class has the factor of its gradient, as the
schedule set it last. A `backward()` without a schedule has the factor 1 in a fresh process.
"""

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler


def reset_loss_scales() -> None:
    """The factors of the load-balancing and multi-token-prediction losses are as in a fresh process."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
