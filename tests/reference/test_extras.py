"""Tensors that are not the model's: which are carried along and which are refused."""

import pytest

from reference.config import ModelConfig
from reference.extras import find_extras

CONFIG = ModelConfig(rotary_dim=64, num_hidden_layers=3)
L = "model.layers.2."

UNNEEDED = [
    f"{L}self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    f"{L}self_attn.rotary_emb.cos_cached",
    f"{L}self_attn.rotary_emb.sin_cached",
    f"{L}self_attn.k_scale",
    f"{L}self_attn.v_scale",
    f"{L}self_attn.q_scale",
    f"{L}self_attn.kv_scale",
    f"{L}self_attn.prob_scale",
    f"{L}self_attn.attn.k_scale",
    f"{L}self_attn.attn.q_scale_inv",
    f"{L}self_attn.k_proj.k_scale",
    f"{L}self_attn.v_proj.v_scale",
    f"{L}self_attn.kv_cache_scale",
    f"{L}self_attn.q_proj.input_scale",
    f"{L}self_attn.k_proj.output_scale",
    f"{L}self_attn.q_proj.activation_scale",
    f"{L}block_sparse_moe.experts.17.w2.input_scale",
    "lm_head.input_scale",
]
UNKNOWN = [
    f"{L}self_attn.q_proj.bias",
    f"{L}self_attn.q_proj.weight_scale",
    f"{L}self_attn.q_proj.weight_scale_inv",
    f"{L}self_attn.rotary_emb.freqs",
    f"{L}self_attn.k_scale.weight",
    f"{L}self_attn.my_k_scale",
    f"{L}self_attn.g_scale",
    f"{L}block_sparse_moe.shared_expert.w1.weight",
    "model.inv_freq",
    "scale",
    "vision_tower.rotary_emb.inv_freqs",
]


def test_what_nothing_needs_is_carried_and_what_is_unknown_is_not():
    found = find_extras(UNNEEDED + UNKNOWN, CONFIG)
    assert (found.mtp, found.unneeded, found.beyond, found.unknown) == ([], UNNEEDED, [], UNKNOWN)


@pytest.mark.parametrize("name", UNNEEDED[:1] + UNNEEDED[6:8])
def test_scales_of_a_layer_that_the_model_does_not_have(name):
    past = name.replace("layers.2", "layers.3")
    assert find_extras([past], CONFIG).beyond == [past]
    both = [past, "model.layers.3.enorm.weight"]
    assert find_extras(both, CONFIG).mtp == both
