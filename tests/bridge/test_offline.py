"""Import and export without a model: FP8 back to the byte, fresh scales, bf16, changed weights, and what is refused.

What a checkpoint holds is read by safetensors' own reader, or by torch.distributed.checkpoint's; what it should hold is
`reference.fp8`'s.
"""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import EDGY_CONFIG, all_tensors, edit_config, edit_tensors
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from bridge import offline_import
from bridge.offline_export import ExportJob, ExportSummary, export_checkpoint
from bridge.offline_import import ImportJob, import_checkpoint
from bridge.staging import Staging
from reference.config import ModelConfig
from reference.dist_checkpoint import entries
from reference.fp8 import FP8, dequantize_blockwise, quantize_blockwise, requantize_blockwise
from reference.sharding import shard

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig.from_hf(EDGY_CONFIG)
UNIT_BYTES, SHARD_BYTES = 100_000, 150_000
SCALE = "_scale_inv"
Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
W1 = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
W2 = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


def imported_from(source: Path, out: Path, **options) -> Path:
    job = ImportJob(str(source), str(out), **{"unit_bytes": UNIT_BYTES} | options)
    import_checkpoint(job)
    return out


def export(megatron: Path, out: Path, **options) -> ExportSummary:
    return export_checkpoint(ExportJob(str(megatron), str(out), **{"max_shard_bytes": SHARD_BYTES} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """By the reference; what is not quantised as it is."""
    found = {}
    for name, value in tensors.items():
        if value.dtype == FP8:
            found[name] = dequantize_blockwise(value, tensors[name + SCALE], dtype=dtype)
        elif not name.endswith(SCALE):
            found[name] = value
    return found


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(found[name]), bits(value)), name


@pytest.fixture(scope="module")
def imported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in bf16. Do not write to it."""
    return imported_from(checkpoint, tmp_path_factory.mktemp("imported") / "megatron")


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> dict[str, Tensor]:
    return all_tensors(checkpoint)


@pytest.fixture(scope="module")
def plain(imported: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as bf16 Hugging Face files. Do not write to it."""
    out = tmp_path_factory.mktemp("plain") / "hf"
    export(imported, out, quantization="none", source=str(checkpoint))
    return out


# --------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_torch_reads_the_dequantised_weights(
    imported: Path, checkpoint: Path, source: dict, tmp_path: Path, dtype: str
) -> None:
    folder = imported if dtype == "bf16" else imported_from(checkpoint, tmp_path / "megatron", dtype="fp32")
    wide = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    weights = dequantised(source, wide)
    wanted: dict[str, Tensor] = {}
    for entry in entries(CONFIG):
        kept = torch.float32 if "router" in entry.key else wide
        whole = wanted.setdefault(entry.key, torch.full(entry.shape, torch.nan, dtype=kept))
        whole[entry.index] = shard(entry.parameter, weights).to(kept)
    found = {key: torch.empty_like(value) for key, value in wanted.items()}
    reader = FileSystemReader(folder / "iter_0000001")
    dcp.load(found, storage_reader=reader, no_dist=True)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
        assert reader.read_metadata().state_dict_metadata[key].properties.dtype == value.dtype


