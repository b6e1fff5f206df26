"""Imports point one way, bridge -> compiled -> reference, and each folder knows only those below it: read from sources.

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
# The frameworks that MiniMax-M2 is plugged into: only a plug-in imports its own.
HOSTS = ("megatron.bridge", "megatron.training")
# megatron-core asks a module for its `sharded_state_dict`, whose entries are of its own class: one file makes them.
SPEAKS_MEGATRON = "compiled/norm/sharded_state.py"
# Which folders of ours each folder (or file on top) may import; a folder may always import itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "reference": (),
    "compiled.cpp_build": (),
    "compiled.tracing": (),
    "compiled.triton_launch": (),
    "compiled.norm": ("compiled.cpp_build", "compiled.tracing", "compiled.triton_launch", "reference"),
    "compiled.fp8": ("compiled.tracing", "compiled.triton_launch", "reference"),
    "compiled.experts": ("compiled.triton_launch",),
    "compiled.embedding": ("compiled.triton_launch",),
    "compiled.adam": ("compiled.triton_launch",),
    "compiled.router": ("compiled.triton_launch",),
    "compiled": ("compiled.norm",),
    "bridge.formats": (),
    "bridge.jobs": (),
    "bridge.huggingface": ("bridge.formats", "bridge.jobs", "compiled.fp8", "reference"),
    "bridge.model": (
        "bridge.jobs", "compiled", "compiled.adam", "compiled.embedding", "compiled.experts", "compiled.router",
        "compiled.tracing", "reference",
    ),
    "bridge.torch_dist": ("bridge.formats", "bridge.huggingface", "bridge.jobs", "reference"),
    "bridge.memory_plan": ("bridge.formats", "bridge.huggingface", "reference"),
    "bridge.weights": ("bridge.model", "bridge.huggingface", "bridge.jobs", "compiled.fp8", "reference"),
    "bridge.convert": (
        "bridge.formats", "bridge.torch_dist", "bridge.huggingface", "bridge.jobs", "compiled.fp8", "reference"),
    "bridge.minimax_m2_bridge": (
        "bridge.weights", "bridge.model", "bridge.huggingface", "bridge.jobs", "compiled.fp8", "reference",
    ),
    "bridge.training": (
        "bridge.minimax_m2_bridge", "bridge.convert", "bridge.weights", "bridge.memory_plan", "bridge.torch_dist",
        "bridge.model", "bridge.huggingface", "bridge.jobs", "bridge.formats", "reference",
    ),
    "bridge.proof": (
        "bridge.minimax_m2_bridge", "bridge.weights", "bridge.torch_dist", "bridge.model", "bridge.huggingface",
        "bridge.jobs", "reference",
    ),
    "bridge.cli": (
        "bridge.training", "bridge.proof", "bridge.convert", "bridge.minimax_m2_bridge", "bridge.memory_plan",
        "bridge.huggingface", "bridge.jobs", "reference",
    ),
    # Our MiniMax-M2 inside other frameworks: on top of everything, and imported by nothing of ours.
    "bridge.plugins": (
        "bridge.minimax_m2_bridge", "bridge.weights", "bridge.model", "bridge.huggingface", "bridge.jobs", "compiled",
        "compiled.fp8", "compiled.norm", "reference",
    ),
    # The public names, each from its home, on first use.
    "bridge": ("bridge.convert", "bridge.minimax_m2_bridge", "bridge.model", "bridge.proof"),
}  # fmt: skip
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


def folder_of(module: str) -> str:
    """The key of MAY_IMPORT that a module of ours belongs to, or what is named on top of the three packages."""
    parts = module.split(".")
    for size in (2, 1):
        name = ".".join(parts[:size])
        if name in MAY_IMPORT:
            return name
    return parts[0]


def imported_modules(source: str) -> set[str]:
    """The modules of ours that a source imports, each named in full."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else str(node.module) for name in below}
    return {name for name in found if name.split(".")[0] in FORBIDDEN_MODULES}


def foreign_modules(source: str) -> set[str]:
    """What a source imports, each name in full, whether it is a module or in one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def upward(source: str, folder: str) -> list[str]:
    """What a source of `folder` imports from folders that it may not know."""
    return sorted(
        f"{name} ({folder_of(name)})"
        for name in imported_modules(source)
        if folder_of(name) not in (folder, *MAY_IMPORT[folder])
    )


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def test_each_folder_imports_only_those_below_it():
    files = [file for package in FORBIDDEN_MODULES for file in sorted((ROOT / package).rglob("*.py"))]
    assert {folder_of(module_of(file)) for file in files} == set(MAY_IMPORT)
    found = {str(file): upward(file.read_text(), folder_of(module_of(file))) for file in files}
    assert not {file: names for file, names in found.items() if names}


def test_no_folder_can_reach_itself():
    """MAY_IMPORT has no cycle, so that the folders have floors."""

    def below(folder: str, path: tuple[str, ...] = ()) -> None:
        assert folder not in path, " -> ".join((*path, folder))
        for other in MAY_IMPORT[folder]:
            below(other, (*path, folder))

    for folder in MAY_IMPORT:
        below(folder)


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("bridge.jobs", "from bridge.model.build import build_model"),
        ("bridge.huggingface", "def f():\n    from bridge.torch_dist import reader"),
        ("bridge.model", "from bridge.weights.load import load_weights"),
        ("bridge.weights", "import bridge.minimax_m2_bridge"),
        ("bridge.convert", "from bridge.model import layer_spec"),
        ("bridge.memory_plan", "from bridge import MiniMaxM2Bridge"),
        ("bridge.cli", "import bridge.plugins.megatron_bridge"),
        ("bridge.plugins", "from bridge.proof import roundtrip"),
        ("compiled.fp8", "from compiled.norm.function import HeadNorm"),
        ("reference", "from compiled import FullDimQKNorm"),
    ],
)
def test_an_upward_import_is_found(folder, source):
    assert upward(source, folder)


def test_only_plugins_import_a_host():
    files = [file for package in FORBIDDEN_MODULES for file in sorted((ROOT / package).rglob("*.py"))]
    imports = {module_of(file): foreign_modules(file.read_text()) for file in files}
    found = {name for name, modules in imports.items() if any(is_inside(module, HOSTS) for module in modules)}
    assert found
    assert {folder_of(name) for name in found} == {"bridge.plugins"}


def test_nothing_imports_a_plugin():
    assert not [folder for folder, below in MAY_IMPORT.items() if "bridge.plugins" in below]


@pytest.mark.parametrize("package", FORBIDDEN_MODULES)
def test_each_folder_says_what_it_is(package):
    for init in sorted((ROOT / package).rglob("__init__.py")):
        assert ast.get_docstring(ast.parse(init.read_text())), init


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
        ("reference", "import bridge.weights.param_mapping as m"),
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
        ("reference", "import importlib\nimportlib.import_module('bridge.weights.param_mapping')"),
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
