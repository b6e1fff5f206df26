"""Text from files neither steers the terminal nor fails to be printed: through the command, wherever it is said."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import all_tensors, edit_config, edit_tensors
from typer.testing import CliRunner

from bridge.cli import app
from bridge.huggingface.safetensors_folder import INDEX_NAME

# What a name may hold: colours, a title, a bell, a cleared screen, C1 controls, a turned direction, a line of its own.
HOSTILE = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;title\x07",
    "clear": "\x1b[2J\x1b[H",
    "link": "\x1b]8;;http://example.com\x1b\\x",
    "bell": "a\x07b",
    "backspace": "right\b\b\b\b\bwrong",
    "carriage return": "bad\rgood",
    "newline": "one\nerror: two",
    "tab and feed": "a\tb\x0bc\x0cd",
    "delete": "a\x7fb",
    "C1": "a\x9b31mb\x85c\x90d",
    "direction": "a\u202eb\u2066c\u200fd",
    "invisible": "a\u200bb\ufeffc\u2060d",
    "separators": "a\u2028b\u2029c",
    "surrogate": "a\ud800b\udcffc",
    "private": "a\ue000b\U000f0000c",
    "tag": "a\U000e0041b",
    "markup": "[red]a[/red][link=x]b[/link] :smile: [/]",
}  # fmt: skip
# Those that UTF-8 can say: names in headers and of files.
ENCODED = {name: text for name, text in HOSTILE.items() if name != "surrogate"}


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "1000"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


def assert_harmless(text: str) -> None:
    assert text.strip()
    assert all(one.isprintable() or one == "\n" for one in text), ascii(text)
    assert "\nerror: two" not in text


def escaped(text: str) -> str:
    """As it is said, but for newlines, which may end a line of an error."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


# Where a text comes from: what is done to a checkpoint, the command, and whether the text is quoted.
def tensor_name(folder: Path, text: str) -> list[object]:
    edit_tensors(folder, lambda tensors: tensors.update({f"model.{text}": torch.ones(1)}))
    return ["inspect", folder]


def name_of_an_error(folder: Path, text: str) -> list[object]:
    edit_tensors(folder, lambda tensors: tensors.update({f"model.{text}": torch.ones(1)}))
    return ["import", folder, folder.with_name("out"), "--dry-run"]


def file_name(folder: Path, text: str) -> list[object]:
    (folder / text.replace("/", "_")).symlink_to("/etc/passwd")
    return ["inspect", folder]


def folder_name(folder: Path, text: str) -> list[object]:
    target = folder.rename(folder.with_name(text.replace("/", "_")))
    return ["inspect", target]


def index_file(folder: Path, text: str) -> list[object]:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["lm_head.weight"] = text
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return ["inspect", folder]


def config_value(key: str) -> Callable[[Path, str], list[object]]:
    def change(folder: Path, text: str) -> list[object]:
        edit_config(folder, lambda config: config.update({key: text}))
        return ["inspect", folder]

    return change


def unquantised_module(folder: Path, text: str) -> list[object]:
    edit_config(folder, lambda config: config["quantization_config"]["modules_to_not_convert"].append(text))
    return ["inspect", folder]


def difference(folder: Path, text: str) -> list[object]:
    other = folder.with_name("other")
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / f"LICENSE {text}".replace("/", "_")).write_text("more")
    return ["verify", folder, other]


def tracker(folder: Path, text: str) -> list[object]:
    (folder / "megatron").mkdir()
    (folder / "megatron/latest_checkpointed_iteration.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    return ["export", folder / "megatron", folder / "out", "--dry-run"]


SOURCES: dict[str, Callable[[Path, str], list[object]]] = {
    "tensor name": tensor_name,
    "tensor name in an error": name_of_an_error,
    "file name": file_name,
    "folder name": folder_name,
    "difference": difference,
}
ANY_TEXT: dict[str, Callable[[Path, str], list[object]]] = {
    "file in the index": index_file,
    "module that is not quantised": unquantised_module,
    "tracker": tracker,
    **{f"config's {key}": config_value(key) for key in ("model_type", "hidden_act", "scoring_func", "qk_norm_type")},
    "architectures": config_value("architectures"),
}
CASES = [(source, text) for source in SOURCES for text in ENCODED]
CASES += [(source, text) for source in ANY_TEXT for text in HOSTILE]


def _words(text: str) -> str:
    """Without what a table's width decides: where lines end, and what is drawn there."""
    drawn = str.maketrans(dict.fromkeys("│┃┌┐└┘├┤─━┏┓┗┛┡┩╇", ""))
    return "".join(text.replace("/", "_").translate(drawn).split())


@pytest.mark.parametrize(("source", "text"), CASES)
def test_what_the_command_prints(copy: Path, source: str, text: str) -> None:
    words = (SOURCES | ANY_TEXT)[source](copy, HOSTILE[text])
    status, said = run(*words)
    assert status in (0, 1, 2)
    assert_harmless(said)
    in_an_error = source == "file name" and text == "newline"  # whose lines are said one by one
    quoted = ("tensor name", "file name", "folder name", "difference", "module that is not quantised")
    if source in quoted and not in_an_error:
        assert _words(escaped(HOSTILE[text])) in _words(said)


@pytest.mark.parametrize("text", [text for text in HOSTILE if text != "surrogate"])  # which no tensor's name can have
def test_json_is_whole_and_harmless(copy: Path, text: str) -> None:
    words = tensor_name(copy, HOSTILE[text])
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 1, result.output
    assert_harmless(result.stdout)
    assert HOSTILE[text] in "".join(json.loads(result.stdout)["problems"])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_whatever_the_terminals_encoding_is(copy: Path, encoding: str) -> None:
    name = "model.größe-\N{SNOWMAN}-\x1b[31m"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.ones(1)}))
    command = [str(Path(sys.executable).with_name("minimax-m2")), "inspect", str(copy)]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run(command, capture_output=True, check=False, env=environment)
    said = result.stdout.decode(encoding)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr.decode(encoding)
    assert_harmless(said)
    assert name.encode(encoding, "backslashreplace").decode(encoding).replace("\x1b", "\\x1b") in said


@pytest.mark.parametrize("text", HOSTILE)
def test_pictures_are_xml(copy: Path, text: str, tmp_path: Path) -> None:
    """Whatever the config says besides its sizes, and whatever the folder is called."""
    edit_config(copy, lambda config: config.update(architectures=[HOSTILE[text]], _name_or_path=HOSTILE[text]))
    picture = tmp_path / "plan.svg"
    status, said = run("plan", copy, "--gpus", 1, "--picture", picture)
    assert status == 0, said
    ElementTree.parse(picture)
    assert_harmless(picture.read_text(encoding="utf-8"))


def test_a_shard_with_a_hostile_header(copy: Path) -> None:
    tensors = all_tensors(copy)
    for file in copy.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, copy / "model.safetensors", metadata={"a\x1b[31m": "\x1b[2J"})
    (copy / INDEX_NAME).unlink()
    status, said = run("inspect", copy)
    assert status == 0
    assert_harmless(said)
