"""The whole model against transformers' MiniMaxM2ForCausalLM: logits, loss and the gradient of every parameter.

Each model of `oracles.CASES` runs three times:

float64   both implementations, transformers with its float32 casts replaced: equal to 1e-10, tensor by tensor.
float32   transformers as it is: our error against float64 at most twice its own.
bfloat16  likewise. Router weight and bias hold bfloat16-representable values on both sides.

The choice of experts is a step function. The token sequences are those, of 256 random ones, whose choices are furthest
from a tie (`oracles.settled_tokens`), and every run asserts that it chose the experts that float64 chose: no result
here leans on a flipped choice.

Calibrated errors are taken over transformers' own parameters, in which a layer's experts are one tensor: the largest
error of one expert that saw one token is a single draw, and the ratio of two single draws says nothing. The tokens are
as many as it takes for the largest error to be a property of the arithmetic: with 27 of them, 3 of 1928 bfloat16
tensors of random models had a ratio above 2 and 8 one below 1/2 (one outlying token in either); with 72, none above.
"""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.checks import assert_calibrated, assert_relative
from support.oracles import (
    BFLOAT16,
    CASES,
    FLOAT32,
    FLOAT64,
    Case,
    Outcome,
    chosen_experts,
    disk_weights,
    hf_model,
    remove_float32_casts,
    run_hf,
    settled_tokens,
    to_disk_names,
    to_memory_names,
)
from torch import Tensor

from reference.model import Parts, forward, loss
from reference.moe import MoeParts, route


class World(NamedTuple):
    """One model in one dtype: its weights, tokens, dL/dlogits, and what transformers makes of them in float64."""

    weights: dict[str, Tensor]
    tokens: Tensor
    cotangent: Tensor
    truth: Outcome
    router_logits: list[Tensor]


def build(case: Case, dtype: torch.dtype) -> World:
    weights = disk_weights(case, dtype=dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        remove_float32_casts(monkeypatch)
        model = hf_model(case, widened(weights), FLOAT64)
        tokens = settled_tokens(model)
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(*tokens.shape, case.vocab, generator=generator).to(BFLOAT16)
        with torch.no_grad():
            router_logits = model(tokens, output_router_logits=True).router_logits
        return World(weights, tokens, cotangent, run_hf(model, tokens, cotangent), router_logits)


@pytest.fixture(params=CASES, scope="module")
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def float32_world(case) -> World:
    return build(case, FLOAT32)


@pytest.fixture(scope="module")
def bfloat16_world(case) -> World:
    return build(case, BFLOAT16)


def widened(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(FLOAT64) for name, value in weights.items()}


def run_reference(case: Case, weights: dict[str, Tensor], world: World) -> Outcome:
    """Logits and gradients of every weight but the bias (a buffer in transformers); and the experts `route` chose."""
    batch, seq = world.tokens.shape
    experts = []

    def watched(*args, **kwargs):
        routing = route(*args, **kwargs)
        by_batch = routing.experts.view(seq, batch, -1).transpose(0, 1).flatten(0, 1)
        experts.append(by_batch.sort(-1).values)
        return routing

    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    logits = forward(leaves, world.tokens, case.model_config(), parts=Parts(moe=MoeParts(route=watched)))
    logits.backward(world.cotangent.to(logits.dtype))
    bias = {name: leaf.grad for name, leaf in leaves.items() if name.endswith("e_score_correction_bias")}
    assert not any(grad is not None and grad.any() for grad in bias.values()), "the bias chooses, it has no gradient"
    grads = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
        if name not in bias
    }
    return Outcome(logits.detach(), grads, experts)


def assert_same_choice(outcome: Outcome, truth: Outcome) -> None:
    assert len(outcome.experts) == len(truth.experts)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outcome.experts, truth.experts, strict=True))


def has_no_gradient(name: str, case: Case) -> bool:
    """With one expert a token its weight is score/score = 1, whatever the router says: no gradient but rounding."""
    return case.top_k == 1 and name.endswith("gate.weight")


def assert_as_near_as_transformers(
    ours: Outcome, theirs: Outcome, world: World, case: Case, dtype: torch.dtype
) -> None:
    assert_same_choice(theirs, world.truth)
    assert_same_choice(ours, world.truth)
    assert ours.logits.dtype == dtype
    assert_calibrated(ours.logits, theirs.logits, world.truth.logits, "logits")
    assert ours.grads.keys() == theirs.grads.keys() == world.truth.grads.keys()
    grads, their_grads, true_grads = (to_memory_names(run.grads) for run in (ours, theirs, world.truth))
    for name, true_grad in true_grads.items():
        if not has_no_gradient(name, case):
            assert_calibrated(grads[name], their_grads[name], true_grad, name)


