"""The mixture of experts against transformers' router and block, and against megatron-core's loss and bias rules."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    get_updated_expert_bias,
    switch_load_balancing_loss_func,
    topk_routing_with_score_function,
)
from support.checks import assert_calibrated, assert_relative
from support.oracles import (
    BFLOAT16,
    CASES,
    FLOAT32,
    FLOAT64,
    chosen_experts,
    disk_weights,
    hf_model,
    remove_float32_casts,
)
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

from reference.moe import load_balancing_loss, moe_block, route, tokens_per_expert, update_expert_bias

# tokens, hidden, experts, top_k
ROUTERS = [(50, 96, 8, 1), (50, 136, 8, 2), (40, 72, 12, 4), (64, 200, 32, 8), (128, 64, 256, 8), (9, 33, 5, 5)]
BLOCK_CASES = ["6to1_half_hd128_top8", "1to1_odd_quarter_hd128_top4", "1to1_quarter_hd64_top1"]


def draw(tokens, hidden, experts, dtype=FLOAT32, seed=0):
    """hidden states in `dtype`; router weight and bias float32 at least, as the checkpoint has them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=FLOAT64).to(dtype)
    weight = torch.randn(experts, hidden, generator=generator, dtype=FLOAT64) / hidden**0.5
    bias = 0.2 * torch.randn(experts, generator=generator, dtype=FLOAT64)
    wide = torch.promote_types(dtype, FLOAT32)
    return x, weight.to(wide), bias.to(wide)


def dense(indices, weights, experts):
    """[tokens, experts] with each chosen expert's weight in its column: independent of the order of the choice."""
    return torch.zeros(len(indices), experts, dtype=weights.dtype).scatter(1, indices, weights)


def hf_route(x, weight, bias, top_k):
    config = CASES["2to1_half_hd128_top7"].hf_config()
    config.num_experts_per_tok, (config.num_local_experts, config.hidden_size) = top_k, weight.shape
    router = MiniMaxM2TopKRouter(config)
    del router.weight
    router.weight = weight
    return router(x, bias)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT64])
@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), ROUTERS)
def test_route_is_transformers_router(tokens, hidden, experts, top_k, dtype, monkeypatch):
    """Bit for bit: a matrix product, a sigmoid, a choice and one division, the same in both."""
    if dtype == FLOAT64:
        remove_float32_casts(monkeypatch)
    x, weight, bias = draw(tokens, hidden, experts, dtype)
    routing = route(x, weight, bias, top_k=top_k)
    logits, weights, indices = hf_route(x, weight, bias, top_k)
    assert routing.logits.dtype == routing.weights.dtype == weight.dtype
    assert torch.equal(routing.logits, logits)
    assert torch.equal(routing.experts.sort(-1).values, indices.sort(-1).values)
    # The sum that normalises runs over the choice in its own order, so the last bits of k terms may differ.
    close = {"rtol": (top_k + 1) * torch.finfo(weight.dtype).eps, "atol": 0.0}
    torch.testing.assert_close(dense(*routing[:2], experts), dense(indices, weights, experts), **close)


@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), ROUTERS)
def test_bias_enters_the_choice_and_nothing_else(tokens, hidden, experts, top_k):
    x, weight, bias = draw(tokens, hidden, experts, FLOAT64)
    routing = route(x, weight, bias, top_k=top_k)
    unbiased = chosen_experts(routing.logits, 0.0, top_k)
    changed = (routing.experts.sort(-1).values != unbiased).any(-1)
    assert changed.any() or top_k == experts
    scores = routing.logits.sigmoid().gather(1, routing.experts)
    assert_relative(routing.weights, scores / scores.sum(-1, keepdim=True), 1e-15)
    shifted = route(x, weight, bias + 0.5, top_k=top_k)
    assert torch.equal(shifted.experts.sort(-1).values, routing.experts.sort(-1).values)
    assert torch.equal(shifted.logits, routing.logits)


@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), ROUTERS)
def test_route_is_megatrons_top_k_routing(tokens, hidden, experts, top_k):
    """From top-2 on. At top-1 megatron-core leaves the score as it is, where transformers divides it by itself."""
    x, weight, bias = draw(tokens, hidden, experts)
    routing = route(x, weight, bias, top_k=top_k)
    probs, chosen = topk_routing_with_score_function(routing.logits, top_k, score_function="sigmoid", expert_bias=bias)
    ours = dense(*routing[:2], experts)
    assert torch.equal(ours > 0, chosen)
    if top_k == 1:
        assert torch.equal(probs, torch.where(chosen, routing.logits.sigmoid(), 0.0))
        assert torch.equal(routing.weights, torch.ones_like(routing.weights))
    else:
        torch.testing.assert_close(ours, probs, rtol=(top_k + 1) * torch.finfo(FLOAT32).eps, atol=0)