def test_the_folder_is_one_that_megatron_lm_knows(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert set(os.listdir(imported)) == {"latest_checkpointed_iteration.txt", "iter_0000001", "hugging_face"}
    assert (imported / "latest_checkpointed_iteration.txt").read_text() == "1"
    names = set(os.listdir(imported / "iter_0000001"))
    files = {name for name in names if name.endswith(".distcp")}
    assert len(files) > 4, "several units"
    assert names == {*files, ".metadata", "metadata.json"}
    carried = {name: data for name, data in contents(checkpoint).items() if "safetensors" not in name}
    assert contents(imported / "hugging_face") == carried
    assert "chat_template.jinja" in carried
    other = imported_from(checkpoint, tmp_path / "other", iteration=250)
    assert (other / "latest_checkpointed_iteration.txt").read_text() == "250"
    assert (other / "iter_0000250/.metadata").is_file()
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_units_say_only_how_the_bytes_are_spread(imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """One file, or many with bands of rows of one weight: torch reads the same, and so do we."""
    read, counts = [], []
    for number, (unit_bytes, chunk_bytes) in enumerate([(10**9, 2**26), (200_000, 15_000)]):
        monkeypatch.setattr(offline_import, "CHUNK_BYTES", chunk_bytes)
        offline_import._plan.cache_clear()
        folder = imported_from(checkpoint, tmp_path / str(number), unit_bytes=unit_bytes) / "iter_0000001"
        found = {entry.key: torch.empty(entry.shape) for entry in entries(CONFIG)}
        dcp.load(found, storage_reader=FileSystemReader(folder), no_dist=True)
        read.append(found)
        counts.append(len(list(folder.glob("*.distcp"))))
    offline_import._plan.cache_clear()
    assert counts[0] == 2 < counts[1]
    assert all(torch.equal(value, read[0][key]) for key, value in read[1].items())
    export(tmp_path / "1", tmp_path / "hf", source=str(checkpoint))
    assert_same_tensors(all_tensors(tmp_path / "hf"), all_tensors(checkpoint))


def test_an_interrupted_import_is_taken_up(imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=UNIT_BYTES)
    write_chunks = offline_import.write_chunks

    def full_disk(folder: Path, unit: int, chunks: list) -> list:
        if unit == 3:
            raise OSError(28, "No space left on device")
        return write_chunks(folder, unit, chunks)

    monkeypatch.setattr(offline_import, "write_chunks", full_disk)
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(job)
    monkeypatch.setattr(offline_import, "write_chunks", write_chunks)
    assert not (tmp_path / "out").exists()
    summary = import_checkpoint(job)
    assert summary.reused == 3
    assert contents(tmp_path / "out") == contents(imported)
    assert os.listdir(tmp_path) == ["out"]


def test_a_run_killed_after_its_last_rename_is_known_to_be_complete(
    imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=UNIT_BYTES)

    def killed(staging: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "forget", killed)
        with pytest.raises(KeyboardInterrupt):
            import_checkpoint(job)
    assert sorted(os.listdir(tmp_path)) == [".out.journal", "out"]
    with pytest.raises(ValueError, match="is not empty"):  # another job
        import_checkpoint(job._replace(dtype="fp32"))
    summary = import_checkpoint(job)
    assert summary.reused == summary.files
    assert contents(tmp_path / "out") == contents(imported)
    assert os.listdir(tmp_path) == ["out"]


def test_a_complete_output_that_was_changed_is_not_called_complete(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=UNIT_BYTES)
    with monkeypatch.context() as patched:
        patched.setattr(Staging, "forget", lambda staging: None)
        import_checkpoint(job)
    (tmp_path / "out/iter_0000001/__1_0.distcp").unlink()
    with pytest.raises(ValueError, match="changed since"):
        import_checkpoint(job)


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_untouched_weights_come_back_to_the_byte(
    imported: Path, checkpoint: Path, source: dict, tmp_path: Path, dtype: str
) -> None:
    megatron = imported if dtype == "bf16" else imported_from(checkpoint, tmp_path / "megatron", dtype="fp32")
    summary = export(megatron, tmp_path / "out", source=str(checkpoint))
    assert_same_tensors(all_tensors(tmp_path / "out"), source)
    assert sum("model.layers.2." in name for name in source) == 2, "the multi-token-prediction layer is among them"
    others = [{k: v for k, v in contents(f).items() if "safetensors" not in k} for f in (tmp_path / "out", checkpoint)]
    assert others[0] == others[1]
    quantised = sum(name.endswith(SCALE) for name in source)
    assert (summary.identical, summary.requantised, summary.worst, summary.worst_error) == (quantised, 0, "", 0.0)
    assert summary.tensors == len(source)
    assert summary.bytes_written == sum(value.numel() * value.itemsize for value in source.values())
    assert summary.files == len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == summary.bytes_written


def test_fresh_scales_are_the_references(imported: Path, source: dict, tmp_path: Path) -> None:
    """Without a source: config and tokenizer are those that lie beside the Megatron checkpoint."""
    summary = export(imported, tmp_path / "out", scales="fresh")
    wanted = {}
    for name, value in dequantised(source).items():
        if "model.layers.2." in name:
            continue  # multi-token prediction: not in a Megatron checkpoint
        if source[name].dtype == FP8:
            wanted[name], wanted[name + SCALE] = quantize_blockwise(value)
        else:
            wanted[name] = value
    found = all_tensors(tmp_path / "out")
    assert_same_tensors(found, wanted)
    carried = {name: data for name, data in contents(tmp_path / "out").items() if "safetensors" not in name}
    assert carried == contents(imported / "hugging_face")
    changed = [name for name in wanted if name.endswith(SCALE) and not torch.equal(wanted[name], source[name])]
    assert changed, "fresh scales differ from the source's, or this shows nothing"
    assert (summary.identical, summary.requantised) == (0, sum(name.endswith(SCALE) for name in wanted))


def test_without_quantisation_the_weights_are_the_dequantised_ones(plain: Path, checkpoint: Path, source: dict) -> None:
    assert_same_tensors(all_tensors(plain), dequantised(source))
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    assert list(json.loads((plain / "config.json").read_text()).items()) == list(config.items())


def test_transformers_loads_it(plain: Path, source: dict) -> None:
    from oracles import to_disk_names
    from transformers import MiniMaxM2ForCausalLM

    model = MiniMaxM2ForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    found = to_disk_names(dict(model.state_dict()))
    wanted = {name: value for name, value in dequantised(source).items() if "model.layers.2." not in name}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value.to(found[name].dtype)), name


def test_a_source_that_is_not_quantised(plain: Path, imported: Path, source: dict, tmp_path: Path) -> None:
    """bf16 in gives the Megatron checkpoint that FP8 gives; FP8 out, from a config that says nothing of it."""
    megatron = imported_from(plain, tmp_path / "megatron")
    assert contents(megatron / "iter_0000001") == contents(imported / "iter_0000001")
    export(megatron, tmp_path / "plain", quantization="none", source=str(plain))
    assert contents(tmp_path / "plain") == contents(plain)
    export(megatron, tmp_path / "fp8", scales="fresh", source=str(plain))
    found = all_tensors(tmp_path / "fp8")
    assert found.keys() == source.keys()
    codes, scale_inv = quantize_blockwise(dequantised(source)[Q])
    assert torch.equal(bits(found[Q]), bits(codes))
    assert torch.equal(found[Q + SCALE], scale_inv)
    section = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["weight_block_size"]) == ("fp8", [128, 128])


