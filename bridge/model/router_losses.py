"""What megatron-core keeps of a router's losses for the whole process, and another model or loop there would meet.

An auxiliary loss has no place in the loss that a schedule runs backward: a class has the factor of its gradient, as the
schedule set it last. A `backward()` without a schedule has the factor 1 in a fresh process. For logs losses are added
up in a tracker, which has as many layers as the first model that used it.
"""

import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler


def forget_router_losses() -> None:
    """Factors and tracker of the load-balancing and multi-token-prediction losses are as in a fresh process."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    destroy_moe_metrics_tracker()
