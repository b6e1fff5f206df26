"""RMSNorm over the hidden size: the norms before attention, before the experts and at the end."""

import torch
from torch import Tensor, nn

from compiled.collectives import ranks_of
from compiled.full_dim_norm import head_norm
from compiled.norm_plain import Setting


class RMSNorm(nn.Module):
    """y = w * round(x r), r = (mean(x^2) + eps)^(-1/2), over the last axis of `[seq, batch, hidden]`.

    The same function as the query and key norms, of one head as wide as the hidden state, on one rank.

    Args:
        sequence_parallel: marks the weight: each rank has some of the tokens, and megatron-core then sums the weight's
            gradients over the tensor-parallel ranks.
    """

    def __init__(
        self, hidden: int, eps: float = 1e-6, dtype: torch.dtype | None = None, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        hidden = len(self.weight)
        if x.dim() != 3 or x.shape[-1] != hidden:
            raise ValueError(f"x must be [seq, batch, {hidden}], as wide as the weight: found {tuple(x.shape)}")
        setting = Setting((hidden,), self.eps, hidden, ())
        (y,) = head_norm(setting, ranks_of(None), (1,), None, None, [self.weight], [x.unsqueeze(-2)])
        return y.squeeze(-2)
