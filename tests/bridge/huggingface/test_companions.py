"""Files that belong to a checkpoint, and what only looks like one: links that lead elsewhere, FIFOs, devices.

By the function, by opening the folder, and by the command; none may wait for a FIFO's other end, and no byte from
outside the checkpoint may be copied.
"""

import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.conversions import export, imported_from
from support.folders import contents
from typer.testing import CliRunner

from bridge import MiniMaxM2Bridge
from bridge.cli import app
from bridge.huggingface.companions import companions
from bridge.huggingface.regular_files import file_inside, regular_file
from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, SafetensorsFolder
from bridge.jobs.durable import copy_file
from bridge.memory_plan.plan import read_config

SECRET = "secret of the machine"
TOKENIZER = "tokenizer.json"


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """Opening a FIFO would wait for ever."""

    def late(*_: object) -> None:
        raise TimeoutError("waited a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text(SECRET)
    return tmp_path / "outside"


def bind(path: Path) -> None:
    """A socket; its name may have about a hundred characters."""
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def hidden(path: Path) -> Path:
    """A name that is not carried itself."""
    (path.parent / ".hidden").mkdir()
    return path.parent / ".hidden/x"


# What is put in a file's place, and what the message says of it.
IMPOSTORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (lambda p: p.symlink_to(p.parents[1] / "outside/secret"), "leads to .*outside/secret, outside"),
    "relative link out": (lambda p: p.symlink_to("../outside/secret"), "leads to .*outside/secret, outside"),
    "link to a link out": (
        lambda p: (hidden(p).symlink_to("../../outside/secret"), p.symlink_to(".hidden/x")),
        "leads to .*outside/secret, outside",
    ),
    "link to the machine's": (lambda p: p.symlink_to("/etc/passwd"), "leads to /etc/passwd, outside"),
    "link to a device": (lambda p: p.symlink_to("/dev/zero"), "leads to /dev/zero, outside"),
    "link to standard input": (lambda p: p.symlink_to("/dev/stdin"), "outside|cannot be looked at|is a"),
    "link to nothing": (lambda p: p.symlink_to("nothing"), "is a link to nothing, which is not there"),
    "link to nothing outside": (lambda p: p.symlink_to("/nothing/there"), "leads to /nothing/there, outside"),
    "link to itself": (lambda p: p.symlink_to(p.name), "cannot be looked at"),
    "FIFO": (os.mkfifo, "is a FIFO, expected a regular file"),
    "link to a FIFO": (lambda p: (os.mkfifo(hidden(p)), p.symlink_to(".hidden/x")), "is a FIFO"),
    "socket": (bind, "is a socket, expected a regular file"),
}  # fmt: skip


def put(folder: Path, name: str, impostor: str) -> Path:
    path = folder / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    IMPOSTORS[impostor][0](path)
    return path


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "1000"})
    return result.exit_code, result.stdout + result.stderr


# -------------------------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("name", [TOKENIZER, "chat_templates/a.jinja", "LICENSE"])
@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_what_is_not_carried(copy: Path, outside: Path, impostor: str, name: str) -> None:
    put(copy, name, impostor)
    with pytest.raises(ValueError, match=rf"{name}: .*({IMPOSTORS[impostor][1]})"):
        companions(copy)


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME, "the first shard"])
@pytest.mark.parametrize("impostor", ["FIFO", "link to a FIFO", "socket", "link to nothing", "link to itself"])
def test_files_that_are_read(copy: Path, outside: Path, impostor: str, name: str) -> None:
    name = min(path.name for path in copy.glob("*.safetensors")) if name.startswith("the") else name
    put(copy, name, impostor)
    with pytest.raises(ValueError, match=rf"{name}: .*({IMPOSTORS[impostor][1]})"):
        SafetensorsFolder(copy)
    status, said = run("inspect", copy)
    assert status == 2
    assert name in said


@pytest.mark.parametrize("impostor", ["FIFO", "link to nothing", "socket"])
def test_a_single_file(copy: Path, impostor: str) -> None:
    (copy / INDEX_NAME).unlink()
    put(copy, SINGLE_NAME, impostor)
    with pytest.raises(ValueError, match=rf"{SINGLE_NAME}: {IMPOSTORS[impostor][1]}"):
        SafetensorsFolder(copy)


