"""An import or export whose disk is full, whose rights are missing or whose files change: an error that names
what it met, nothing half made, and the same call finishes it once that is mended.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.checkpoints import edit_config
from support.conversions import DIRECTIONS, Conversion, Job, run
from support.faults import Fault, after_units, die_before_publishing, nobody, small_files
from support.flips import flip_and_read
from support.folders import checksums, finished_files, siblings
from support.forks import call

from bridge.convert.hf_to_torch_dist import ImportJob
from bridge.huggingface.quantization import FP8_SECTION

SMALLER_BLOCKS = {**FP8_SECTION, "weight_block_size": [64, 64]}


def given_folder(job: Job) -> str:
    """What is converted."""
    return job.source if isinstance(job, ImportJob) else job.megatron


def given(job: Job, folder: Path) -> Job:
    """The same conversion of another folder."""
    if isinstance(job, ImportJob):
        return job._replace(source=str(folder))
    return job._replace(megatron=str(folder))


def assert_stops(job: Job, kind: str, *words: str, fault: Fault = dict) -> None:
    """The run ends with an error that says so, and nothing is in place."""
    outcome = run(job, fault=fault)
    assert outcome.exitcode == 0
    found, message, _ = outcome.error
    assert found == kind
    for word in words:
        assert word in message
    assert not Path(job.out).exists()


# ------------------------------------------------------------------------------------------------- the disk, and rights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 kB, where an import or export needs more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip(f"no right to mount a small file system: {mount.stderr.decode()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_disk_full(conversions: dict[str, Conversion], small_disk: Path, direction: str):
    job, _, expected = conversions[direction]
    out = small_disk / "out"
    assert_stops(job(out), "OSError", "No space left on device", str(out))
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert run(job(out)).get().reused > 0
    assert checksums(out) == expected
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_file_larger_than_allowed(conversions: dict[str, Conversion], out: Path, direction: str):
    """Where no small file system can be mounted, this is what shows that a failed write stops the run and is named."""
    job, _, expected = conversions[direction]
    assert_stops(job(out), "OSError", "File too large", str(out), fault=partial(small_files, 60_000))
    run(job(out)).get()
    assert checksums(out) == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_permission_denied(conversions: dict[str, Conversion], direction: str):
    """pytest's folders are for one user alone, so another one needs copies elsewhere."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    job = conversions[direction].job
    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        source, locked = Path(public, "source"), Path(public, "locked")
        shutil.copytree(given_folder(job(locked)), source)
        locked.mkdir()
        given = {"megatron": str(source), "source": None, "scales": "fresh"}
        again = job(locked / "out")._replace(**given if direction == "export" else {"source": str(source)})
        kind, message, _ = run(again, fault=nobody).error
        assert kind == "PermissionError"
        assert str(locked) in message
        assert siblings(locked / "out") == []
        secret = next(source.rglob("*.safetensors" if direction == "import" else "*.distcp"))
        secret.chmod(0o600)
        locked.chmod(0o777)
        kind, message, _ = run(again, fault=nobody).error
        assert kind in ("PermissionError", "ValueError")
        assert str(secret) in message


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_read_only_disk(conversions: dict[str, Conversion], small_disk: Path, direction: str):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_stops(conversions[direction].job(small_disk / "out"), "OSError", "Read-only file system", str(small_disk))


# ---------------------------------------------------------------------------------------------------- files that change


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_source_file_is_replaced_midway(
    conversions: dict[str, Conversion], tmp_path: Path, out: Path, direction: str
):
    """By another file of the same size, as a download that starts again does; once it is back, the run finishes."""
    job, _, expected = conversions[direction]
    copy = Path(shutil.copytree(given_folder(job(out)), tmp_path / "copy"))
    changed = given(job(out), copy)
    victim = max(path for path in copy.rglob("*") if path.suffix in (".safetensors", ".distcp"))
    assert_stops(changed, "ValueError", str(victim), fault=partial(after_units, 2, partial(replace, victim)))
    assert_stops(changed, "ValueError", victim.name)
    shutil.copy2(Path(given_folder(job(out)), victim.relative_to(copy)), victim)
    run(changed).get()
    assert checksums(out) == expected


def replace(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[::-1])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_config_changes_between_two_runs(conversions: dict[str, Conversion], tmp_path: Path, out: Path, direction: str):
    """What an earlier run made from another config.json is not taken over."""
    job = conversions[direction].job
    copy = Path(shutil.copytree(given_folder(job(out)), tmp_path / "copy"))
    if direction == "import":
        changed, folder = given(job(out), copy), copy
    else:
        changed, folder = given(job(out), copy)._replace(source=None, scales="fresh"), copy / "hugging_face"
    assert run(changed, fault=die_before_publishing).exitcode == 1
    assert len(finished_files(out)) >= 14
    edit_config(folder, lambda config: config.update(rope_theta=10_000, quantization_config=SMALLER_BLOCKS))
    if direction == "import":
        edit_config(folder, lambda config: config.update(quantization_config=FP8_SECTION))
    run(changed).get()
    whole = changed._replace(out=str(out.with_name("whole")))
    run(whole).get()
    assert checksums(out) == checksums(Path(whole.out))


# ------------------------------------------------------------------------------------------------- a byte that is wrong


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_flipped_bit_is_noticed(conversions: dict[str, Conversion], tmp_path: Path, direction: str):
    """In every written file: reading fails, or something differs. Bits without effect are printed, none a tensor's."""
    copy = Path(shutil.copytree(conversions[direction].undisturbed, tmp_path / "copy"))
    flips = call(flip_and_read, direction, copy).get()
    print(flips)
    assert flips.refused
    assert flips.differing
    assert not [at for at in flips.unnoticed if at.in_a_tensor]
