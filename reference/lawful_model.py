"""The model's outcome under any `Laws`: logits, loss and the gradient of every weight.

`reference.model.forward` with the functions of `reference.lawful_parts`, on weights stored and read by
`reference.lawful_weights`. Under MiniMax-M2's laws it is the reference's own outcome.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reference.config import ModelConfig
from reference.lawful_parts import lawful_parts
from reference.lawful_weights import read, reduced, stored
from reference.laws import MINIMAX_M2, Laws
from reference.model import forward
from reference.outcome import Outcome

_BIAS = "e_score_correction_bias"  # chooses experts, and has no gradient


def outcome(
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokens: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    *,
    laws: Laws = MINIMAX_M2,
    tensor_parallel: int = 1,
    expert_tensor_parallel: int = 1,
) -> Outcome:
    """What a model under these laws, on that many ranks, makes of the tokens, in the weights' dtype.

    The gradient of a weight that nothing depends on (an expert that no token chose) is zeros.

    Args:
        config: the model's sizes.
        weights: dequantised, under their on-disk names; scales (`<name>_scale_inv`) may be among them.
        tokens: what the model reads.
        labels: what it should say after each of them.
        laws: what to compute by.
        tensor_parallel: how many ranks share heads, and, under sequence parallelism, tokens.
        expert_tensor_parallel: how many ranks share each expert.
    """
    held = stored(weights, config, laws, expert_tensor_parallel=expert_tensor_parallel)
    leaves = {name: value.detach().requires_grad_(not name.endswith(_BIAS)) for name, value in held.items()}
    logits = _logits(config, leaves, tokens, laws, tensor_parallel)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True, allow_unused=True)
    named = dict(zip(trained, gradients, strict=True))
    return Outcome(logits.detach(), loss.detach(), reduced(named, config, laws, tensor_parallel=tensor_parallel))


def logits(
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokens: Int[Tensor, "batch seq"],
    *,
    laws: Laws = MINIMAX_M2,
    tensor_parallel: int = 1,
    expert_tensor_parallel: int = 1,
) -> Float[Tensor, "batch seq vocab"]:
    """The logits of `outcome` alone, which are cheaper."""
    held = stored(weights, config, laws, expert_tensor_parallel=expert_tensor_parallel)
    with torch.no_grad():
        return _logits(config, held, tokens, laws, tensor_parallel)


def _logits(config: ModelConfig, held: dict[str, Tensor], tokens: Tensor, laws: Laws, tensor_parallel: int) -> Tensor:
    parts = lawful_parts(laws, config, tensor_parallel=tensor_parallel)
    return forward(read(held, config, laws, tensor_parallel=tensor_parallel), tokens, config, parts=parts)
