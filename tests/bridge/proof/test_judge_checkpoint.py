"""`validate --source`: every mistake that is planted into a checkpoint is named, and nothing else.

The mistakes are planted by slicing (`support.wrong_conversions`), into Hugging Face files of bfloat16 and of float8.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import SCALE, all_tensors, edit_config, edit_tensors
from support.conversions import export, imported_from
from support.wrong_conversions import (
    BIAS,
    EMBEDDING,
    GATE,
    HEAD,
    INPUT_NORM,
    K_NORM,
    LAYER,
    OUTPUT,
    POST_NORM,
    Q_NORM,
    SIZES,
    W1,
    W2,
    W3,
    K,
    Plant,
    Q,
    Tensors,
    V,
    by_scales,
    cut_bits,
    decoded,
    each,
    encoded_anew,
    expert,
    gate_up_cut_as_interleaved,
    gate_up_of_two_ranks,
    heads_reordered,
    moved,
    neighbours_paired,
    permuted_experts,
    qkv_cut_as_concatenated,
    ranks_halves_swapped,
    rounded,
    swap_halves,
)
from typer.testing import CliRunner

from bridge.cli import app
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.proof import explain
from bridge.proof import judge_checkpoint as module
from bridge.proof.judge_checkpoint import Judgement, judge_checkpoint

BF16, F32 = torch.bfloat16, torch.float32
MTP = "model.layers.4.enorm.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged") / "original"
    make_checkpoint(folder, SIZES, mtp_layers=1)
    return folder


@pytest.fixture(scope="module")
def original_tensors(original: Path) -> Tensors:
    return all_tensors(original)


@pytest.fixture(scope="module")
def megatron(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported_from(original, tmp_path_factory.mktemp("judged") / "megatron")


@pytest.fixture(scope="module")
def in_bf16(original: Path, megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "bf16"
    export(megatron, out, quantization="none", source=str(original))
    return out


@pytest.fixture
def planted(in_bf16: Path, original: Path, original_tensors: Tensors, tmp_path: Path) -> Callable[..., Path]:
    """Mistakes, one after the other, in a copy of the bfloat16 checkpoint or of the float8 one."""

    def plant(*plants: Plant, fp8: bool = False) -> Path:
        copy = Path(shutil.copytree(original if fp8 else in_bf16, tmp_path / "planted"))
        edit_tensors(copy, lambda tensors: [one(tensors, original_tensors) for one in plants])
        return copy

    return plant


def counts(found: Judgement) -> dict[str, int]:
    """Tensors by mistake."""
    by_name = {one.name: one.tensors for one in found.findings}
    return by_name | ({"unexplained": found.unexplained.tensors} if found.unexplained else {})


# --- What is right. ---


@pytest.mark.parametrize("target", ["original", "megatron", "in_bf16"])
@pytest.mark.parametrize("source", ["original", "megatron", "in_bf16"])
def test_a_right_conversion_holds(target: str, source: str, request: pytest.FixtureRequest) -> None:
    found = judge_checkpoint(request.getfixturevalue(target), request.getfixturevalue(source))
    assert counts(found) == {}
    assert found.right == found.tensors > 0


def test_wider_dtypes_hold(planted: Callable[..., Path], original: Path) -> None:
    """Float32 that is exact, and float32 that holds bfloat16 values."""

    def widen(tensors: Tensors, source: Tensors) -> None:
        tensors[W1] = decoded(source, W1)
        tensors[W2], tensors[INPUT_NORM] = tensors[W2].to(F32), tensors[INPUT_NORM].to(F32)

    assert judge_checkpoint(planted(widen), original).holds


# --- One mistake. ---

PLANTS: dict[str, tuple[Plant, dict[str, int]]] = {
    "q, k, v cut as concatenated": (qkv_cut_as_concatenated, {"qkv_concatenated": 3}),
    "k and v swapped": (moved({K: V, V: K}), {"kv_swapped": 2}),
    "heads reordered": (heads_reordered, {"query_heads_reordered": 3}),
    "rotation of neighbours": (each(neighbours_paired, Q, K, Q_NORM, K_NORM), {"rotation_interleaved": 4}),
    "gate and up swapped": (moved({W1: W3, W3: W1}), {"gate_up_swapped": 2}),
    "gate and up interleaved": (gate_up_cut_as_interleaved, {"gate_up_interleaved": 2}),
    "gate and up of two ranks": (gate_up_of_two_ranks, {"gate_up_of_ranks": 2}),
    "halves of an expert swapped": (ranks_halves_swapped, {"shards_swapped": 3}),
    "square matrices transposed": (each(lambda value: value.T, Q, OUTPUT), {"transposed": 2}),
    "other matrices transposed": (each(lambda value: value.T, K, W2, GATE, HEAD), {"transposed": 4}),
    "scales ignored": (by_scales(W1, torch.ones_like), {"scales_ignored": 1}),
    "scales twice": (by_scales(W2, lambda scales: scales * scales), {"scales_twice": 1}),
    "scales divided": (by_scales(Q, lambda scales: 1 / scales), {"scales_divided": 1}),
    "scales in bf16": (by_scales(W1, lambda scales: scales.to(BF16).to(F32)), {"scales_narrowed": 1}),
    "scales as powers of two": (by_scales(W1, lambda s: 2 ** s.log2().ceil()), {"scales_power_of_two": 1}),
    "square grid transposed": (by_scales(Q, lambda scales: scales.T), {"scales_transposed": 1}),
    "other grid transposed": (by_scales(W1, lambda s: s.T.reshape(s.shape)), {"scales_transposed": 1}),
    "one scale": (by_scales(W1, lambda scales: scales.max().expand(scales.shape)), {"one_scale": 1}),
    "rank 0's norm repeated": (each(lambda w: w[:64].repeat(4), Q_NORM), {"shard_repeated": 1}),
    "rank 1's norm repeated": (each(lambda w: w[32:].repeat(2), K_NORM), {"shard_repeated": 1}),
    "one head of a norm": (each(lambda w: w[:32], Q_NORM, K_NORM), {"norm_truncated": 2}),
    "a norm averaged": (
        each(lambda w: (sum(w.float().split(32)) / 8).repeat(8).to(BF16), Q_NORM),
        {"norm_averaged": 1},
    ),
    "norms less one": (each(lambda w: w - 1, INPUT_NORM, Q_NORM, "model.norm.weight"), {"norm_shifted": 3}),
    "norms of ones": (each(torch.ones_like, POST_NORM), {"norm_lost": 1}),
    "norms swapped": (moved({INPUT_NORM: POST_NORM, POST_NORM: INPUT_NORM}), {"norms_swapped": 2}),
    "router in bf16": (each(lambda w: w.to(BF16), GATE, BIAS), {"router_narrowed": 1, "bias_narrowed": 1}),
    "router through bf16": (each(lambda w: w.to(BF16).to(F32), GATE), {"router_narrowed": 1}),
    "bias zero": (each(torch.zeros_like, BIAS), {"bias_lost": 1}),
    "bias shifted": (each(lambda bias: bias - bias.mean(), BIAS), {"bias_shifted": 1}),
    "router in another order": (each(lambda w: w[[2, 0, 3, 1]], GATE, BIAS), {"router_permuted": 2}),
    "experts dealt in turn": (permuted_experts([0, 2, 1, 3]), {"experts_interleaved": 6}),
    "experts in another order": (permuted_experts([1, 0, 2, 3]), {"experts_permuted": 6}),
    "layers shifted": (
        moved({expert(0, part, layer): expert(0, part, layer - 1) for part in (1, 2, 3) for layer in (1, 2, 3)}),
        {"layers_shifted": 9},
    ),
    "layers in another order": (
        moved({f"model.layers.{a}.self_attn.{b}.weight": f"model.layers.{2 - a}.self_attn.{b}.weight"
               for a in (0, 2) for b in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm")}),
        {"layers_permuted": 10},
    ),
    "embedding and head swapped": (moved({EMBEDDING: HEAD, HEAD: EMBEDDING}), {"embedding_head": 2}),
    "embedding and head tied": (moved({HEAD: EMBEDDING}), {"embedding_head": 1}),
    "padding left in": (
        each(lambda w: torch.cat((w, torch.zeros(20, w.shape[1], dtype=w.dtype))), EMBEDDING, HEAD),
        {"padding_left_in": 2},
    ),
    "missing": (lambda tensors, _: [tensors.pop(name) for name in (W1, BIAS)], {"missing": 2}),
    "MTP lost": (lambda tensors, _: tensors.pop(MTP), {"carried_lost": 1}),
    "extra": (lambda tensors, _: tensors.update({LAYER + "mlp.bias": torch.ones(3)}), {"extra": 1}),
    "scales left over": (
        lambda tensors, source: tensors.update({W1 + SCALE: source[W1 + SCALE]}),
        {"scales_left_over": 1},
    ),
    "float64": (each(lambda w: w.double(), INPUT_NORM), {"wrong_dtype": 1}),
    "cut short": (each(lambda w: w[:100], OUTPUT), {"wrong_shape": 1}),
    "truncated": (rounded(cut_bits, W1, W2), {"truncated": 2}),
    "float16": (rounded(lambda value: value.to(torch.float16), Q, W2), {"float16": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTS)
def test_a_mistake_is_named(name: str, planted: Callable[..., Path], original: Path) -> None:
    plant, expected = PLANTS[name]
    found = judge_checkpoint(planted(plant), original)
    assert counts(found) == expected
    of_weights = sum(count for mistake, count in expected.items() if mistake not in ("extra", "carried_lost"))
    assert found.right == found.tensors - of_weights


FP8_PLANTS: dict[str, tuple[Plant, dict[str, int]]] = {
    "gate and up swapped": (moved({W1: W3, W3: W1}), {"gate_up_swapped": 2}),
    "another expert's": (permuted_experts([0, 2, 1, 3]), {"experts_interleaved": 6}),
    "transposed, with scales": (each(lambda value: value.T, W1, W1 + SCALE), {"transposed": 1}),
    "scales transposed": (each(lambda scales: scales.T, W1 + SCALE), {"scales_transposed": 1}),
    "square scales transposed": (each(lambda scales: scales.T, Q + SCALE), {"scales_transposed": 1}),
    "scales inverted": (each(lambda scales: 1 / scales, W2 + SCALE), {"scales_divided": 1}),
    "scales in bf16": (each(lambda scales: scales.to(BF16), W2 + SCALE, Q + SCALE), {"scales_narrowed": 2}),
    "one scale": (each(lambda scales: scales.max().reshape(1), W2 + SCALE), {"one_scale": 1}),
    "scales lost": (lambda tensors, _: tensors.pop(Q + SCALE), {"scales_ignored": 1}),
    "another grid": (each(lambda scales: scales[:1], Q + SCALE), {"wrong_grid": 1}),
    "encoded anew": (encoded_anew, {"requantised": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FP8_PLANTS)
def test_a_mistake_in_float8_files_is_named(name: str, planted: Callable[..., Path], original: Path) -> None:
    plant, expected = FP8_PLANTS[name]
    assert counts(judge_checkpoint(planted(plant, fp8=True), original)) == expected


@pytest.mark.parametrize(("key", "value"), [("rotary_dim", 32), ("rope_theta", 10_000)])
def test_another_config_is_named(key: str, value: int, planted: Callable[..., Path], original: Path) -> None:
    copy = planted()
    edit_config(copy, lambda config: config.update({key: value}))
    (finding,) = judge_checkpoint(copy, original).findings
    assert (finding.name, finding.tensors, finding.worst) == ("config_differs", 1, f"config.json: {key}")


@pytest.mark.parametrize("value", [{"rotary_dim": None}, {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}])
def test_a_config_that_cannot_be_read_is_named_with_what_is_wrong_with_the_weights(
    value: dict[str, object], planted: Callable[..., Path], original: Path
) -> None:
    copy = planted(moved({K: V, V: K}))
    edit_config(copy, lambda config: config.update(value))
    found = judge_checkpoint(copy, original)
    assert counts(found) == {"config_differs": 1, "kv_swapped": 2}
    worst = next(one.worst for one in found.findings if one.name == "config_differs")
    assert next(iter(value)) in worst


STORAGE: dict[str, tuple[bool, Callable[[dict], object], str]] = {
    "no section for float8": (True, lambda c: c.pop("quantization_config"), "quantization_config"),
    "a section for bfloat16": (
        False,
        lambda c: c.update(quantization_config={"quant_method": "fp8"}),
        "quantization_config",
    ),
    "float8 that it excludes": (
        True,
        lambda c: c["quantization_config"].update(modules_to_not_convert=["gate", "lm_head", "q_proj"]),
        "quantization_config",
    ),
    "blocks of another size": (
        True,
        lambda c: c["quantization_config"].update(weight_block_size=[64, 64]),
        "quantization_config.weight_block_size",
    ),
    "scales that are powers of two": (
        True,
        lambda c: c["quantization_config"].update(scale_fmt="ue8m0"),
        "quantization_config.scale_fmt",
    ),
}


@pytest.mark.parametrize("name", STORAGE)
def test_what_config_json_says_of_storage_is_held_against_the_files(
    name: str, planted: Callable[..., Path], original: Path
) -> None:
    fp8, edit, key = STORAGE[name]
    copy = planted(fp8=fp8)
    edit_config(copy, edit)
    (finding,) = judge_checkpoint(copy, original).findings
    assert (finding.name, finding.worst) == ("storage_misdescribed", f"config.json: {key}")


# --- Several. ---


PAIRS: dict[str, tuple[tuple[Plant, ...], dict[str, int]]] = {
    "narrow scales, then k and v swapped": (
        (by_scales(K, lambda s: s.to(BF16).to(F32)), by_scales(V, lambda s: s.to(BF16).to(F32)), moved({K: V, V: K})),
        {"scales_narrowed": 2, "kv_swapped": 2},
    ),
    "cut bits of another layer's expert": (
        (rounded(cut_bits, W2), moved({expert(2, 2, layer=2): W2}), rounded(lambda v: v.to(BF16), W2)),
        {"truncated": 1, "layers_shifted": 1},
    ),
    "gate and up swapped, rows shifted": (
        (moved({W1: W3, W3: W1}), each(swap_halves, W1, W3)),
        {"gate_up_swapped": 2, "shards_swapped": 2},
    ),
    "a norm less one, repeated": (
        (each(lambda w: w[:64].repeat(4) - 1, Q_NORM),),
        {"shard_repeated": 1, "norm_shifted": 1},
    ),
    "transposed, halves swapped": (
        (each(lambda w: swap_halves(w).T, K),),
        {"transposed": 1, "shards_swapped": 1},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_two_mistakes_on_one_tensor_are_both_named(name: str, planted: Callable[..., Path], original: Path) -> None:
    plants, expected = PAIRS[name]
    assert counts(judge_checkpoint(planted(*plants), original)) == expected


def noisy(value: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    return (value.to(F32) * (1 + 0.1 * noise)).to(value.dtype)


def test_several_mistakes_in_one_checkpoint(
    planted: Callable[..., Path], original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary in several pieces, and one tensor of which nothing is known."""
    names = ("k and v swapped", "router through bf16", "bias zero", "embedding and head tied", "norms swapped")
    plants = [PLANTS[name][0] for name in names]
    monkeypatch.setattr(module, "PIECE_BLOCKS", 1)
    found = judge_checkpoint(planted(*plants, each(noisy, W1), each(noisy, OUTPUT)), original)
    expected = {"kv_swapped": 2, "router_narrowed": 1, "bias_lost": 1, "embedding_head": 1, "norms_swapped": 2}
    assert counts(found) == expected | {"unexplained": 2}
    assert found.unexplained is not None
    assert found.unexplained.worst in (W1, OUTPUT)
    assert found.unexplained.error == pytest.approx(0.1, rel=0.1)
    assert found.right == found.tensors - 9
    assert not found.holds


