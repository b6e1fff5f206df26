"""Files that belong to a checkpoint, and what only looks like one: links that lead elsewhere, FIFOs, devices.

By the function, by opening the folder, and by the command; none may wait for a FIFO's other end, and no byte from
outside the checkpoint may be copied.
"""

import json
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import edit_config
from support.conversions import export, imported_from
from support.folders import bind, contents
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


def outside_of(path: Path) -> Path:
    """The folder that the copy of the checkpoint is in, for a file anywhere in it."""
    return next(parent for parent in path.parents if parent.name == "copy").parent


def hidden(path: Path) -> Path:
    """A name that is not carried itself."""
    (path.parent / ".hidden").mkdir()
    return path.parent / ".hidden/x"


# What is put in a file's place, and what the message says of it.
IMPOSTORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (lambda p: p.symlink_to(outside_of(p) / "outside/secret"), "leads to .*outside/secret, outside"),
    "relative link out": (
        lambda p: p.symlink_to(os.path.relpath(outside_of(p), p.parent) + "/outside/secret"),
        "leads to .*outside/secret, outside",
    ),
    "link to a link out": (
        lambda p: (hidden(p).symlink_to(outside_of(p) / "outside/secret"), p.symlink_to(".hidden/x")),
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
    (copy / "chat_templates").mkdir()
    scandir = os.scandir

    def deny(path: object = ".") -> object:
        if str(path).rstrip("/").endswith("chat_templates"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(PermissionError, match="chat_templates"):
        companions(copy)


def test_links_to_folders(copy: Path, outside: Path) -> None:
    (copy / "chat_templates").symlink_to(outside)
    with pytest.raises(ValueError, match=r"chat_templates: leads to .*outside, outside"):
        companions(copy)
    (copy / "chat_templates").unlink()
    (copy / "real").mkdir()
    (copy / "chat_templates").symlink_to("real")
    with pytest.raises(ValueError, match="chat_templates: is a folder, expected a regular file"):
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
    (copy / "chat_templates").mkdir()
    (copy / "chat_templates/a.jinja").write_text("card")
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        link = snapshot / path.relative_to(copy)
        link.parent.mkdir(exist_ok=True)
        path.rename(repository / f"blobs/{number:040x}")
        up = "../" * (len(link.relative_to(snapshot).parts) + 1)
        link.symlink_to(f"{up}blobs/{number:040x}")
    return snapshot


def test_a_snapshot_is_read_and_carried(snapshot: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert Path("chat_templates/a.jinja") in companions(snapshot).carried
    (tmp_path / "link").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "link"):
        imported_from(source, tmp_path / f"megatron {source.name}")
        found = contents(tmp_path / f"megatron {source.name}/hugging_face")
        assert found.pop("chat_templates/a.jinja") == b"card"
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
    modes = {CONFIG_NAME: 0o600, TOKENIZER: 0o640, "generation_config.json": 0o444, "LICENSE": 0o750}
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


# -------------------------------------------------------------------------------------------------------------- kinds

BELONG = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "sentencepiece.bpe.model",
    "spiece.model", "minimax.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "tool_use.jinja", "chat_template.json",
    "additional_chat_templates/tools.jinja", "chat_templates/default.jinja", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "LICENSE", "LICENSE.txt",
    "License-MODEL", "LICENCE.md", "NOTICE", "MODEL_LICENSE", "README.md", "readme", "README_zh.md", "MODEL_CARD.md",
    "configuration.json",
)  # fmt: skip
STAY = (
    "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "model.Q4_K_M.gguf", "tf_model.h5", "flax_model.msgpack", "consolidated.00.pth",
    "train.log", "thesis.tex", "events.out.tfevents.1.host", "notes.txt", "modeling_other.py", "tokenizer.json.lock",
    "tokenizer.json.bak", "figure.png", "hf_quant_config.json", "id_rsa", "weights.npz", "secrets.json",
    "chat_templates/notes.txt", "chat_templates/.env.jinja",
)  # fmt: skip
STAY_FOLDERS = ("global_step10", "checkpoint-500", "checkpoints-1", "runs", "logs", "docs", "figures", "wandb", "src")
HIDDEN = (".env", ".gitattributes", ".netrc", ".tokenizer.json", ".LICENSE")
HIDDEN_FOLDERS = (".git", ".cache", ".venv")


def fill(folder: Path) -> None:
    """With everything that people have beside a checkpoint."""
    for name in (*BELONG, *STAY, *HIDDEN, *(f"{one}/README.md" for one in (*STAY_FOLDERS, *HIDDEN_FOLDERS))):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}" if path.suffix == ".json" else name)


