"""The public names: each can be imported first of all, and one that cannot be imported says what failed.

`bridge` loads each name on first use, so this is about interpreters that have imported nothing of ours.
"""

import ast
import importlib
from pathlib import Path

import pytest
from support.checks import ROOT, fresh_interpreter

import bridge

PACKAGES = ["bridge", "compiled", "compiled.fp8"]

# A name of each home first of all, in a fork that has other people's packages, which take seconds, and nothing of ours.
EACH_HOME_FIRST = """
import os, sys
import megatron.core.models.gpt, torch._dynamo
assert not {{"bridge", "compiled", "reference"}} & sys.modules.keys()
for name in {words!r}.split():
    child = os.fork()
    if not child:
        exec(f"from bridge import {{name}}")
        print(name, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

BROKEN = "import torch\ntorch.planted_attribute\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_imported_by_an_interpreter_that_has_nothing(package: str) -> None:
    names = importlib.import_module(package).__all__
    found = fresh_interpreter(f"from {package} import {', '.join(names)}\nprint(*({', '.join(names)}), sep='\\n')")
    assert len(found.stdout.splitlines()) == len(names), found.stderr


def test_each_home_can_be_the_first_to_be_imported() -> None:
    names = {home: name for name, home in bridge._HOMES.items()}.values()
    found = fresh_interpreter(EACH_HOME_FIRST.format(words=" ".join(names)))
    assert found.stdout.split() == list(names), found.stderr


def test_import_bridge_alone_imports_neither_torch_nor_megatron() -> None:
    code = "import bridge, sys; print(sorted({'torch', 'megatron', 'compiled', 'reference'} & sys.modules.keys()))"
    found = fresh_interpreter(code)
    assert found.stdout == "[]\n", found.stderr


def test_the_names_and_their_homes_are_said_alike_three_times() -> None:
    """In `__all__`, in the table that loads them, and in what a type checker reads."""
    tree = ast.parse((ROOT / "bridge/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    read = {alias.name: node.module for node in block.body for alias in node.names}
    assert read == bridge._HOMES
    assert sorted(read) == sorted(bridge.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'bridge' has no attribute 'Nothing'"):
        _ = bridge.Nothing
    with pytest.raises(ImportError, match="cannot import name 'Nothing' from 'bridge'"):
        exec("from bridge import Nothing")


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("MiniMaxM2Bridge", "from bridge import {name}"),
        ("minimax_m2_layer_spec", "from bridge import {name}"),
        ("build_model", "import bridge; bridge.{name}"),
    ],
)
def test_an_attribute_error_inside_an_import_is_not_hidden(tmp_path: Path, name: str, use: str) -> None:
    """megatron-core breaks while it is imported, as it does beside a torch that it does not know."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (tmp_path / "megatron" / "__init__.py").touch()
    (core / "__init__.py").write_text(BROKEN)
    found = fresh_interpreter(use.format(name=name), PYTHONPATH=str(tmp_path))
    assert found.returncode == 1
    said = f"{bridge._HOMES[name]} cannot be imported: module 'torch' has no attribute 'planted_attribute'"
    assert found.stderr.splitlines()[-1] == f"ImportError: {said}"


# What breaks inside megatron-core: the source, and the last line that the user sees.
BREAKS = {
    "an import error": ("from torch import planted", "ImportError: cannot import name 'planted' from 'torch'"),
    "a missing package": ("import planted_package", "ModuleNotFoundError: No module named 'planted_package'"),
    "a runtime error": ("raise RuntimeError('planted words')", "RuntimeError: planted words"),
    "a file that is not there": ("open('/planted/file')", "FileNotFoundError: [Errno 2] No such file or directory"),
    "a missing key": ("{}['planted']", "KeyError: 'planted'"),
    "an error that is an AttributeError too": (
        "from dataclasses import FrozenInstanceError\nraise FrozenInstanceError('planted words')",
        "ImportError: bridge.minimax_m2_bridge cannot be imported: planted words",
    ),
}
EACH_BREAK = """
import os, sys, traceback
import torch
for folder in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.path.insert(0, folder)
        for _ in range(2):
            try:
                from bridge import MiniMaxM2Bridge
            except Exception as error:
                print(traceback.format_exception_only(error)[-1].strip(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_each_kind_of_failure_is_said_in_its_own_words_also_the_second_time(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(BREAKS))]
    for folder, (source, _) in zip(folders, BREAKS.values(), strict=True):
        (folder / "megatron" / "core").mkdir(parents=True)
        (folder / "megatron" / "__init__.py").touch()
        (folder / "megatron" / "core" / "__init__.py").write_text(source)
    code = f"import sys\nsys.argv[1:] = {[str(folder) for folder in folders]}\n{EACH_BREAK}"
    found = fresh_interpreter(code)
    lines = found.stdout.splitlines()
    assert len(lines) == 2 * len(BREAKS), found.stderr
    for number, (kind, (_, said)) in enumerate(BREAKS.items()):
        for line in lines[2 * number : 2 * number + 2]:
            assert line.startswith(said), kind