def one_block(weight: Tensor) -> None:
    weight[130, 5] = 0.5


def every_block(weight: Tensor) -> None:
    weight *= 1.37


def last_column(weight: Tensor) -> None:
    weight[:, -1] += 0.25


CHANGED: dict[str, Callable[[Tensor], None]] = {Q: one_block, W1: every_block, W2: last_column}


def test_of_a_changed_weight_only_the_changed_blocks_change(
    plain: Path, checkpoint: Path, source: dict, tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(plain, tmp_path / "trained"))
    edit_tensors(trained, lambda tensors: [change(tensors[name]) for name, change in CHANGED.items()])
    megatron = imported_from(trained, tmp_path / "megatron")
    summary = export(megatron, tmp_path / "out", source=str(checkpoint))
    found, weights = all_tensors(tmp_path / "out"), all_tensors(trained)
    wanted, worst = dict(source), {}
    for name in CHANGED:
        wanted[name], wanted[name + SCALE] = requantize_blockwise(weights[name], source[name + SCALE])
        weight = weights[name].double()
        error = found[name].double() * spread(found[name + SCALE].double(), weight.shape)
        worst[name] = ((error.bfloat16().double() - weight).square().sum() / weight.square().sum()).sqrt().item()
    assert_same_tensors(found, wanted)
    touched = {name: (found[name + SCALE] != source[name + SCALE]).tolist() for name in CHANGED}
    assert touched[Q] == [[False, False], [True, False], [False, False]]
    assert touched[W1] == [[True, True]]
    assert touched[W2] == [[True], [True]]
    quantised = sum(name.endswith(SCALE) for name in source)
    assert (summary.identical, summary.requantised) == (quantised - 3, 3)
    assert summary.worst == max(worst, key=worst.get)
    assert math.isclose(summary.worst_error, max(worst.values()), rel_tol=1e-4)
    assert 0.01 < summary.worst_error < 0.04, "three bits of mantissa: 2^-4 at most, about 2^-5.3 on average"


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def test_a_dry_run_says_the_same_and_writes_nothing(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "megatron"), unit_bytes=UNIT_BYTES)
    said = import_checkpoint(job, dry_run=True)
    assert os.listdir(tmp_path) == []
    assert said == import_checkpoint(job)
    values = sum(math.prod(shape) for shape in {entry.key: entry.shape for entry in entries(CONFIG)}.values())
    router = 2 * 5 * (160 + 1)
    assert said.bytes_written == 2 * values + 2 * router, "bfloat16, but for the routers"
    assert said.mtp_tensors == 2
    shutil.rmtree(tmp_path / "megatron")
    hf = ExportJob(str(imported), str(tmp_path / "hf"), source=str(checkpoint), max_shard_bytes=SHARD_BYTES)
    planned = export_checkpoint(hf, dry_run=True)
    assert os.listdir(tmp_path) == []
    done = export_checkpoint(hf)
    assert planned == done._replace(identical=0)
    assert planned.bytes_read == said.bytes_written