@pytest.mark.parametrize("name", [EMBEDDING, W2, GATE, BIAS, Q_NORM])
def test_one_wrong_value_is_unexplained(name: str, planted: Callable[..., Path], original: Path) -> None:
    """However little it is: no mistake is near enough to be taken for it."""

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value.view(-1)[3] *= 1.0078125  # a unit in the last place of bfloat16
        return value

    found = judge_checkpoint(planted(each(change, name)), original)
    assert counts(found) == {"unexplained": 1}
    assert found.unexplained is not None
    assert found.unexplained.worst == name


def test_after_some_failures_only_what_was_seen_is_looked_for(
    planted: Callable[..., Path], original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise everywhere ends the search for new explanations of a row, and not the known one."""
    monkeypatch.setattr(explain, "MOST_FAILURES", 1)
    swapped = [moved({expert(e, 1, 1): expert(e, 3, 1), expert(e, 3, 1): expert(e, 1, 1)}) for e in (0, 2, 3)]
    found = judge_checkpoint(planted(*swapped, each(noisy, expert(1, 1), expert(1, 3))), original)
    assert counts(found) == {"gate_up_swapped": 6, "unexplained": 2}


# --- The command. ---


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "300"})
    return result.exit_code, " ".join((result.stdout + (result.stderr if result.exit_code == 2 else "")).split())


def test_the_command(planted: Callable[..., Path], original: Path, tmp_path: Path) -> None:
    status, text = run("validate", original, "--source", original)
    assert (status, "91 of 91" in text) == (0, True)
    copy = planted(moved({K: V, V: K}), each(noisy, OUTPUT))
    status, text = run("validate", copy, "--source", original)
    assert status == 1
    assert "kv_swapped" in text
    assert "key and value swapped" in text
    assert "unexplained" in text
    status, text = run("validate", copy, "--source", original, "--json")
    found = json.loads(text)
    assert (status, found["holds"]) == (1, False)
    assert [(one["name"], one["tensors"]) for one in found["findings"]] == [("kv_swapped", 2)]
    assert found["unexplained"]["worst"] == OUTPUT
    for target, source in ((tmp_path / "nowhere", original), (original, copy.parent)):
        assert run("validate", target, "--source", source)[0] == 2
