"""Writing: what comes back is what went in, and whatever stops the run, no folder looks complete that is not."""

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bridge.hf_files import DTYPES, HFCheckpoint
from bridge.hf_writer import HFWriter

ROOT = Path(__file__).parents[2]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    paths = sorted(folder.rglob("*"))
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in [folder, *paths]}


def write_small(out: Path, value: float, **options: Any) -> None:
    with HFWriter(out, **options) as writer:
        writer.add("w", torch.tensor([value]))
        writer.finish({"value": value})


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of one or two bytes, repeated to fill wider dtypes; False and True."""
    if dtype == torch.bool:
        return torch.tensor([[False, True]])
    width = dtype.itemsize
    patterns = torch.arange(256, dtype=torch.uint8) if width == 1 else torch.arange(-(2**15), 2**15).to(torch.int16)
    return (
        patterns.view(torch.uint8).reshape(-1, min(width, 2)).repeat(1, max(width // 2, 1)).view(dtype).reshape(16, -1)
    )


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path):
    wanted = {f"model.{name}": all_values(dtype) for name, dtype in DTYPES.items()}
    wanted |= {"scalar": torch.tensor(-0.0, dtype=torch.bfloat16), "empty": torch.empty(0, 7)}
    assert wanted["model.BF16"].isnan().sum() == 2 * 127, "every NaN payload of bfloat16"
    assert wanted["model.F8_E4M3"].isnan().sum() == 2
    with HFWriter(tmp_path / "out", max_shard_bytes=100_000) as writer:
        for name, tensor in wanted.items():
            writer.add(name, tensor)
        writer.finish({})
    with HFCheckpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.tensors.keys() == wanted.keys()
        for name, tensor in wanted.items():
            found = checkpoint.read(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert bytes_of(found) == bytes_of(tensor), name


def test_a_checkpoint_read_and_written_again_has_the_same_bytes(tmp_path: Path):
    with HFWriter(tmp_path / "one", max_shard_bytes=64) as writer:
        for i in range(20):
            writer.add(f"t{i}", torch.full((i + 1,), i, dtype=torch.float8_e4m3fn))
        writer.add_file(__file__, "docs/test.py")
        writer.finish(b'{ "odd":   "spacing" }')
    with HFCheckpoint(tmp_path / "one") as source, HFWriter(tmp_path / "two", max_shard_bytes=64) as writer:
        for i in range(20):
            writer.add(f"t{i}", source.read(f"t{i}"))
        for path in source.carried_files():
            writer.add_file(source.folder / path, path)
        writer.finish((source.folder / "config.json").read_bytes())
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).rglob("*") if p.is_file()} for d in ("one", "two")]
    assert files[0] == files[1]
    assert files[0]["config.json"] == b'{ "odd":   "spacing" }'
    assert files[0]["test.py"] == Path(__file__).read_bytes()


def test_names_index_and_shard_sizes(tmp_path: Path):
    sizes = {"z": 3, "big": 50, "c": 4, "d": 6, "e": 1}  # 10 bytes a shard: [z] [big] [c d] [e]
    with HFWriter(tmp_path / "out", max_shard_bytes=10) as writer:
        for name, size in sizes.items():
            writer.add(name, torch.zeros(size, dtype=torch.uint8))
        writer.finish({"zeta": 1, "alpha": "é"})
    files = {name: f"model-0000{n}-of-00004.safetensors" for name, n in zip(sizes, [1, 2, 3, 3, 4], strict=True)}
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 64}, "weight_map": files}
    assert list(index["weight_map"]) == sorted(sizes)
    assert list(json.loads((tmp_path / "out/config.json").read_text()).items()) == [("zeta", 1), ("alpha", "é")]
    expected = {*files.values(), "config.json", "model.safetensors.index.json"}
    assert set(os.listdir(tmp_path / "out")) == expected
    assert os.listdir(tmp_path) == ["out"], "nothing is left beside it"
    for file in files.values():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}


def test_only_one_shard_waits_in_memory(tmp_path: Path):
    with HFWriter(tmp_path / "out", max_shard_bytes=4096) as writer:
        for i in range(1, 40):
            writer.add(f"t{i}", torch.zeros(1000, dtype=torch.uint8))
            on_disk = sum(p.stat().st_size for p in tmp_path.glob(".out.partial-*/shard-*"))
            assert 1000 * i - on_disk <= 4096
            assert not (tmp_path / "out").exists()


def test_added_tensors_are_copies_of_what_they_were(tmp_path: Path):
    """A reused buffer, overlapping views, a tied weight, a transpose, a gradient leaf: safetensors refuses some."""
    buffer, matrix = torch.arange(6.0), torch.arange(12.0).reshape(3, 4)
    with HFWriter(tmp_path / "out") as writer:
        writer.add("buffer", buffer)
        buffer.fill_(-1)
        writer.add("rows", matrix[:2])
        writer.add("overlapping rows", matrix[1:])
        writer.add("tied", matrix[:2])
        writer.add("transposed", matrix.T)
        writer.add("strided", matrix[:, ::2])
        writer.add("parameter", torch.nn.Parameter(matrix.clone()))
        writer.finish({})
    with HFCheckpoint(tmp_path / "out") as checkpoint:
        assert torch.equal(checkpoint.read("buffer"), torch.arange(6.0))
        assert torch.equal(checkpoint.read("tied"), matrix[:2])
        assert torch.equal(checkpoint.read("overlapping rows"), matrix[1:])
        assert torch.equal(checkpoint.read("transposed"), matrix.T)
        assert torch.equal(checkpoint.read("strided"), matrix[:, ::2])
        assert torch.equal(checkpoint.read("parameter"), matrix)


def test_files_get_the_rights_the_umask_allows(tmp_path: Path):
    umask = os.umask(0o027)
    try:
        write_small(tmp_path / "out", 1.0)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write_small(tmp_path / "empty", 1.0)
    write_small(tmp_path / "a/b/out", 2.0)
    for folder, value in [("empty", 1.0), ("a/b/out", 2.0)]:
        with HFCheckpoint(tmp_path / folder) as checkpoint:
            assert checkpoint.read("w") == value


def test_a_relative_target_is_where_it_was_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with HFWriter("../there/.") as writer:
        monkeypatch.chdir(tmp_path)
        writer.add("w", torch.zeros(1))
        writer.finish({})
    assert (tmp_path / "there/config.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["full", "file", "link", "dangling link"])
def test_a_refused_target_is_named_and_nothing_is_written(tmp_path: Path, kind: str, overwrite: bool):
    out = tmp_path / "out"
    if kind == "full":
        out.mkdir()
        (out / "thesis.tex").write_text("no checkpoint, so not even overwrite may replace it")
    elif kind == "file":
        out.write_text("x")
    else:
        write_small(tmp_path / "real", 1.0)
        out.symlink_to(tmp_path / ("real" if kind == "link" else "nothing"))
    before = snapshot(tmp_path) if kind != "dangling link" else os.listdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{out}: "):
        HFWriter(out, overwrite=overwrite)
    assert before == (snapshot(tmp_path) if kind != "dangling link" else os.listdir(tmp_path))


def test_a_mount_point_is_refused():
    with pytest.raises(ValueError, match=r"^/proc: .*mount point"):
        HFWriter("/proc", overwrite=True)


def test_a_checkpoint_is_replaced_only_when_asked(tmp_path: Path):
    out = tmp_path / "out"
    write_small(out, 1.0)
    (out / "old-tokenizer.json").write_text("{}")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=f"^{out}: is not empty.*overwrite"):
        HFWriter(out)
    assert snapshot(tmp_path) == before
    write_small(out, 2.0, overwrite=True)
    with HFCheckpoint(out) as checkpoint:
        assert checkpoint.read("w") == 2.0
        assert checkpoint.carried_files() == [], "nothing of the old checkpoint is mixed in"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_leaving_early_leaves_everything_as_it_was(tmp_path: Path, error: type[BaseException] | None, old: bool):
    folder = tmp_path / "folder"
    folder.mkdir()
    if old:
        write_small(folder / "out", 1.0)
    before = snapshot(folder / "out") if old else None
    with (
        pytest.raises(error) if error else nullcontext(),
        HFWriter(folder / "out", overwrite=old, max_shard_bytes=4) as writer,
    ):
        for i in range(5):
            writer.add(f"t{i}", torch.zeros(1))
        assert len(list(folder.glob(".out.partial-*/shard-*"))) == 4
        if error:
            raise error
    assert os.listdir(folder) == (["out"] if old else [])
    assert before is None or snapshot(folder / "out") == before


def test_what_cannot_be_added_is_named(tmp_path: Path):
    (tmp_path / "f").write_text("x")
    with HFWriter(tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="no tensor was added"):
            writer.finish({})
        writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match="out: a was added twice"):
            writer.add("a", torch.zeros(1))
        with pytest.raises(ValueError, match=r"out: c is torch\.complex128, expected .*torch\.bfloat16"):
            writer.add("c", torch.zeros(1, dtype=torch.complex128))
        for name in ["../f", "/f", "a/../../f", "", "config.json", "model.safetensors.index.json", "x.safetensors"]:
            with pytest.raises(ValueError, match=f"cannot carry {tmp_path / 'f'} as"):
                writer.add_file(tmp_path / "f", name)
        writer.add_file(tmp_path / "f", "sub/config.json")
        with pytest.raises(ValueError, match=r"sub/config\.json was added twice"):
            writer.add_file(tmp_path / "f", "sub/config.json")
        writer.finish({})
        for late in [
            lambda: writer.add("b", torch.zeros(1)),
            lambda: writer.add_file(tmp_path / "f", "f"),
            lambda: writer.finish({}),
        ]:
            with pytest.raises(ValueError, match="out: this writer has finished"):
                late()
    with HFCheckpoint(tmp_path / "out") as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
        assert checkpoint.carried_files() == [Path("sub/config.json")]


def test_a_duplicate_is_found_after_its_shard_was_written(tmp_path: Path):
    with HFWriter(tmp_path / "out", max_shard_bytes=4) as writer:
        writer.add("a", torch.zeros(1))
        writer.add("b", torch.zeros(1))
        with pytest.raises(ValueError, match="a was added twice"):
            writer.add("a", torch.zeros(1))


def test_two_writers_of_one_target_the_first_stays(tmp_path: Path):
    out = tmp_path / "out"
    with HFWriter(out) as slow:
        slow.add("w", torch.tensor([2.0]))
        write_small(out, 1.0)
        with pytest.raises(ValueError, match=f"^{out}: was empty when writing began"):
            slow.finish({})
    with HFCheckpoint(out) as checkpoint:
        assert checkpoint.read("w") == 1.0
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_checkpoint_is_put_back_when_the_new_one_cannot_move_in(tmp_path: Path):
    out = tmp_path / "out"
    write_small(out, 1.0)
    before = snapshot(out)
    writer = HFWriter(out, overwrite=True)
    (partial,) = tmp_path.glob(".out.partial-*")
    partial.rmdir()  # so the rename fails for real
    with pytest.raises(FileNotFoundError):
        writer._put_in_place()
    assert snapshot(out) == before
    assert os.listdir(tmp_path) == ["out"]


# Killed runs. A helper process imports torch once and forks a writer for each line it reads; the writer is killed with
# SIGKILL before its n-th change to the disk (sys.addaudithook reports each before it happens), or after some seconds.

HELPER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from bridge.hf_writer import HFWriter

CHANGES = {"os.mkdir", "os.rename", "os.chmod", "os.remove", "os.rmdir"}

def write(out, value, kill_before, changes):
    def hook(event, args):
        if event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            changes.append([event, *(os.path.basename(str(arg)) for arg in args[:2])])
            if len(changes) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    with HFWriter(out, overwrite=True, max_shard_bytes=16) as writer:
        writer.add_file(Path(out).parent / "carried", "sub/carried")
        for i in range(4):
            writer.add(f"t{i}", torch.full((3,), value + i))
        writer.finish({"value": value})

for line in sys.stdin:
    job = json.loads(line)
    begin = time.monotonic()
    child = os.fork()
    if not child:
        changes = []
        write(job["out"], job["value"], job.get("kill_before"), changes)
        Path(job["out"]).with_name("changes").write_text(json.dumps(changes))
        os._exit(0)
    if "kill_after" in job:
        time.sleep(job["kill_after"])
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begin}), flush=True)
"""
OLD, NEW = 1.0, 100.0