@pytest.mark.parametrize("what", ["import", "export"])
def test_everything_is_on_the_disk_before_it_is_in_place(
    imported: Path, checkpoint: Path, tmp_path: Path, monkeypatch, what: str
) -> None:
    synced: dict[int, int] = {}
    fsync = os.fsync

    def record(handle: int) -> None:
        found = os.fstat(handle)
        synced[found.st_ino] = found.st_mtime_ns
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", record)
        if what == "import":
            imported_from(checkpoint, tmp_path / "out")
        else:
            export(imported, tmp_path / "out", source=str(checkpoint))
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert path.stat().st_ino in synced, f"{path.relative_to(tmp_path)} was never synced"
        if path.is_file():
            assert synced[path.stat().st_ino] == path.stat().st_mtime_ns, f"{path.name} was written to afterwards"


# ------------------------------------------------------------------------------------------------------ many processes


@pytest.mark.slow  # two workers also run, and are killed, in test_faults
def test_two_workers_write_the_same_bytes(imported: Path, plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "megatron"), unit_bytes=UNIT_BYTES)
    import_checkpoint(job, workers=2)
    assert contents(tmp_path / "megatron") == contents(imported)
    job = ExportJob(str(imported), str(tmp_path / "hf"), "none", source=str(checkpoint), max_shard_bytes=SHARD_BYTES)
    export_checkpoint(job, workers=2)
    assert contents(tmp_path / "hf") == contents(plain)
    assert sorted(os.listdir(tmp_path)) == ["hf", "megatron"]


