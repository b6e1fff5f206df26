"""Imports point one way, bridge -> compiled -> reference, and each room knows only what it may: read from the sources.

A walk over syntax trees, so that imports inside functions count and nothing is executed.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a room must not import: a module, and everything below it.
FORBIDDEN_MODULES = {
    "reference": (
        "compiled", "bridge", "tests", "megatron", "transformer_engine", "transformers", "torch.distributed",
        "safetensors", "huggingface_hub", "numpy", "torch.compiler", "torch._dynamo", "torch._inductor", "triton",
    ),
    "compiled": ("bridge", "tests", "megatron", "transformer_engine", "transformers", "safetensors", "huggingface_hub"),
    "bridge": ("tests",),
}  # fmt: skip
# megatron-core asks a module for its `sharded_state_dict`, whose entries are of its own class: one file makes them.
SPEAKS_MEGATRON = "compiled/sharded_state.py"
# What a room must not name, however it came by it.
FORBIDDEN_NAMES = {
    "reference": (
        "torch.compile",
        "torch.nn.Module",
        "torch.nn.Parameter",
        "torch.distributed",
        "torch.library",
        "open",
    ),
    "compiled": (),
    "bridge": (),
}


def violations(source: str, room: str, package: str) -> list[str]:
    """Lines of `source`, a module of `package` (dotted), that import or name what `room` must not."""
    tree = ast.parse(source)
    aliases: dict[str, str] = {}  # local name -> the dotted name that it stands for
    found = []

    def check_module(name: str, line: int) -> None:
        if any(name == module or name.startswith(module + ".") for module in FORBIDDEN_MODULES[room]):
            found.append(f"line {line}: imports {name}")

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            return owner and f"{owner}.{node.attr}"
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                aliases[alias.asname or top] = alias.name if alias.asname else top
                check_module(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            here = package.split(".")
            above = here[: len(here) - node.level + 1] if node.level else []
            for alias in node.names:
                name = ".".join([*above, *filter(None, [node.module]), alias.name])
                aliases[alias.asname or alias.name] = name
                check_module(name, node.lineno)

    for node in ast.walk(tree):
        name = dotted(node)
        if name in FORBIDDEN_NAMES[room]:
            found.append(f"line {node.lineno}: names {name}")
        is_call = isinstance(node, ast.Call) and dotted(node.func) in ("importlib.import_module", "__import__")
        if is_call and node.args and isinstance(node.args[0], ast.Constant):
            check_module(str(node.args[0].value), node.lineno)
    return found


@pytest.mark.parametrize("room", FORBIDDEN_MODULES)
def test_rooms_import_what_they_may(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no sources in {room}"
    for file in files:
        package = ".".join(file.relative_to(ROOT).parent.parts)
        found = violations(file.read_text(), room, package)
        if file == ROOT / SPEAKS_MEGATRON:
            found = [violation for violation in found if "imports megatron.core." not in violation]
        assert not found, file


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("reference", "import compiled"),
        ("reference", "import bridge.mapping as m"),
        ("reference", "from compiled.norm import x"),
        ("reference", "from ..bridge import x"),
        ("reference", "from .. import compiled"),
        ("reference", "import torch.distributed as dist"),
        ("reference", "from torch import distributed"),
        ("reference", "import torch\ndef f(x):\n    torch.distributed.all_reduce(x)"),
        ("reference", "import torch\nf = torch.compile(lambda x: x)"),
        ("reference", "from torch import compile as fast\n@fast\ndef f(): ..."),
        ("reference", "import torch.nn as nn\nclass A(nn.Module): ..."),
        ("reference", "from torch import nn\nclass A(nn.Module): ..."),
        ("reference", "from torch.nn import Module\nclass A(Module): ..."),
        ("reference", "def f():\n    from safetensors.torch import load_file"),
        ("reference", "try:\n    import megatron.core\nexcept ImportError:\n    pass"),
        ("reference", "import importlib\nimportlib.import_module('bridge.mapping')"),
        ("reference", "text = open('config.json').read()"),
        ("reference", "if True:\n    from huggingface_hub import snapshot_download"),
        ("compiled", "from bridge import x"),
        ("compiled", "from megatron.core import parallel_state"),
        ("compiled", "import safetensors"),
        ("bridge", "from tests import oracles"),
    ],
)
def test_the_check_catches_a_planted_violation(room, source):
    assert violations(source, room, room)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("reference", "import torch\nimport torch.nn.functional as F\ny = F.silu(torch.nn.functional.pad(x, (0, 1)))"),
        ("reference", "from reference.config import ModelConfig\nfrom .norm import rms_norm\nfrom . import fp8"),
        ("reference", "import compiled_elsewhere\nimport bridges"),
        ("compiled", "import torch.distributed\nfrom torch import nn\nfrom reference.config import ModelConfig"),
        ("bridge", "import compiled, reference, megatron.core, safetensors"),
    ],
)
def test_the_check_lets_allowed_imports_pass(room, source):
    assert not violations(source, room, room)