@pytest.fixture(scope="module")
def helper() -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", HELPER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def run(helper: subprocess.Popen, out: Path, value: float = NEW, **job: Any) -> dict[str, Any]:
    (out.parent / "carried").write_text("carried")
    helper.stdin.write(json.dumps({"out": str(out), "value": value, **job}) + "\n")
    helper.stdin.flush()
    return json.loads(helper.stdout.readline())


@pytest.fixture(scope="module")
def old_checkpoint(helper: subprocess.Popen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old") / "out"
    assert run(helper, out, OLD)["code"] == 0
    return out


def value_of(folder: Path) -> float:
    """The value this folder was written with; fails unless every part of the checkpoint is there and of that value."""
    with HFCheckpoint(folder) as checkpoint:
        value = checkpoint.config["value"]
        assert len(checkpoint.tensors) == 4
        for i in range(4):
            assert torch.equal(checkpoint.read(f"t{i}"), torch.full((3,), value + i))
    assert (folder / "sub/carried").read_text() == "carried"
    assert len(os.listdir(folder)) == 4 + 3, "four shards, config.json, the index and sub"
    return value


def state_after_kill(out: Path, old: bool) -> str:
    """Where things stand: nothing complete is lost, nothing that looks complete is not."""
    for partial in out.parent.glob(".out.partial-*"):
        if (partial / "config.json").exists():
            assert len(list(partial.glob("model-*-of-00004.safetensors"))) == 4
        if (partial / "model.safetensors.index.json").exists():
            assert value_of(partial) == NEW
    if out.exists():
        return {NEW: "new", OLD: "old"}[value_of(out)]
    if not old:
        return "absent"
    (aside,) = out.parent.glob(".out.old-*")
    (partial,) = out.parent.glob(".out.partial-*")
    assert (value_of(aside), value_of(partial)) == (OLD, NEW)
    return "between the renames"


@pytest.mark.parametrize("old", [False, True])
def test_killed_before_each_change_to_the_disk(
    helper: subprocess.Popen, old_checkpoint: Path, tmp_path: Path, old: bool
):
    states = []
    for number in count(1):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        if old:
            shutil.copytree(old_checkpoint, out)
        code = run(helper, out, kill_before=number)["code"]
        states.append(state_after_kill(out, old))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    met = ["old", "between the renames", "new"] if old else ["absent", "new"]
    assert list(dict.fromkeys(states)) == met, "each state was met, in this order"
    assert states.count(met[0]) > 15


def test_killed_at_random_moments(helper: subprocess.Popen, old_checkpoint: Path, tmp_path: Path):
    (tmp_path / "whole").mkdir()
    seconds = run(helper, tmp_path / "whole/out")["seconds"]
    moments = random.Random(0)
    killed = 0
    for number in range(60):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        old = number % 2 == 0
        if old:
            shutil.copytree(old_checkpoint, out)
        answer = run(helper, out, kill_after=moments.uniform(0, seconds))
        killed += answer["code"] == -signal.SIGKILL
        state_after_kill(out, old)
        if killed == 12:
            return
    pytest.fail(f"only {killed} of 60 runs were killed before they were done")


def test_a_later_run_succeeds_and_leaves_the_dead_ones_folder(helper: subprocess.Popen, tmp_path: Path):
    out = tmp_path / "out"
    assert run(helper, out, kill_before=10)["code"] == -signal.SIGKILL
    (stale,) = tmp_path.glob(".out.partial-*")
    before = snapshot(stale)
    assert run(helper, out)["code"] == 0
    assert value_of(out) == NEW
    assert snapshot(stale) == before
    assert list(tmp_path.glob(".out.*")) == [stale]


def test_the_index_is_the_last_change_before_the_folder_moves(helper: subprocess.Popen, tmp_path: Path):
    assert run(helper, tmp_path / "out")["code"] == 0
    changes = json.loads((tmp_path / "changes").read_text())
    shards = [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
    renamed = [args[1] for event, *args in changes if event == "os.rename"]
    assert renamed == [*shards, "config.json", "model.safetensors.index.json", "out"]
    assert [event for event, *_ in changes[-3:]] == ["open", "os.rename", "os.rename"]