def run_block(case, weights, hidden, dtype):
    """Output and the gradients of the hidden state and router, by us and by transformers."""
    prefix = "model.layers.0.block_sparse_moe."
    values = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    module = hf_model(case, weights, dtype).model.layers[0].mlp
    g = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3)).to(BFLOAT16).to(dtype)
    runs = []
    for ours in (True, False):
        x = hidden.clone().requires_grad_()
        gate = values["gate.weight"].clone().requires_grad_() if ours else module.gate.weight
        if ours:
            y = moe_block(x, values | {"gate.weight": gate}, case.model_config())
        else:
            y = module(x.transpose(0, 1).contiguous()).transpose(0, 1)
        dx, dgate = torch.autograd.grad(y, (x, gate), g)
        runs.append({"y": y.detach(), "dx": dx} | ({"dgate": dgate} if case.top_k > 1 else {}))
    return runs


@pytest.mark.parametrize("name", BLOCK_CASES)
def test_moe_block(name, monkeypatch):
    """Sums of at most 256 terms a matrix and 8 experts a token: float64 to 1e-12, float32 calibrated."""
    case = CASES[name]
    weights = disk_weights(case)
    hidden = torch.randn(8, 3, case.hidden, generator=torch.Generator().manual_seed(2))
    ours, theirs = run_block(case, weights, hidden, FLOAT32)
    remove_float32_casts(monkeypatch)
    wide = {key: value.double() for key, value in weights.items()}
    ours64, truth = run_block(case, wide, hidden.double(), FLOAT64)
    for key in truth:
        assert_relative(ours64[key], truth[key], 1e-12, key)
        assert_calibrated(ours[key], theirs[key], truth[key], key)


# ---------------------------------------------------------------------------------------------------------- balancing


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize(("tokens", "hidden", "experts", "top_k"), ROUTERS)
def test_load_balancing_loss_is_megatrons_bit_for_bit(tokens, hidden, experts, top_k, dtype):
    x, weight, _ = draw(tokens, hidden, experts)
    logits = (x @ weight.T).to(dtype)
    coefficient = 0.001

    ours_logits = logits.clone().requires_grad_()
    ours = load_balancing_loss(ours_logits, top_k=top_k, coefficient=coefficient)
    theirs_logits = logits.clone().requires_grad_()
    chosen, probs = compute_routing_scores_for_aux_loss(theirs_logits, top_k, "sigmoid")
    theirs = switch_load_balancing_loss_func(probs, chosen.sum(0), tokens, top_k, experts, coefficient)

    assert ours.item() == theirs.item() > 0
    ours_grad, theirs_grad = (torch.autograd.grad(*pair)[0] for pair in ((ours, ours_logits), (theirs, theirs_logits)))
    assert torch.equal(ours_grad, theirs_grad)
    assert ours_grad.any()


def test_load_balancing_loss_of_even_and_collapsed_routers():
    """Even use gives the coefficient itself (f = P = 1/E); one expert with all tokens and all score, E times it."""
    high, experts = 40.0, 4
    even = torch.full((experts, experts), -high).fill_diagonal_(high)
    collapsed = torch.full((8, experts), -high)
    collapsed[:, 2] = high
    assert load_balancing_loss(even, top_k=1, coefficient=0.5).item() == pytest.approx(0.5, rel=1e-6)
    assert load_balancing_loss(collapsed, top_k=1, coefficient=0.5).item() == pytest.approx(0.5 * experts, rel=1e-6)


def test_tokens_per_expert_counts_every_choice():
    experts = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert tokens_per_expert(experts, 6).tolist() == [2, 1, 0, 3, 0, 0]


@pytest.fixture(scope="module")
def one_rank():
    """A process group of this process alone: megatron-core's bias update all-reduces the counts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("counts", [[5, 1, 3, 3], [0, 0, 0, 12], [2, 2, 2, 2], [1, 2, 4], [7, 0, 0, 1, 2]])
def test_expert_bias_update_is_megatrons_bit_for_bit(counts, one_rank):
    counts = torch.tensor(counts)
    bias = 0.1 * torch.randn(len(counts), generator=torch.Generator().manual_seed(0))
    ours = update_expert_bias(bias, counts, rate=1e-3)
    assert torch.equal(ours, get_updated_expert_bias(counts.clone(), bias, 1e-3, one_rank))
    mean = counts.double().mean()
    signs = [(mean > count).int().item() - (mean < count).int().item() for count in counts]
    torch.testing.assert_close(ours - bias, 1e-3 * torch.tensor(signs, dtype=FLOAT32), rtol=0, atol=2.0**-24)