TORCHRUN = """
import sys
from bridge.offline_export import ExportJob, export_checkpoint
from bridge.offline_import import ImportJob, import_checkpoint
from bridge.agreement import is_leader
from bridge.team import Ranks
from pathlib import Path

if __name__ == "__main__":
    source, damaged, out = map(Path, sys.argv[1:4])
    unit_bytes, shard_bytes = map(int, sys.argv[4:])
    with Ranks():
        import torch
        summary = import_checkpoint(ImportJob(str(source), str(out / "megatron"), unit_bytes=unit_bytes))
        job = ExportJob(str(out / "megatron"), str(out / "hf"), source=str(source), max_shard_bytes=shard_bytes)
        said = export_checkpoint(job)
        try:
            import_checkpoint(ImportJob(str(damaged), str(out / "damaged"), unit_bytes=unit_bytes))
            error = "none"
        except ValueError as caught:
            error = str(caught)
        rank = torch.distributed.get_rank()
        (out / f"rank{rank}").write_text(f"{is_leader()} {summary.files} {said.identical}\\n{error}")
"""


def test_torchruns_ranks_write_the_same_bytes(
    imported: Path, checkpoint: Path, source: dict, copy: Path, tmp_path: Path
) -> None:
    """And an error that one of them meets is every rank's."""
    out, script = tmp_path / "out", tmp_path / "script.py"
    out.mkdir()
    script.write_text(TORCHRUN)
    edit_tensors(copy, lambda tensors: tensors[W2 + SCALE].fill_(-1))
    arguments = [str(checkpoint), str(copy), str(out), str(UNIT_BYTES), str(SHARD_BYTES)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    assert contents(out / "megatron") == contents(imported)
    assert_same_tensors(all_tensors(out / "hf"), source)
    said = [(out / f"rank{rank}").read_text().split("\n", 1) for rank in range(2)]
    counts = f"{len(list((imported / 'iter_0000001').glob('*.distcp')))} {sum(name.endswith(SCALE) for name in source)}"
    assert [first for first, _ in said] == [f"True {counts}", f"False {counts}"]
    assert said[0][1] == said[1][1]
    assert f"{W2}{SCALE}: scale of block [0, 0] is -1.0" in said[0][1]
    assert not (out / "damaged").exists()


# ------------------------------------------------------------------------------------------------------ what is refused


def setting(name: str, change: Callable[[Tensor], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: change(tensors[name]))


def nan_code(weight: Tensor) -> None:
    weight.view(torch.uint8)[3, 5] = 0xFF


DAMAGED_SOURCES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "NaN scale": (setting(Q + SCALE, lambda s: s[2, 1].fill_(math.nan)), [Q + SCALE, "nan"]),
    "zero scale": (setting(W2 + SCALE, lambda s: s[1, 0].fill_(0)), [W2 + SCALE, "0.0"]),
    "NaN code": (setting(Q, nan_code), [f"{Q}: float8 code at", "NaN"]),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop(W2)), [f"{W2}: missing"]),
    "wrong size": (
        lambda f: edit_config(f, lambda c: c.update(vocab_size=130)),
        ["model.embed_tokens.weight", "[130, 160]"],
    ),
    "another model": (lambda f: edit_config(f, lambda c: c.update(model_type="mixtral")), ["model_type", "mixtral"]),
}


@pytest.mark.parametrize("damage", DAMAGED_SOURCES)
def test_a_damaged_source_is_not_imported(copy: Path, tmp_path: Path, damage: str) -> None:
    spoil, mentions = DAMAGED_SOURCES[damage]
    spoil(copy)
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as caught:
        imported_from(copy, tmp_path / "out")
    for mention in mentions:
        assert mention in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["NaN scale", "NaN code"])
def test_a_damaged_source_lends_no_scales(imported: Path, copy: Path, tmp_path: Path, damage: str) -> None:
    spoil, mentions = DAMAGED_SOURCES[damage]
    spoil(copy)
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as caught:
        export(imported, tmp_path / "out", source=str(copy))
    for mention in mentions:
        assert mention in str(caught.value)
    assert not (tmp_path / "out").exists()


