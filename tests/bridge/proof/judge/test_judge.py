"""The judge on real gloo ranks: what is right holds at every layout, and each planted mistake is named.

The mistakes are in megatron-core modules of `support.judged_targets`, which share no code with the reference's wrong
laws. What the ranks' numbers are compared with is proven against `transformers` in tests/reference.
"""

from collections.abc import Iterator

import pytest
import torch
from support.ranks import RankPool

from bridge.model.config import transformer_config
from bridge.model.layer_spec import minimax_m2_layer_spec
from bridge.model.process_groups import model_parallel
from bridge.proof.judge.judge import JudgesRanks, judge
from bridge.proof.judge.layouts import FULL, QUICK, layout_of
from bridge.proof.judge.problem import CONFIG, problem
from bridge.proof.judge.target import Kind, Slot, Target, TargetError
from bridge.proof.judge.verdict import Judgement, Status
from reference.lawful_model import outcome
from reference.outcome import GRADIENT

LAYOUTS = {layout.name: layout for layout in FULL}
TARGETS = "support.judged_targets"


@pytest.fixture(scope="module")
def ranks() -> Iterator[JudgesRanks]:
    with JudgesRanks(RankPool) as ranks:
        yield ranks


def judged(ranks: JudgesRanks, target: object, *layouts: str, slot: Slot | None = None, **options) -> Judgement:
    if isinstance(target, str) and ":" not in target:
        target = f"{TARGETS}:{target}"
    return judge(Target.of(target, slot), [LAYOUTS[name] for name in layouts], ranks=ranks, **options)


def said_of(judgement: Judgement, number: int = 0) -> set[str]:
    return {fault.name for fault in judgement.layouts[number].faults}


def assert_holds(judgement: Judgement) -> None:
    for layout in judgement.layouts:
        print(f"{judgement.target}, {layout.layout}: {max(layout.errors.values()) / layout.bound:.2f} of the bound")
        assert layout.status is Status.HOLDS, (layout.faults, layout.differing[:3], layout.failure)


def test_the_problem_uses_every_expert_and_its_bias_changes_the_choice() -> None:
    posed = problem(torch.float32)
    gradients = outcome(posed.config, posed.weights, posed.tokens, posed.labels).gradients
    assert all(value.abs().max() > 0 for value in gradients.values())
    unbiased = {n: torch.zeros_like(v) if "score_correction" in n else v for n, v in posed.weights.items()}
    other = outcome(posed.config, unbiased, posed.tokens, posed.labels)
    assert (other.loss - outcome(posed.config, posed.weights, posed.tokens, posed.labels).loss).abs() > 0.01
    assert len({len(v) for n, v in posed.weights.items() if "layers.0.self_attn" in n or "experts.0.w" in n}) == 4
    assert CONFIG.intermediate_size % CONFIG.block_size


@pytest.mark.parametrize(
    "target",
    ["bridge:minimax_m2_layer_spec", pytest.param("bridge:minimax_m2_hybrid_spec", marks=pytest.mark.slow)],
)
def test_ours_holds_at_quick_layouts(target: str, ranks: JudgesRanks) -> None:
    judgement = judged(ranks, target, *(layout.name for layout in QUICK))
    assert_holds(judgement)
    assert judgement.kind is {"l": Kind.LAYER, "h": Kind.HYBRID}[target.split("_m2_")[1][0]]
    names = judgement.layouts[0].errors.keys()
    trained = [name for name in problem(torch.float32).weights if "score_correction" not in name]
    assert names >= {"logits", "loss", "gradient norm", "loss of step 3", *(GRADIENT + name for name in trained)}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bridge:minimax_m2_layer_spec", "bridge:minimax_m2_hybrid_spec"])
def test_ours_holds_at_every_layout(target: str, ranks: JudgesRanks) -> None:
    assert_holds(judged(ranks, target, *LAYOUTS))