@pytest.mark.parametrize("impostor", [name for name in IMPOSTORS if "outside" in IMPOSTORS[name][1]])
def test_config_json_is_carried_too(copy: Path, outside: Path, impostor: str) -> None:
    shutil.copy(copy / CONFIG_NAME, outside / "secret")
    put(copy, CONFIG_NAME, impostor)
    with pytest.raises(ValueError, match=rf"{CONFIG_NAME}: .*({IMPOSTORS[impostor][1]})"):
        SafetensorsFolder(copy)


@pytest.mark.parametrize("impostor", ["FIFO", "link to a FIFO", "socket", "link to nothing"])
def test_a_plan_waits_for_nothing(copy: Path, impostor: str) -> None:
    path = put(copy, CONFIG_NAME, impostor)
    for where in (copy, path):
        with pytest.raises(ValueError, match=IMPOSTORS[impostor][1]):
            read_config(where)
    assert run("plan", copy, "--gpus", 8)[0] == 2


def test_weights_may_lie_elsewhere(copy: Path, outside: Path) -> None:
    """Their bytes are read as tensors and never copied as they are; a checkpoint of 230 GB is often linked."""
    shard = min(copy.glob("*.safetensors"))
    shard.rename(outside / shard.name)
    shard.symlink_to(outside / shard.name)
    with MiniMaxM2Bridge.from_hf_pretrained(copy):
        pass