def test_bias_changes_the_choice_of_experts(case, float32_world, bfloat16_world):
    for world in (float32_world, bfloat16_world):
        for logits, chosen in zip(world.router_logits, world.truth.experts, strict=True):
            assert (chosen != chosen_experts(logits, 0.0, case.top_k)).any(-1).sum() >= 3


def test_float64_equals_transformers(case, float32_world):
    """1e-10 is what the project promises; sums of some hundred terms over three layers round to below 1e-13."""
    world, truth = float32_world, float32_world.truth
    ours = run_reference(case, widened(world.weights), world)
    assert_same_choice(ours, truth)
    assert_relative(ours.logits, truth.logits, 1e-10, "logits")
    assert ours.grads.keys() == truth.grads.keys()
    for name, grad in truth.grads.items():
        if not has_no_gradient(name, case):
            assert_relative(ours.grads[name], grad, 1e-10, name)


def test_float32_is_as_near_to_float64_as_transformers(case, float32_world):
    world = float32_world
    theirs = run_hf(hf_model(case, world.weights, FLOAT32), world.tokens, world.cotangent)
    ours = run_reference(case, world.weights, world)
    assert_as_near_as_transformers(ours, theirs, world, case, FLOAT32)


def test_bfloat16_is_as_near_to_float64_as_transformers(case, bfloat16_world):
    world = bfloat16_world
    theirs = run_hf(hf_model(case, world.weights, BFLOAT16), world.tokens, world.cotangent)
    ours = run_reference(case, world.weights, world)
    assert_as_near_as_transformers(ours, theirs, world, case, BFLOAT16)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.top_k == 1])
def test_top_1_router_has_no_gradient(name):
    """Zero up to rounding, in both implementations.

    With score s and upstream gradient G the two terms G/s and -G s/s^2 cancel, each rounded at most four times. The
    gate gradient of the same model at top-2 is of G's size up to the factor s1 s2 / (s1 + s2)^2, about 1/4, and the
    difference of two such G: 64 eps of it covers 8 roundings with a factor 8 for that.
    """
    top_1 = CASES[name]
    top_2 = Case(**vars(top_1) | {"top_k": 2})
    world = build(top_1, FLOAT32)
    size = run_reference(top_2, world.weights, world).grads
    ours = run_reference(top_1, world.weights, world).grads
    theirs = run_hf(hf_model(top_1, world.weights, FLOAT32), world.tokens, world.cotangent).grads
    gates = [name for name in ours if name.endswith("gate.weight")]
    assert len(gates) == top_1.layers
    for gate in gates:
        bound = 64 * torch.finfo(FLOAT32).eps * size[gate].abs().max()
        assert bound > 0
        assert ours[gate].abs().max() <= bound
        assert theirs[gate].abs().max() <= bound


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_loss_and_its_gradient_are_transformers(dtype):
    """Both take float32 logarithms of one softmax a position and average them.

    A softmax over V = 67 sums V terms and the mean n = 24: at most V + n roundings of terms no larger than the largest
    logit plus log V. The gradient is (softmax - one-hot)/n: V + 4 roundings of numbers no larger than 1/n.
    """
    case = CASES["1to1_odd_quarter_hd128_top4"]
    model = hf_model(case, disk_weights(case, dtype=dtype), dtype)
    tokens = torch.randint(case.vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    logits = model(tokens).logits.detach()
    theirs_logits, ours_logits = (logits.clone().requires_grad_() for _ in range(2))
    theirs = model.loss_function(theirs_logits, tokens, case.vocab)
    assert torch.equal(theirs, model(tokens, labels=tokens).loss)
    ours = loss(ours_logits, tokens)
    n, eps = 3 * 8, torch.finfo(FLOAT32).eps
    size = logits.abs().max() + torch.tensor(float(case.vocab)).log()
    assert ours.dtype == FLOAT32
    assert (ours - theirs).abs() <= (case.vocab + n) * eps * size
    assert ours > 1.0

    ours.backward()
    theirs.backward()
    assert not ours_logits.grad[:, -1].any()
    # Below float32 the gradient is rounded to the logits' dtype, and a difference before may become one unit after.
    unit = torch.finfo(dtype).eps
    bound = theirs_logits.grad.float().abs() * (unit if dtype == BFLOAT16 else 0) + (case.vocab + 4) * eps / n
    assert ((ours_logits.grad.float() - theirs_logits.grad.float()).abs() <= bound).all()


@pytest.mark.parametrize("name", ["6to1_half_hd128_top8", "one_group_full_hd64_top3"])
def test_the_oracles_names_are_what_transformers_writes(name, tmp_path):
    """`to_disk_names` and `to_memory_names` against save_pretrained: names, and every value."""
    case = CASES[name]
    weights = disk_weights(case)
    model = hf_model(case, weights, FLOAT32)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    for disk in (weights, to_disk_names(model.state_dict())):
        assert disk.keys() == written.keys()
        assert all(torch.equal(disk[name], written[name]) for name in written)