@pytest.mark.slow
def test_ours_holds_in_bfloat16(ranks: JudgesRanks) -> None:
    assert_holds(judged(ranks, "bridge:minimax_m2_layer_spec", "tp 1", "tp 2", dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("target", "layout", "slot", "kind"),
    [
        ("megatron_routers_and_model", "tp 2", None, Kind.MODEL),
        ("bridge.model.qk_norm:FullDimQNorm", "tp 2", Slot.Q_NORM, Kind.PART),
        (f"{TARGETS}:norm_spec", "tp 1", Slot.Q_NORM, Kind.PART),
        ("hybrid_model", "tp 1", None, Kind.MODEL),
        ("RouterWithBiasAsParameter", "tp 1", None, Kind.PART),
        ("bridge.model.router:Float32Router", "tp 1", None, Kind.PART),
        ("bridge.model.attention:MiniMaxM2SelfAttention", "tp 1", None, Kind.PART),
    ],
)
def test_other_targets_hold(target: str, layout: str, slot: Slot | None, kind: Kind, ranks: JudgesRanks) -> None:
    judgement = judged(ranks, target, layout, slot=slot)
    assert_holds(judgement)
    assert judgement.kind is kind


def test_a_spec_itself_is_a_target(ranks: JudgesRanks) -> None:
    with model_parallel():
        spec = minimax_m2_layer_spec(transformer_config(CONFIG, params_dtype=torch.float32))
    assert_holds(judged(ranks, spec, "tp 1"))


@pytest.mark.parametrize("sizes", [{"cp": 2}, pytest.param({"tp": 2, "cp": 2}, marks=pytest.mark.slow)])
def test_context_parallelism(sizes: dict[str, int], ranks: JudgesRanks) -> None:
    """By an attention that gathers keys and values; one that does not give their gradients back is found."""
    names = "gathered_attention", "gathered_without_backward_sum"
    right, wrong = (judge(Target.of(f"{TARGETS}:{name}"), [layout_of(**sizes)], ranks=ranks) for name in names)
    assert_holds(right)
    assert wrong.status is Status.DIFFERS
    assert {"logits", "loss"}.isdisjoint(dict(wrong.layouts[0].differing))
    assert "gradient of model.layers.0.self_attn.v_proj.weight" in dict(wrong.layouts[0].differing)


def test_an_attention_without_context_parallelism_cannot_be_run_there(ranks: JudgesRanks) -> None:
    (found,) = judge(Target.of("bridge:minimax_m2_layer_spec"), [layout_of(cp=2)], ranks=ranks).layouts
    assert found.status is Status.CANNOT_RUN
    assert found.failure is not None
    assert "which has no context parallelism" in found.failure.reason


def test_weights_without_a_parameter_are_named(ranks: JudgesRanks) -> None:
    (found,) = judged(ranks, "without_norms", "tp 1").layouts
    sentence = dict(found.faults)["missing parameters"]
    assert "self_attn.q_norm.weight" in sentence
    assert "self_attn.k_norm.weight" in sentence


def test_a_parameter_of_another_name_is_found_by_its_place_and_shape(ranks: JudgesRanks) -> None:
    judgement = judged(ranks, "own_norms", "tp 1", "tp 2")
    assert_holds(judgement)
    found = "self_attention.my_q_norm.weight: by its place and shape taken for model.layers.*.self_attn.q_norm.weight"
    assert f"decoder.layers.*.{found}" in judgement.notes


@pytest.mark.parametrize(
    ("target", "layout", "name"),
    [
        pytest.param("all_channels_rotated", "tp 1", "all channels rotated", marks=pytest.mark.slow),
        pytest.param("interleaved", "tp 1", "interleaved RoPE", marks=pytest.mark.slow),
        ("RouterWithBiasInTheWeights", "tp 1", "bias in the weights"),
        ("one_heads_weights", "tp 1", "one head's weights"),
        pytest.param(
            "gradients_summed_by_name",
            "tp 2",
            "norm weight gradients summed over different heads",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_planted_mistake_is_named(target: str, layout: str, name: str, ranks: JudgesRanks) -> None:
    judgement = judged(ranks, target, layout)
    assert judgement.status is Status.DIFFERS
    assert name in said_of(judgement)
    assert said_of(judgement) <= {name, "gradient norm"}


def test_a_missing_backward_sum_is_found_at_tp_2_and_only_there(ranks: JudgesRanks) -> None:
    judgement = judged(ranks, "backward_sum_missing", "tp 1", "tp 2")
    alone, divided = judgement.layouts
    assert alone.status is Status.HOLDS
    assert said_of(judgement, 1) == {"backward sum missing"}
    assert {"logits", "loss"} <= divided.errors.keys() - dict(divided.differing)
    assert divided.diagnosis is not None
    assert divided.diagnosis.gradients_only


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:spec", "no_such_module: cannot be imported: ModuleNotFoundError"),
        (f"{TARGETS}:no_such_function", "has no no_such_function"),
        ("wants_something_else", r"has a parameter 'checkpoint', expected only config, args, "),
        ("makes_a_number", "makes a int, expected the ModuleSpec of a TransformerLayer"),
        ("raises_inside", "it raises KeyError: 'planted'"),
        ("dies", "the process of rank 0 was ended by SIGKILL, perhaps for lack of memory"),
        ("of_transformer_engine", "needs Transformer Engine and a GPU, which are not here"),
        (f"{TARGETS}:ShardedNorm", "is a class, neither a Router nor an Attention.*--part"),
    ],
)
def test_why_a_target_cannot_be_run(target: str, reason: str, ranks: JudgesRanks) -> None:
    with pytest.raises(TargetError, match=reason):
        judged(ranks, target, "tp 1")


@pytest.mark.parametrize("target", ["package.module", ":name", "module:", lambda config: None])
def test_what_is_no_target_is_said_before_anything_starts(target: object) -> None:
    with pytest.raises(TargetError):
        Target.of(target)


@pytest.mark.slow
def test_a_layout_that_cannot_be_run_is_not_one_that_holds(ranks: JudgesRanks) -> None:
    """megatron-core's own norms are over one head, and refuse sequence parallelism: this layer exists at TP 1 only."""
    judgement = judged(ranks, "per_head_norms", "tp 1", "tp 2")
    assert [layout.status for layout in judgement.layouts] == [Status.DIFFERS, Status.CANNOT_RUN]
    assert said_of(judgement) == {"norm over each head"}
    failure = judgement.layouts[1].failure
    assert failure is not None
    assert "WrappedTorchNorm, which refuses sequence parallelism" in failure.reason
    assert "AssertionError: sequence parallel not supported" in failure.traceback[-1]
