"""What the READMEs show is run: every Python block, every command, in order, as one reader would.

A reader starts in a folder that has `checkpoint/`, a small FP8 checkpoint with a tokenizer, `config.json`, the released
model's, and `text.txt`. The
Python blocks of a README share their names. A block that cannot run everywhere says so in a marker above it
(`support.readmes`); a marker is believed only if it is true of each of the block's commands.
"""

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.checks import NO_GPU, ROOT
from support.plans import FULL
from support.readmes import Block, blocks, commands, missing_links, own_arguments, unknown_names, words_of
from typer.testing import CliRunner

from bridge.cli import app
from bridge.huggingface.byte_tokenizer import byte_tokenizer_files
from bridge.huggingface.quantization import FP8_SECTION
from bridge.huggingface.random_checkpoint import CARRIED_FILES, SMALL_CONFIG, make_checkpoint
from bridge.memory_plan.plan import read_config

FOLDERS = (ROOT, *(ROOT / name for name in ("reference", "compiled", "bridge", "tests")))
READMES = [FOLDERS[0] / "README.md", *(file for folder in FOLDERS[1:] for file in sorted(folder.rglob("README.md")))]
TOP, PICTURE = ROOT / "README.md", ROOT / "bridge" / "memory_plan" / "full_model.svg"
MOST_LINES = 130  # of the top README: it is for someone with one minute
GPUS = {"gpu": 1, "2 gpus": 2}
SMALL = SMALL_CONFIG | {"num_hidden_layers": 2}

# What else a block may need. No test runs it; for the marker to be believed, this must be true of each of its commands.
NOT_RUN: dict[str, Callable[[str], bool]] = {
    "network": lambda command: "MiniMaxAI/" in command or command.startswith("pip install "),
    "a fresh clone": lambda command: command.startswith("python3 -m venv .venv && "),
    "the test suite": lambda command: "pytest" in command.split(),  # it would start this very test
    "minutes": lambda command: (
        (own_arguments(command) or [""])[0] == "bench" or "tests/benchmarks/scaling.py" in command.split()
    ),
}


def relative(readme: Path) -> str:
    return str(readme.relative_to(ROOT))


# Hosts of plug-ins, and the import that a Python block has which needs one. The plug-ins' own tests run it.
HOSTS = {"megatron-bridge": "import bridge.plugins.megatron_bridge"}


