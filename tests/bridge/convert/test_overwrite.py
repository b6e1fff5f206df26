"""Nothing that exists is destroyed: sources, other people's files, a Megatron-LM folder's iterations."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.conversions import imported_from
from support.folders import contents
from typer.testing import CliRunner

from bridge.cli import app
from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.jobs import staging
from bridge.jobs.staging import Staging

TRACKER = "latest_checkpointed_iteration.txt"


def command(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.fixture
def folders(checkpoint: Path, imported: Path, tmp_path: Path) -> Path:
    """`hf/src` and `meg/src`, copies to put at risk; a link to each beside them."""
    shutil.copytree(checkpoint, tmp_path / "hf/src")
    shutil.copytree(imported, tmp_path / "meg/src")
    (tmp_path / "links").mkdir()
    for kind in ("hf", "meg"):
        (tmp_path / "links" / kind).symlink_to(tmp_path / kind)
    return tmp_path


# What is read, and where it would be written.
AT_RISK = {
    "import, itself": ("import", "hf/src", "hf/src"),
    "import, around it": ("import", "hf/src", "hf"),
    "import, inside it": ("import", "hf/src", "hf/src/out"),
    "import, by a link": ("import", "hf/src", "links/hf/src"),
    "import, from a link": ("import", "links/hf/src", "hf"),
    "export, itself": ("export", "meg/src", "meg/src"),
    "export, around it": ("export", "meg/src", "meg"),
    "export, inside it": ("export", "meg/src", "meg/src/iter_0000001/hf"),
    "export, by a link": ("export", "meg/src", "links/meg"),
    "export, its source": ("export", "meg/src", "hf/src", "--source", "hf/src", "--quantization", "none"),
    "export, around its source": ("export", "meg/src", "links/hf", "--source", "hf/src", "--quantization", "none"),
    "roundtrip, itself": ("roundtrip", "hf/src", "--out", "hf/src"),
    "roundtrip, around it": ("roundtrip", "hf/src", "--out", "hf"),
    "roundtrip, by a link": ("roundtrip", "links/hf/src", "--out", "hf/src/deep"),
}


@pytest.mark.parametrize("case", AT_RISK)
@pytest.mark.parametrize("relative", [False, True])
def test_no_command_writes_over_what_it_reads(
    folders: Path, case: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folders)
    monkeypatch.chdir(folders / "links")
    root = Path("..") if relative else folders
    verb, *words = AT_RISK[case]
    status, said = command(
        verb, *(root / word if "/" in word or word in ("hf", "meg") else word for word in words), "--overwrite"
    )
    assert status == 2, said
    assert "write elsewhere" in said
    assert contents(folders) == before
    assert not [path for path in folders.rglob(".*") if path.name.endswith((".journal", ".partial"))]


@pytest.mark.parametrize("mine", ["thesis.tex", "src/main.py", "adapter_model.safetensors", "optimizer.pt"])
def test_export_loses_no_file_of_others(imported: Path, checkpoint: Path, tmp_path: Path, mine: str) -> None:
    out = tmp_path / "out"
    (out / mine).parent.mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / mine).write_text("mine")
    before = contents(out)
    with pytest.raises(ValueError, match=f"holds {mine}, which the new checkpoint has not"):
        export_checkpoint(ExportJob(str(imported), str(out), source=str(checkpoint)), overwrite=True)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


# -------------------------------------------------------------------------------------------- a Megatron-LM folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """What a training run has saved: two iterations and its logs."""
    out = tmp_path / "run"
    for name in ("iter_0000100", "iter_0000200", "tensorboard"):
        (out / name).mkdir(parents=True)
        (out / name / "data").write_text(name)
    (out / TRACKER).write_text("200")
    return out


def test_a_megatron_folder_gains_an_iteration_and_loses_none(
    run_folder: Path, imported: Path, checkpoint: Path
) -> None:
    before = contents(run_folder)
    job = ImportJob(str(checkpoint), str(run_folder), iteration=7)
    with pytest.raises(ValueError, match="overwrite adds iteration 7 to it and leaves the others"):
        import_checkpoint(job)
    assert contents(run_folder) == before
    import_checkpoint(job, overwrite=True)
    after = contents(run_folder)
    assert {name: after[name] for name in before if name != TRACKER} == {
        name: data for name, data in before.items() if name != TRACKER
    }
    assert after[TRACKER] == b"7"
    assert not [name for name in os.listdir(run_folder) if name.startswith(".")]
    exported = run_folder.parent / "hf"
    export_checkpoint(ExportJob(str(run_folder), str(exported), scales="fresh"))
    export_checkpoint(ExportJob(str(imported), str(exported.with_name("other")), scales="fresh"))
    assert contents(exported) == contents(exported.with_name("other"))


def test_an_iteration_that_a_run_saved_stays(run_folder: Path, checkpoint: Path) -> None:
    before = contents(run_folder)
    with pytest.raises(ValueError, match="iter_0000200: was not written by an import, so it stays"):
        import_checkpoint(ImportJob(str(checkpoint), str(run_folder), iteration=200), overwrite=True)
    assert contents(run_folder) == before


def test_an_iteration_of_an_import_is_replaced_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    out = imported_from(checkpoint, tmp_path / "out")
    job = ImportJob(str(checkpoint), str(out), dtype="fp32")
    with pytest.raises(ValueError, match="overwrite adds iteration 1"):
        import_checkpoint(job)
    import_checkpoint(job, overwrite=True)
    assert json.loads((out / "iter_0000001/minimax_m2.json").read_text())["dtype"] == "fp32"
    (out / "iter_0000001/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        import_checkpoint(job, overwrite=True)
    assert (out / "iter_0000001/notes.txt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------- taken up again


def stopped(job: ImportJob, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that fails when everything is written; what it says."""

    def no_room(staging: Staging, then: object = None) -> None:
        raise OSError(28, "No space left on device", str(staging.out))

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "publish", no_room)
        with pytest.raises(OSError, match="No space left") as error:
            import_checkpoint(job)
    return "\n".join(error.value.__notes__)


