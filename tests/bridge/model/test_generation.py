"""Generation with a key/value cache: every token's logits are those of the whole sequence, whatever attends."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention as megatron_attention
from support.small_model import DEVICE, SMALL, TOKENS, logits_of

from bridge.model.build import build_gpt_model, build_model
from bridge.model.process_groups import model_parallel
from reference.model_class import ModelClass


@pytest.fixture(autouse=True)
def _groups():
    with model_parallel():
        yield


def _generate(model, *, decode_mode=False):
    """A prompt, then token by token, with a cache; the last token's logits of each piece."""
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=TOKENS.shape[1])
    pieces = []
    with torch.no_grad():
        for start, stop in [(0, 5), (5, 6), (6, 7), (7, 8), (8, 9)]:
            positions = torch.arange(start, stop, device=DEVICE).expand(2, -1)
            piece = model(TOKENS[:, start:stop], positions, None, inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(stop - start)
            if decode_mode:
                context.enable_decode_mode()
            pieces.append(piece[:, -1:])
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("kind", ModelClass)
def test_generation_with_a_cache_equals_the_whole_sequence(kind):
    """megatron-core's static inference; the cache holds normed and rotated keys."""
    model = build_model(SMALL, model=kind, params_dtype=torch.float32).eval()
    torch.testing.assert_close(_generate(model), logits_of(model, TOKENS)[:, 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ModelClass)
def test_flash_decode_without_an_engine_is_refused(kind):
    """megatron-core's own attention would leave queries and keys unrotated there."""
    model = build_model(SMALL, model=kind, params_dtype=torch.float32, flash_decode=True).eval()
    with pytest.raises(ValueError, match=r"InferenceMode\.active\(\), or set flash_decode=False"):
        _generate(model)


def test_flash_decode_without_flash_attn_is_refused(monkeypatch):
    """megatron-core's own attention would rotate the prompt by other angles."""
    monkeypatch.setattr(megatron_attention, "flash_attn_with_kvcache", None)
    model = build_gpt_model(SMALL, params_dtype=torch.float32, flash_decode=True).eval()
    with InferenceMode.active(), pytest.raises(ValueError, match="install flash-attn, or set flash_decode=False"):
        _generate(model)


def test_flash_decode_in_a_hybrid_model_is_refused():
    """Which prepares no cos and sin for it."""
    model = build_model(SMALL, model="hybrid", params_dtype=torch.float32, flash_decode=True).eval()
    with InferenceMode.active(), pytest.raises(ValueError, match=r"as in megatron-core's HybridModel: .*Use GPTModel"):
        _generate(model)


def _rotate(x, cos, sin, interleaved=False):
    """flash-attn's `apply_rotary_emb` on [batch, seq, heads, head_dim]."""
    assert not interleaved
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _attend_with_cache(*, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved):
    """flash-attn's `flash_attn_with_kvcache` for one token of each sample, all at the same position."""
    (position,) = cache_seqlens.unique().tolist()
    here = slice(position, position + 1)
    q, k = (_rotate(x, rotary_cos[here], rotary_sin[here], rotary_interleaved) for x in (q, k))
    k_cache[:, here], v_cache[:, here] = k, v
    keys, values = (x[:, : position + 1].repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k_cache, v_cache))
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(
        1, 2
    )


def test_flash_decode_equals_the_whole_sequence(monkeypatch):
    """With stand-ins for flash-attn's two functions, which are not here: the norm comes before their rotation."""
    monkeypatch.setattr(rope_utils, "apply_rotary_emb_flash", _rotate)
    monkeypatch.setattr(megatron_attention, "flash_attn_with_kvcache", _attend_with_cache)
    model = build_gpt_model(SMALL, params_dtype=torch.float32, flash_decode=True).eval()
    with InferenceMode.active():
        found = _generate(model, decode_mode=True)
    torch.testing.assert_close(found, logits_of(model, TOKENS)[:, 4:], rtol=1e-5, atol=1e-5)