class Reader:
    """Someone who follows a README from top to bottom, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder, self.namespace = folder, {"__name__": "readme"}

    def follow(self, chosen: Iterable[Block]) -> None:
        for block in chosen:
            if block.file:
                (self.folder / block.file).write_text(block.code)
            elif block.language == "python":
                # Line numbers in a traceback are the README's.
                exec(compile("\n" * (block.line - 1) + block.code, str(block.readme), "exec"), self.namespace)
            elif block.language == "bash":
                for command in commands(block):
                    lacking = [need for need, is_true in NOT_RUN.items() if is_true(command)]
                    assert not lacking, f"{block}: mark it as one that needs {lacking}: {command}"
                    self.enter(command, on_gpu=block.need in GPUS)

    def enter(self, command: str, *, on_gpu: bool = False) -> None:
        """In this process if it is ours, which saves the imports; else in a shell, where only some see a GPU."""
        words = words_of(command)
        if words and words[0] == "minimax-m2":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
            return
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
        shell = ["bash", "-euo", "pipefail", "-c", command]
        result = subprocess.run(shell, cwd=self.folder, env=own, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def runnable(found: list[Block], gpus: int) -> list[Block]:
    """The blocks that run on a host with so many GPUs: those that need nothing, or no more GPUs."""
    return [block for block in found if block.need is None or GPUS.get(block.need, gpus + 1) <= gpus]


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readmes") / "checkpoint"
    carried = CARRIED_FILES | byte_tokenizer_files()
    make_checkpoint(folder, SMALL, mtp_layers=1, max_shard_bytes=4_000_000, carried=carried)
    return folder


@pytest.fixture
def reader(small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    shutil.copy(ROOT / "tests" / "data" / "alice.txt", tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these tensors are small
    yield Reader(tmp_path)
    torch.set_num_threads(threads)


def released_config() -> dict[str, Any]:
    """config.json of the released model, as far as it says what the model is."""
    return {"model_type": "minimax_m2", **asdict(FULL), "quantization_config": FP8_SECTION}


# --- What the READMEs show. ---


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_blocks_run(readme: Path, reader: Reader):
    reader.follow(runnable(blocks(readme), gpus=0))


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("readme", [r for r in READMES if any(b.need in GPUS for b in blocks(r))], ids=relative)
def test_gpu_blocks_run(readme: Path, reader: Reader):
    """With the blocks above them, whose names they use."""
    reader.follow(runnable(blocks(readme), torch.cuda.device_count()))


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_a_marker_is_true(readme: Path):
    for block in blocks(readme):
        check_marker(block, blocks(readme))


def test_ci_runs_the_readme_s_test_command():
    """As it stands there, on a line of its own."""
    block = next(block for block in blocks(ROOT / "README.md") if block.need == "a fresh clone")
    demo, tests = commands(block)
    assert demo.endswith(" && .venv/bin/minimax-m2 demo")
    assert tests.endswith(" && .venv/bin/pytest")
    assert tests in (ROOT / ".ci/run").read_text().splitlines()


def check_marker(block: Block, all_blocks: list[Block]) -> None:
    """A need is one that is known and that each command has; a file is started by a command that runs."""
    assert block.need in {None, *GPUS, *NOT_RUN, *HOSTS}, block
    if block.need in HOSTS:
        assert HOSTS[block.need] in block.code, f"{block}: does not need {block.need}"
    for command in commands(block) if block.need in NOT_RUN else ():
        assert block.language == "bash", f"{block}: Python needs nothing but a GPU"
        assert NOT_RUN[block.need](command), f"{block}: does not need {block.need}: {command}"
    if block.file:
        started = [command for other in all_blocks if other.language == "bash" for command in commands(other)]
        assert any(block.file in command.split() for command in started), f"{block}: nothing starts {block.file}"


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_commands_that_are_not_run_have_no_misspelt_option(readme: Path):
    for block in blocks(readme):
        if block.language == "bash" and block.need:
            for command in commands(block):
                check_options(command)


def check_options(command: str) -> None:
    """Parse what follows `minimax-m2`, as the command would before it does anything."""
    if (arguments := own_arguments(command)) is not None:
        group = typer.main.get_command(app)
        with group.make_context("minimax-m2", list(arguments)) as context:
            name, verb, rest = group.resolve_command(context, list(arguments))
            verb.make_context(name, rest, parent=context)


@pytest.mark.parametrize("readme", READMES, ids=relative)
def test_links_and_names_are_there(readme: Path):
    assert not missing_links(readme)
    assert not unknown_names(readme)


def test_the_top_readme_is_short():
    assert len(TOP.read_text().splitlines()) <= MOST_LINES


def test_the_picture_is_what_its_command_draws(reader: Reader):
    """Of a config.json that says what the released one says: `ModelConfig`'s defaults, which are M2's."""
    assert read_config(reader.folder) == read_config(reader.folder / "config.json")
    shown = [block for block in blocks(TOP) if block.language == "bash"]
    (command,) = [c for block in shown for c in commands(block) if PICTURE.name in c]
    reader.enter(command)
    assert (reader.folder / PICTURE.name).read_bytes() == PICTURE.read_bytes()
    assert f"({PICTURE.relative_to(ROOT)})" in TOP.read_text()


@pytest.mark.parametrize(
    "script", sorted((ROOT / "tests" / "benchmarks").glob("bench_*.py")), ids=lambda file: file.stem
)
def test_a_benchmark_finds_what_it_imports(script: Path, monkeypatch: pytest.MonkeyPatch):
    """Running it takes minutes, so that no test does."""
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert "main" in runpy.run_path(str(script), run_name="imported")


# --- What the checks above find. ---


def written(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text)
    return folder / "README.md"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1\n```\nand\n```python\nassert x == 2\n```\n",
        "```bash\nminimax-m2 inspect nowhere\n```\n",
        "```bash\nminimax-m2 inspect checkpoint --nonsense\n```\n",
        "```bash\ntrue\nfalse | true\n```\n",
        "```bash\npip install torch\n```\n",  # and nothing is installed
        "<!-- file: a.py -->\n```python\nassert False\n```\n```bash\npython a.py\n```\n",
    ],
)
def test_a_block_that_fails_is_found(text: str, reader: Reader):
    found = blocks(written(reader.folder, text))
    with pytest.raises(AssertionError):
        reader.follow(found)


def test_blocks_share_names_and_the_folder(reader: Reader):
    text = (
        "```python\nx = 2\n```\n```bash\nminimax-m2 inspect checkpoint   # the model's\n"
        "echo one \\\n  two > said.txt\n```\n```python\nassert open('said.txt').read() == 'one two\\n' and x == 2\n"
        "done = True\n```\n```text\nx = 3\n```\n"
    )
    reader.follow(blocks(written(reader.folder, text)))
    assert reader.namespace["done"]


def test_an_errors_line_is_the_readmes(reader: Reader):
    found = blocks(written(reader.folder, "# Title\n\n```python\nx = 1\nassert x == 2\n```\n"))
    with pytest.raises(AssertionError) as caught:
        reader.follow(found)
    assert (caught.traceback[-1].path.name, caught.traceback[-1].lineno + 1) == ("README.md", 5)


@pytest.mark.parametrize(("gpus", "run"), [(0, ["a"]), (1, ["a", "b"]), (2, ["a", "b", "c"])])
def test_only_what_is_marked_is_left_out(gpus: int, run: list[str], reader: Reader):
    text = "```python\nran = ['a']\n```\n" + "".join(
        f"<!-- needs: {need}; a reason -->\n```python\nran.append({name!r})\n```\n"
        for need, name in (("gpu", "b"), ("2 gpus", "c"), ("minutes", "d"))
    )
    reader.follow(runnable(blocks(written(reader.folder, text)), gpus))
    assert reader.namespace["ran"] == run


@pytest.mark.parametrize(
    "text",
    [
        "<!-- needs: gpu -->\n\n```python\n```\n",  # the marker is not right above its block
        "<!-- need: gpu -->\n```python\n```\n",
        "  ```python\n  x = 1\n  ```\n",
        "```sh\nls\n```\n",
        "```\nls\n```\n",
        "```python\nx = 1\n",
    ],
)
def test_a_block_that_would_be_passed_over_is_found(text: str, tmp_path: Path):
    with pytest.raises(ValueError, match=r"README\.md:\d"):
        blocks(written(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "<!-- needs: patience -->\n```bash\nminimax-m2 demo\n```\n",
        "<!-- needs: network -->\n```bash\nminimax-m2 inspect checkpoint\n```\n",
        "<!-- needs: a fresh clone -->\n```bash\nminimax-m2 demo\n```\n",
        "<!-- needs: the test suite -->\n```bash\nminimax-m2 demo\n```\n",
        "<!-- needs: minutes -->\n```bash\nminimax-m2 demo\n```\n",
        "<!-- needs: minutes; it is slow -->\n```python\nx = 1\n```\n",
        "<!-- needs: megatron-bridge -->\n```python\nx = 1\n```\n",
        "<!-- file: train.py -->\n```python\nx = 1\n```\n",
    ],
)
def test_a_marker_that_is_not_true_is_found(text: str, tmp_path: Path):
    (block,) = blocks(written(tmp_path, text))
    with pytest.raises(AssertionError):
        check_marker(block, [block])


@pytest.mark.parametrize("command", ["minimax-m2 bench norms a.json", "torchrun minimax-m2 roundtrip a --tp x"])
def test_a_misspelt_option_is_found(command: str):
    with pytest.raises(typer.BadParameter):
        check_options(command)


def test_a_dead_link_and_an_unknown_name_are_found(tmp_path: Path):
    text = (
        "[here](README.md#a) [there](gone.md) [web](https://example.org)\n`bridge.jobs.ranks` `bridge.jobs.team`\n"
        "| old | new |\n|---|---|\n| `bridge.team` | `bridge.teams` |\n\n| `bridge.gone` | |\n"
    )
    readme = written(tmp_path, text)
    assert missing_links(readme) == ["gone.md"]
    assert unknown_names(readme) == ["bridge.jobs.team", "bridge.teams", "bridge.gone"]
