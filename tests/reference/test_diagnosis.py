"""Every row of `WRONG_LAWS`, planted into `transformers`' model in float64 (`support.planted`), is found and named.

Float64 sums of some hundred terms through two layers agree to below 1e-12; the smallest effect of a wrong law here is
that of an eps, above 1e-8. The router in bfloat16 has other roundings where a sum rounds the other way: none here.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from support.oracles import FLOAT64, disk_weights, hf_model, remove_float32_casts, to_disk_names
from support.planted import BLOCK, CASE, PLANTS, Plant, quantized
from torch import Tensor

from reference.config import ModelConfig
from reference.diagnosis import Diagnosis, Verdict, candidates, explain
from reference.lawful_model import logits, outcome
from reference.laws import WRONG_LAWS, Laws, Part
from reference.outcome import Outcome

BOUND = 1e-10
BY_NAME = {law.name: law for law in WRONG_LAWS}
CONFIG = ModelConfig.from_hf(
    CASE.released_config() | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
)
WEIGHTS, SCALES, _ = quantized(disk_weights(CASE, dtype=FLOAT64))
TOKENS, LABELS = torch.randint(CASE.vocab, (2, 2, 10), generator=torch.Generator().manual_seed(3))


def observe(*plants: Plant, dtype: torch.dtype = FLOAT64) -> Outcome:
    """What `transformers`' model makes of the tokens, with mistakes in it; float32 is without changed casts."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == FLOAT64:
            remove_float32_casts(patch)
        weights = WEIGHTS
        for plant in plants:
            weights = plant.weights(weights)
        model = hf_model(CASE, {name: value.to(dtype) for name, value in weights.items()}, dtype)
        replaced = [plant.model(model, patch) or {} for plant in plants]
        found = model(TOKENS).logits
        loss = F.cross_entropy(found.flatten(0, 1), LABELS.flatten())
        loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    for gradient in replaced:
        gradients |= gradient
    gradients = to_disk_names(gradients)
    for plant in plants:
        gradients = plant.gradients(gradients)
    return Outcome(found.detach(), loss.detach(), gradients)


@cache
def run(laws: Laws, ranks: int, expert_ranks: int) -> dict[str, Tensor]:
    sizes = {"tensor_parallel": ranks, "expert_tensor_parallel": expert_ranks}
    return outcome(CONFIG, WEIGHTS | SCALES, TOKENS, LABELS, laws=laws, **sizes).named()


@cache
def first_logits(laws: Laws, ranks: int) -> dict[str, Tensor]:
    return {"logits": logits(CONFIG, WEIGHTS | SCALES, TOKENS[:1], laws=laws, tensor_parallel=ranks)}


def judge(observed: Outcome, ranks: int = 1, expert_ranks: int = 1) -> Diagnosis:
    """`diagnose`, with what the laws give computed once for all tests."""
    return explain(
        observed.named(),
        lambda laws: run(laws, ranks, expert_ranks),
        candidates(Part.MODEL, CONFIG, tensor_parallel=ranks, expert_tensor_parallel=expert_ranks),
        bound=BOUND,
        outputs=lambda laws: first_logits(laws, ranks),
    )


def names(diagnosis: Diagnosis) -> list[list[str]]:
    return [[law.name for law in laws] for laws in diagnosis.explanations]


def test_every_row_is_planted():
    assert list(PLANTS) == [law.name for law in WRONG_LAWS]


@pytest.mark.parametrize(("ranks", "expert_ranks"), [(1, 1), (2, 2), (6, 4)])
def test_transformers_is_right(ranks, expert_ranks):
    observed = observe()
    diagnosis = judge(observed, ranks, expert_ranks)
    assert observed.gradients.keys() == {name for name in WEIGHTS if not name.endswith("e_score_correction_bias")}
    assert diagnosis.verdict == Verdict.RIGHT, diagnosis.differing
    assert diagnosis.explanations == ()


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_mistake_is_named(name):
    plant = PLANTS[name]
    diagnosis = judge(observe(plant), plant.ranks, plant.expert_ranks)
    assert names(diagnosis) == [[name]], (diagnosis.differing, diagnosis.closest)
    assert diagnosis.verdict == Verdict.EXPLAINED
