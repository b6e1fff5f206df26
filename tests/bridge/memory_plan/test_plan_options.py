"""What a user writes of a plan: memory, sizes, layers a stage, and where the config is."""

import json
from pathlib import Path

import pytest
from support.plans import FULL
from typer.testing import CliRunner

from bridge.cli import app
from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from bridge.memory_plan import plan
from bridge.memory_plan.plan import layout, parse_layers, parse_memory, read_config


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("79.5 gb", 795 * 10**8), ("1TB", 10**12), ("512MiB", 2**29)],
)
def test_memory(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["80", "80G", "GB", "", "-80GB", "0GB", "1e3GB", "80 GB each", "nanGB", "٨GB", "80KB"])
def test_memory_that_is_none(text):
    with pytest.raises(ValueError, match=r"positive number with a unit: MB, GB, TB .* MiB, GiB, TiB"):
        parse_memory(text)


def test_layers_per_stage():
    assert parse_layers("15, 16,16,15") == (15, 16, 16, 15)
    for text in ("", "15,,16", "15;16", "a", "-1,2", "1.5,2"):
        with pytest.raises(ValueError, match="numbers with commas"):
            parse_layers(text)


def test_layout_finds_data_parallel_and_spreads_layers():
    found = layout(FULL, gpus=512, tp=8, pp=8, ep=8, etp=1, cp=2)
    assert (found.dp, found.world_size) == (4, 512)
    assert found.layers_per_stage == (7, 8, 8, 8, 8, 8, 8, 7)
    assert layout(FULL, gpus=2, pp=2).layers_per_stage is None
    assert layout(FULL, gpus=4, pp=4, layers_per_stage=(10, 20, 20, 12)).layers_per_stage == (10, 20, 20, 12)


@pytest.mark.parametrize(
    ("gpus", "sizes", "message"),
    [
        (12, {"tp": 8}, r"gpus \(12\) must be a positive multiple of tp x cp x pp = 8 x 1 x 1 = 8"),
        (0, {}, r"gpus \(0\)"),
        (-8, {"tp": 8}, r"gpus \(-8\)"),
        (8, {"tp": 0}, "tp must be a positive integer, found 0"),
        (8, {"pp": -1}, "pp must be a positive integer"),
        (8, {"ep": 0}, "ep must be a positive integer"),
        (8, {"etp": 0}, "etp must be a positive integer"),
        (8, {"ep": 16}, "raise dp or lower ep"),
        (7, {"tp": 7}, "num_attention_heads"),
        (3, {"ep": 3}, r"num_local_experts \(256\) must be divisible by ep \(3\)"),
        (4, {"vpp": 2}, "vpp .2. needs pp of at least 2"),
        (2, {"pp": 2, "layers_per_stage": (30, 30)}, "add up to 62"),
    ],
)
def test_sizes_that_do_not_go_together(gpus, sizes, message):
    with pytest.raises(ValueError, match=message):
        layout(FULL, gpus=gpus, **sizes)


def test_config_of_a_folder_without_weights_and_of_a_file(checkpoint: Path, tmp_path: Path):
    expected = read_config(checkpoint)
    assert expected.num_local_experts == 5
    alone = tmp_path / "config.json"
    alone.write_bytes((checkpoint / "config.json").read_bytes())
    assert read_config(tmp_path) == read_config(alone) == expected


def test_config_of_a_hub_id_fetches_config_json_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(checkpoint / name)

    monkeypatch.setattr(plan, "hf_hub_download", fetch)
    assert read_config("owner/name") == read_config(checkpoint)
    assert asked == [("owner/name", "config.json")]


def test_config_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="not there"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="not there"):
        read_config(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type"):
        read_config(tmp_path)

    def unreachable(*_: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr(plan, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"owner/name: no such local folder, and the hub .*offline"):
        read_config("owner/name")


def test_the_pattern_is_said_of_a_hybrid_model_only(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG | {"num_hidden_layers": 3}))
    words = ["plan", str(tmp_path), "--gpus", "2", "--pp", "2"]
    said = CliRunner().invoke(app, [*words, "--model", "hybrid"])
    assert said.exit_code == 0, said.output
    assert "--hybrid-layer-pattern '*E*E|*E'" in said.output
    assert "*E" not in CliRunner().invoke(app, words).output


def test_a_workload_is_counted_where_its_sequence_length_is_given(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_CONFIG))

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["plan", str(tmp_path), "--gpus", "4", "--pp", "2", *words])
        return result.exit_code, " ".join(result.output.split())

    found = {}
    for recompute in ("none", "full"):
        words = ("--seq-length", "256", "--global-batch-size", "16", "--recompute", recompute, "--json")
        status, said = run(*words)
        assert status == 0
        found[recompute] = json.loads(said)
        assert found[recompute]["workload"] == {
            "seq_length": 256, "micro_batch_size": 1, "global_batch_size": 16, "recompute": recompute, "model": "gpt",
            "dtype": "bf16", "microbatches": 8,
        }  # fmt: skip
    assert found["full"]["largest"] < found["none"]["largest"]
    assert json.loads(run("--json")[1])["largest"] < found["full"]["largest"]
    assert "activations: 2 microbatches of 1 x 256 tokens" in run("--seq-length", "256")[1]
    for words, message in {
        ("--recompute", "full"): "recompute (full) is for counting activations, which needs seq_length",
        ("--global-batch-size", "8"): "global_batch_size (8) is for counting activations",
        ("--seq-length", "256", "--global-batch-size", "3"): "global_batch_size (3) must be a multiple of",
        ("--seq-length", "256", "--recompute", "some"): "'some' is not one of 'none', 'selective', 'full'",
    }.items():
        status, said = run(*words)
        assert status == 2
        assert message in said.replace(" │ │ ", " ")