def test_an_error_names_what_is_kept(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = stopped(ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000), monkeypatch)
    partial = tmp_path / ".out.partial"
    size = sum(len(data) for data in contents(partial).values())
    assert f"{partial} ({size:,} bytes)" in note
    assert "delete it to give the room back" in note


@pytest.mark.parametrize("spelling", ["relative", "dots", "through a link"])
def test_a_respelt_output_is_taken_up(
    checkpoint: Path, tmp_path: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000)
    stopped(job, monkeypatch)
    out = {"relative": "out", "dots": "./x/../out", "through a link": str(tmp_path / "link/out")}[spelling]
    summary = import_checkpoint(job._replace(out=out))
    assert summary.reused >= 10, "all units were done"
    assert (tmp_path / "out" / TRACKER).is_file()
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


DAMAGES = {"empty": b"", "cut": b'{"files": {"a', "a list": b"[]", "no files": b"{}", "binary": b"\xff\x00\xfe"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_costs_its_unit(
    checkpoint: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000)
    whole = import_checkpoint(job._replace(out=str(tmp_path / "whole"))).reused
    stopped(job, monkeypatch)
    records = sorted((tmp_path / ".out.journal").glob("unit-*.json"))
    records[3].write_bytes(DAMAGES[damage])
    summary = import_checkpoint(job)
    assert whole == 0
    assert summary.reused == len(records) - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_unit_of_another_source_is_not_taken(
    checkpoint: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where its record was put into this run's journal: it says what it was made from."""
    stopped(ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000, dtype="fp32"), monkeypatch)
    records = {path.name: path.read_bytes() for path in (tmp_path / ".out.journal").glob("unit-*.json")}
    files = contents(tmp_path / ".out.partial")
    job = ImportJob(str(checkpoint), str(tmp_path / "out"), unit_bytes=100_000)
    stopped(job, monkeypatch)
    for name, data in records.items():
        (tmp_path / ".out.journal" / name).write_bytes(data)
    for name, data in files.items():
        (tmp_path / ".out.partial" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".out.partial" / name).write_bytes(data)
    assert import_checkpoint(job).reused == 0
