"""megatron-bridge's own layer spec before the judge: right at one rank, and what is wrong at two.

Its norms of queries and keys sum in place, and their weights have a name whose gradients megatron-core sums.
"""

import pytest
from support.checks import ROOT
from support.megatron_bridge_layer import VERSION, provider_file
from support.ranks import RankPool

from bridge.proof.judge.judge import JudgesRanks, judge
from bridge.proof.judge.layouts import QUICK
from bridge.proof.judge.target import Target
from bridge.proof.judge.verdict import Status

pytestmark = [
    pytest.mark.plugins,
    pytest.mark.skipif(provider_file() is None, reason=f"needs megatron-bridge {VERSION}"),
]


def test_its_backward_pass_is_found_wrong_at_tp_2_and_nowhere_else() -> None:
    with JudgesRanks(RankPool) as ranks:
        judgement = judge(Target.of("support.megatron_bridge_layer:minimax_m2_layer_spec"), QUICK[:2], ranks=ranks)
    alone, divided = judgement.layouts
    assert alone.status is Status.HOLDS
    assert [fault.name for fault in divided.faults] == [
        "backward sum missing",
        "norm weight gradients summed over different heads",
        "gradient norm",
    ]
    assert divided.diagnosis is not None
    assert len(divided.diagnosis.explanations) == 1
    assert {"logits", "loss"}.isdisjoint(dict(divided.differing))
    errors = dict(divided.differing)
    for name, error in (("q_norm", "1.0e+00"), ("k_proj", "1.3e-01")):
        assert f"{errors[f'gradient of model.layers.0.self_attn.{name}.weight']:.1e}" == error
    shown = " ".join((ROOT / "README.md").read_text().split())
    for fault in divided.faults:
        assert f"{fault.name}: {fault.sentence.split(': ')[0]}: " in shown