def test_kinds(copy: Path) -> None:
    fill(copy)
    (copy / "other.safetensors").write_bytes((min(copy.glob("*.safetensors"))).read_bytes())
    found = companions(copy)
    assert set(map(str, found.carried)) == set(BELONG)
    assert found.carried == sorted(found.carried)
    shown = sorted([*STAY, *(f"{name}/" for name in STAY_FOLDERS)])
    hidden = sorted([*HIDDEN, *(f"{name}/" for name in HIDDEN_FOLDERS)])
    nested = [name for name in shown if "/." in name]
    assert sorted(found.left_behind) == sorted(shown + hidden)
    assert found.left_behind[-len(hidden) :] == hidden, "the last to be named"
    assert nested == ["chat_templates/.env.jinja"]


@pytest.mark.parametrize("name", ["weights.bin", ".env", "thesis.tex", "docs"])
@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_what_stays_behind_is_not_touched(copy: Path, outside: Path, impostor: str, name: str) -> None:
    put(copy, name, impostor)
    assert name in companions(copy).left_behind


CODE = {
    "configuration_minimax_m2.py": "class MiniMaxM2Config: ...\n",
    "modeling_minimax_m2.py": "from .configuration_minimax_m2 import MiniMaxM2Config\nfrom . import kernels, absent\n",
    "kernels.py": "def f():\n    from .deep.norm import (\n        rms,\n    )\n    from ..above import x\n",
    "deep/norm.py": "from .helpers import *\nfrom . import __version__\nimport os\n",
    "deep/helpers.py": "rms = 1",
    "deep/__init__.py": "__version__ = 1",
    "tokenization_minimax_m2.py": "print 'Python 2'\nfrom .unseen import x\n",
}


def test_code_of_auto_map(copy: Path) -> None:
    auto_map = {
        "AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
        "AutoModel": "owner/repo--elsewhere.Model",
        "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM",
        "Evil": ["../outside.X", "/etc/passwd.X", "..outside.X", 7, None],
    }
    edit_config(copy, lambda config: config.update(auto_map=auto_map))
    tokenizer = {"auto_map": {"AutoTokenizer": [None, "tokenization_minimax_m2.Tokenizer"]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for name, text in {**CODE, "unseen.py": "", "deep/unused.py": "", "elsewhere.py": "", "above.py": ""}.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    found = companions(copy)
    assert {str(path) for path in found.carried if path.suffix == ".py"} == set(CODE)
    assert {"above.py", "deep/unused.py", "elsewhere.py", "unseen.py"} <= set(found.left_behind)


def test_code_that_leads_out_is_refused(copy: Path, outside: Path) -> None:
    edit_config(copy, lambda config: config.update(auto_map={"AutoConfig": "code.Config"}))
    (copy / "code.py").symlink_to(outside / "secret")
    with pytest.raises(ValueError, match=r"code\.py: leads to .*secret, outside the checkpoint"):
        companions(copy)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (TOKENIZER, POINTER, "is a git-lfs pointer"),
        ("tokenizer.model", POINTER, "is a git-lfs pointer"),
        ("merges.txt", "<!DOCTYPE html><html>", "is a web page"),
        (TOKENIZER, "", "is empty"),
        ("generation_config.json", "Entry not found", "is the hub's error message"),
        ("README.md", "<html>a card may begin so", None),
        ("merges.txt", "", None),
    ],
)
def test_what_stands_in_for_a_companion(copy: Path, name: str, text: str, said: str | None) -> None:
    (copy / name).write_text(text)
    if said is None:
        assert Path(name) in companions(copy).carried
    else:
        with pytest.raises(ValueError, match=rf"{name}: {said}"):
            companions(copy)


def test_every_command_takes_the_same_along_and_says_once_what_stays(copy: Path, tmp_path: Path) -> None:
    fill(copy)
    megatron, hf = tmp_path / "megatron", tmp_path / "hf"
    shown = "left behind: chat_templates/.env.jinja, chat_templates/notes.txt, checkpoint-500/, "
    for words, target in (
        (["import", copy, megatron, "--dry-run"], None),
        (["import", copy, megatron], megatron / "hugging_face"),
        (["export", megatron, hf, "--source", copy], hf),
        (["roundtrip", copy, "--out", tmp_path / "around", "--tokens", "8", "--dtype", "bf16"], tmp_path / "around"),
    ):
        status, said = run(*words)
        assert status in ((0, 1) if words[0] == "roundtrip" else (0,)), said
        assert said.count(shown) == 1, said
        assert ".netrc" not in said, "hidden files come last, and most are only counted"
        if target is not None:
            found = {name for name in contents(target) if not name.startswith("model") or "." not in name}
            assert found == {*BELONG, CONFIG_NAME}
    assert run("inspect", copy)[1].count("checkpoint-500/, checkpoints-1/") == 1
    status, said = run("verify", copy, hf)
    assert status == 0, said
    status, said = run("import", copy, tmp_path / "again", "--dry-run", "--json")
    assert ".env" in said.split("left_behind")[1], "all of them"
