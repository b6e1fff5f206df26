"""The norms for megatron-core's own attention on one CPU process; on ranks, `test_training` has them in its layouts."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from bridge import FullDimKNorm, FullDimQNorm
from reference.norm import full_dim_rms_norm

HEADS, DIM, EPS = 6, 8, 1e-5


@pytest.mark.parametrize(
    ("module", "groups", "heads"), [(FullDimQNorm, 2, HEADS), (FullDimKNorm, 2, 2), (FullDimKNorm, None, HEADS)]
)
def test_heads_are_those_of_the_config(module, groups, heads):
    config = TransformerConfig(
        num_layers=1, hidden_size=48, num_attention_heads=HEADS, use_cpu_initialization=True, params_dtype=torch.float64
    )
    config.num_query_groups = groups
    norm = module(config=config, hidden_size=DIM, eps=EPS)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 2, heads, DIM), (heads * DIM,))
    )
    norm.load_state_dict({"weight": weight})
    torch.testing.assert_close(norm(x), full_dim_rms_norm(x, weight, eps=EPS), rtol=1e-12, atol=1e-12)