def edit_metadata(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "iter_0000001/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))


def edit_beside(folder: Path, change: Callable[[dict], object]) -> None:
    edit_config(folder / "hugging_face", change)


QKV = "decoder.layers.self_attention.linear_qkv.weight"
FRESH = {"scales": "fresh"}
REFUSED_EXPORTS: dict[str, tuple[Callable[[Path], object], dict, list[str]]] = {
    "missing key": (lambda f: edit_metadata(f, lambda m: m.pop(QKV)), FRESH, [f"{QKV}: missing from"]),
    "fewer experts": (
        lambda f: edit_beside(f, lambda c: c.update(num_local_experts=4)),
        FRESH,
        ["decoder.layers.mlp.router.weight: found shape [2, 5, 160]", "expected [2, 4, 160]"],
    ),
    "more layers": (lambda f: edit_beside(f, lambda c: c.update(num_hidden_layers=3)), FRESH, ["[2, 160]", "[3, 160]"]),
    "more tokens": (lambda f: edit_beside(f, lambda c: c.update(vocab_size=132)), FRESH, ["[131, 160]", "[132, 160]"]),
    "no config": (lambda f: shutil.rmtree(f / "hugging_face"), FRESH, ["no hugging_face/config.json", "as source"]),
    "config is not JSON": (
        lambda f: (f / "hugging_face/config.json").write_text("{"),
        FRESH,
        ["hugging_face/config.json: not JSON"],
    ),
    "no source for its scales": (lambda f: None, {"scales": "source"}, ["scales 'source' needs", "give source"]),
    "unknown quantisation": (
        lambda f: None,
        {"quantization": "int4"},
        ["quantization must be 'fp8' or 'none'", "int4"],
    ),
    "unknown scales": (lambda f: None, {"scales": "stale"}, ["scales", "stale"]),
}


@pytest.mark.parametrize("case", REFUSED_EXPORTS)
def test_what_is_not_exported(imported: Path, tmp_path: Path, case: str) -> None:
    spoil, options, mentions = REFUSED_EXPORTS[case]
    megatron = Path(shutil.copytree(imported, tmp_path / "megatron"))
    spoil(megatron)
    with pytest.raises(ValueError, match=re.escape(mentions[0])) as caught:
        export(megatron, tmp_path / "out", **options)
    for mention in mentions:
        assert mention in str(caught.value)
    assert os.listdir(tmp_path) == ["megatron"]


def test_a_source_without_scales_lends_none(imported: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scales 'source' needs the FP8 checkpoint"):
        export(imported, tmp_path / "out", source=str(plain))
    assert os.listdir(tmp_path) == []


def test_a_weight_that_is_not_finite_is_named(plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(plain, tmp_path / "trained"))
    edit_tensors(trained, lambda tensors: tensors[K][1, 2].fill_(math.inf))
    megatron = imported_from(trained, tmp_path / "megatron")
    with pytest.raises(ValueError, match=rf"{K}: value at \[1, 2\] is inf"):
        export(megatron, tmp_path / "out", source=str(checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "fp16"}, "dtype must be one of"), ({"iteration": 0}, "iteration must be at least 1")],
)
def test_options_that_make_no_sense(checkpoint: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported_from(checkpoint, tmp_path / "out", **options)
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_replaced_only_when_asked(imported: Path, checkpoint: Path, tmp_path: Path) -> None:
    job = ExportJob(str(imported), str(tmp_path / "out"), source=str(checkpoint), max_shard_bytes=SHARD_BYTES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "out/stale").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        export_checkpoint(job)
    assert contents(tmp_path / "out") == {"config.json": b"{}", "stale": b"x"}
    export_checkpoint(job, overwrite=True)
    assert "stale" not in contents(tmp_path / "out")
    with pytest.raises(ValueError, match="holds files and no latest_checkpointed_iteration"):
        import_checkpoint(ImportJob(str(checkpoint), str(tmp_path / "out")), overwrite=True)
