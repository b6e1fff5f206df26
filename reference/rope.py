"""Partial rotary position embedding: the first `rotary_dim` channels of each head rotate, the others stay as they are.

The pairing is half-split: channel i belongs with channel i + rotary_dim/2 (not with its neighbour), and pair i rotates
by position * inv_freq[i]. Angles are computed in float32 or wider; cosines and sines are rounded to the activations'
dtype, as Hugging Face does, and the rotation is then computed in float32 or wider and rounded once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reference.norm import compute_dtype


def inverse_frequencies(
    rotary_dim: int, theta: float, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " {rotary_dim}//2"]:
    """inv_freq[i] = theta^(-2 i / rotary_dim), in radians a position, for i = 0 .. rotary_dim/2 - 1.

    Source: `transformers` minimax_m2: MiniMaxM2RotaryEmbedding.compute_default_rope_parameters.
    """
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=dtype) / rotary_dim)


def rotary_tables(
    positions: Int[Tensor, " seq"], rotary_dim: int, theta: float, *, dtype: torch.dtype
) -> tuple[Float[Tensor, "seq {rotary_dim}//2"], Float[Tensor, "seq {rotary_dim}//2"]]:
    """cos and sin of position * inv_freq, rounded to `dtype`."""
    wide = compute_dtype(dtype)
    inv_freq = inverse_frequencies(rotary_dim, theta, dtype=wide).to(positions.device)
    angles = positions[:, None].to(wide) * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(
    x: Float[Tensor, "seq batch heads head_dim"], cos: Float[Tensor, "seq half"], sin: Float[Tensor, "seq half"]
) -> Float[Tensor, "seq batch heads head_dim"]:
    """(a, b) -> (a cos - b sin, b cos + a sin), where a and b are the two halves of the first 2 x `half` channels.

    Source: `transformers` minimax_m2: apply_rotary_pos_emb.
    """
    half = cos.shape[-1]
    wide = compute_dtype(x.dtype)
    c, s = cos.to(wide)[:, None, None], sin.to(wide)[:, None, None]
    a, b = x[..., :half].to(wide), x[..., half : 2 * half].to(wide)
    rotated = torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)
    return torch.cat([rotated, x[..., 2 * half :]], -1)
