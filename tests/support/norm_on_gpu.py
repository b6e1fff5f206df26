"""Numbers, norms and tables of the rotation on a GPU, for the tests that run there."""

import torch
from torch import Tensor

from compiled import FullDimQKNorm
from reference.rope import rotary_tables

EPS, FLOAT64 = 1e-6, torch.float64


def normal(*shape: int, dtype: torch.dtype = FLOAT64, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=FLOAT64, device="cuda").to(dtype)


def qk_norm(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> FullDimQKNorm:
    norm = FullDimQKNorm(heads, kv_heads, head_dim, lambda: None, EPS, dtype).cuda()
    with torch.no_grad():
        norm.q_weight.copy_(1 + 0.3 * normal(heads * head_dim, seed=1))
        norm.k_weight.copy_(1 + 0.3 * normal(kv_heads * head_dim, seed=2))
    return norm


def rotated(seq: int, rotary: int, dtype: torch.dtype) -> list[Tensor]:
    return [table.cuda() for table in rotary_tables(torch.arange(seq), rotary, 1e4, dtype=dtype)] if rotary else []