def test_files_that_may_not_be_read(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The superuser may read all, so the system's answer is made up."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *mode: Path(path).name != TOKENIZER and access(path, *mode))
    (copy / TOKENIZER).write_text("{}")
    (copy / TOKENIZER).chmod(0)
    with pytest.raises(ValueError, match=rf"{TOKENIZER}: is not readable by this user \(mode ----------\)"):
        companions(copy)


def test_a_folder_that_cannot_be_listed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "docs").mkdir()
    scandir = os.scandir

    def deny(path: object = ".") -> object:
        if str(path).endswith("docs"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(PermissionError, match="docs"):
        companions(copy)


def test_links_to_folders(copy: Path, outside: Path) -> None:
    (copy / "docs").symlink_to(outside)
    with pytest.raises(ValueError, match=r"docs: leads to .*outside, outside"):
        companions(copy)
    (copy / "docs").unlink()
    (copy / "real").mkdir()
    (copy / "docs").symlink_to("real")
    with pytest.raises(ValueError, match="docs: is a folder, expected a regular file"):
        companions(copy)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "a\ud800b"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for look in (lambda: regular_file(tmp_path / name), lambda: file_inside(tmp_path, name)):
        with pytest.raises(ValueError, match="cannot be looked at"):
            look()


# --------------------------------------------------------------------------------------------------------- hub caches


@pytest.fixture
def snapshot(copy: Path, tmp_path: Path) -> Path:
    """The checkpoint as huggingface_hub keeps it: links to blobs, companions in a folder of their own too."""
    repository = tmp_path / "hub/models--owner--name"
    snapshot = repository / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (copy / "docs").mkdir()
    (copy / "docs/card.md").write_text("card")
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(copy)
        link.parent.mkdir(exist_ok=True)
        path.rename(repository / f"blobs/{number:040x}")
        up = "../" * (len(link.relative_to(snapshot).parts) + 1)
        link.symlink_to(f"{up}blobs/{number:040x}")
    return snapshot


def test_a_snapshot_is_read_and_carried(snapshot: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert Path("docs/card.md") in companions(snapshot).carried
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        imported_from(source, tmp_path / f"megatron {source.name}")
        found = contents(tmp_path / f"megatron {source.name}/hugging_face")
        assert found.pop("docs/card.md") == b"card"
        assert found == {name: data for name, data in contents(checkpoint).items() if "safetensors" not in name}


FOREIGN: dict[str, Callable[[Path], Path]] = {
    "another repository": lambda repository: repository.with_name("models--owner--other") / "blobs" / ("1" * 40),
    "beside the blobs": lambda repository: repository / "refs/main",
    "a folder that begins with blobs": lambda repository: repository / "blobs-of-mine/x",
    "above the cache": lambda repository: repository.parents[1] / "x",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_only_the_snapshots_own_blobs(snapshot: Path, case: str) -> None:
    target = FOREIGN[case](snapshot.parents[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(SECRET)
    (snapshot / TOKENIZER).symlink_to(target)
    with pytest.raises(ValueError, match=rf"{TOKENIZER}: leads to .*, outside the checkpoint"):
        companions(snapshot)


def test_blobs_that_are_a_link_themselves(snapshot: Path, outside: Path) -> None:
    """A folder may call itself a hub cache."""
    (snapshot.parents[1] / "blobs").rename(snapshot.parents[1] / "moved")
    (snapshot.parents[1] / "blobs").symlink_to(outside)
    (snapshot / TOKENIZER).symlink_to("../../blobs/secret")
    with pytest.raises(ValueError, match=r"leads to .*, outside the checkpoint"):
        companions(snapshot)


# ---------------------------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "impostor", ["link out", "link to the machine's", "link to nothing", "FIFO", "link to a device"]
)
def test_no_command_takes_them_along(
    copy: Path, checkpoint: Path, imported: Path, outside: Path, tmp_path: Path, impostor: str
) -> None:
    put(copy, TOKENIZER, impostor)
    out = tmp_path / "out"
    for words in (
        ["inspect", copy],
        ["import", copy, out],
        ["import", copy, out, "--dry-run"],
        ["export", imported, out, "--source", copy],
        ["export", imported, out, "--source", copy, "--dry-run"],
        ["verify", copy, checkpoint],
        ["verify", checkpoint, copy],
    ):
        status, said = run(*words)
        assert status == 2, (words, said)
        assert f"{copy}/{TOKENIZER}: " in said
        assert not out.exists()


@pytest.mark.parametrize("impostor", ["link out", "link to nothing", "FIFO"])
def test_nor_those_beside_a_distributed_checkpoint(
    imported: Path, tmp_path: Path, outside: Path, impostor: str
) -> None:
    megatron = Path(shutil.copytree(imported, tmp_path / "megatron"))
    for name in (TOKENIZER, CONFIG_NAME):
        beside = megatron / "hugging_face"
        shutil.copy(beside / CONFIG_NAME, tmp_path / "kept")
        if impostor == "link out":
            shutil.copy(beside / CONFIG_NAME, megatron.parent / "outside.json")
            (beside / name).unlink(missing_ok=True)
            (beside / name).symlink_to(megatron.parent / "outside.json")
        else:
            put(beside, name, impostor)
        with pytest.raises(ValueError, match=rf"{name}: "):
            export(megatron, tmp_path / "out", scales="fresh")
        (beside / name).unlink()
        shutil.copy(tmp_path / "kept", beside / CONFIG_NAME)
    shutil.move(beside, outside / "hugging_face")
    beside.symlink_to(outside / "hugging_face")
    with pytest.raises(ValueError, match=r"leads to .*outside"):
        export(megatron, tmp_path / "out", scales="fresh")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("mode", [0o400, 0o440, 0o600, 0o640, 0o644, 0o664, 0o755, 0o4755, 0o2644, 0o1600])
def test_a_copy_has_no_more_permissions(tmp_path: Path, mode: int, umask: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("x")
    source.chmod(mode)
    before = os.umask(umask)
    try:
        for _ in range(2):  # again over what an interrupted run left
            copy_file(source, target)
            assert stat.S_IMODE(target.stat().st_mode) == mode & 0o777 & ~umask
            assert target.read_text() == "x"
    finally:
        os.umask(before)


def test_import_and_export_keep_modes(copy: Path, tmp_path: Path) -> None:
    modes = {CONFIG_NAME: 0o600, TOKENIZER: 0o640, "generation_config.json": 0o444, "run.sh": 0o750}
    for name, mode in modes.items():
        if name not in contents(copy):
            (copy / name).write_text("{}")
        (copy / name).chmod(mode)
    before = os.umask(0o022)
    try:
        imported_from(copy, tmp_path / "megatron")
        export(tmp_path / "megatron", tmp_path / "beside", scales="fresh")
        export(tmp_path / "megatron", tmp_path / "source", source=str(copy))
    finally:
        os.umask(before)
    for folder in (tmp_path / "megatron/hugging_face", tmp_path / "beside", tmp_path / "source"):
        assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in modes} == modes


def test_a_file_that_became_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "source")
    with pytest.raises(ValueError, match="source: is not a regular file any more"):
        copy_file(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()
