"""Metadata is data: what real torch and megatron-core write is read, and nothing that a file names is run.

Each payload would make a file, or end the process, if any of it ran. It stands in several places of a metadata file
that is otherwise whole; the command must refuse it by the name of what it would call, and the file must not be there.
"""

import _compat_pickle
import builtins
import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import pickletools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as torch_metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from typer.testing import CliRunner

from bridge.cli import app
from bridge.torch_dist.metadata import read_metadata
from bridge.torch_dist.metadata_classes import KNOWN
from bridge.torch_dist.unpickle import Class, Function, Items, Record, unpickle

ITERATION = "iter_0000001"


class Calls:
    """An object that pickles as `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class CallsByProtocol(Calls):
    """The same through `__reduce_ex__`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.call


class Builds(Calls):
    """`function(*arguments)`, and then its `__setstate__`."""

    def __reduce__(self) -> Any:
        return (*self.call, {"state": 1})


class Iterates(Calls):
    """A list whose elements, a dictionary whose items are given to the object that was made."""

    def __reduce__(self) -> Any:
        return (*self.call, None, iter([1]), iter([("key", "value")]))


def touch(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


# By name: what would be called, and the name that the message says.
CALLS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "os.system": (lambda m: Calls(os.system, f"touch {m}"), "posix.system"),
    "os._exit": (lambda m: Calls(os._exit, 0), "posix._exit"),
    "os.popen": (lambda m: Calls(os.popen, f"touch {m}"), "os.popen"),
    "os.mkdir": (lambda m: Calls(os.mkdir, str(m)), "posix.mkdir"),
    "sys.exit": (lambda m: Calls(sys.exit, 0), "sys.exit"),
    "subprocess.Popen": (lambda m: Calls(subprocess.Popen, ["touch", str(m)]), "subprocess.Popen"),
    "subprocess.run": (lambda m: Calls(subprocess.run, ["touch", str(m)]), "subprocess.run"),
    "eval": (lambda m: Calls(eval, touch(m)), "builtins.eval"),
    "exec": (lambda m: Calls(exec, touch(m)), "builtins.exec"),
    "open": (lambda m: Calls(open, str(m), "w"), "open"),
    "print": (lambda m: Calls(print, "ran"), "builtins.print"),
    "__import__": (lambda m: Calls(builtins.__import__, "antigravity"), "builtins.__import__"),
    "import_module": (lambda m: Calls(importlib.import_module, "antigravity"), "importlib.import_module"),
    "by __reduce_ex__": (lambda m: CallsByProtocol(os.system, f"touch {m}"), "posix.system"),
    "with a state": (lambda m: Builds(os.system, f"touch {m}"), "posix.system"),
    "with items": (lambda m: Iterates(os.system, f"touch {m}"), "posix.system"),
    "getattr": (lambda m: Calls(getattr, torch.float32, "itemsize"), "builtins.getattr"),
    "getattr of torch": (lambda m: Calls(getattr, MetadataIndex, "__init__"), "builtins.getattr"),
    "setattr": (lambda m: Calls(setattr, MetadataIndex, "__hash__", None), "builtins.setattr"),
    "partial": (lambda m: Calls(functools.partial, os.system, f"touch {m}"), "functools.partial"),
    "operator": (lambda m: Calls(operator.methodcaller, "unlink"), "operator.methodcaller"),
    "map": (lambda m: Calls(map, os.system, [f"touch {m}"]), "builtins.map"),
    "type": (lambda m: Calls(type, "Metadata", (), {}), "builtins.type"),
    "pickle.loads": (lambda m: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {m}"))), "_pickle.loads"),
    "torch.load": (lambda m: Calls(torch.load, str(m)), "torch.serialization.load"),
    "torch.hub": (lambda m: Calls(torch.hub.load, "owner/name", "model"), "torch.hub.load"),
    "tensor": (lambda m: torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
    "a torch class": (lambda m: Calls(torch.nn.Linear, 1, 1), "torch.nn.modules.linear.Linear"),
    "reconstructor": (lambda m: Calls(copyreg._reconstructor, MetadataIndex, object, None), "copyreg._reconstructor"),
    "bytes": (lambda m: Calls(bytearray, 8), "builtins.bytearray"),
    "set": (lambda m: Calls(set, [1]), "builtins.set"),
    "a path that is a file": (lambda m: Calls(Path.touch, m), "__builtin__.getattr|pathlib.Path"),
}  # fmt: skip
# By name: bytes that are no value of an object, and what the message says.
RAW: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "text protocol": (lambda m: f"cos\nsystem\n(S'touch {m}'\ntR.".encode(), "os.system"),
    "inst": (lambda m: f"(S'touch {m}'\nios\nsystem\n.".encode(), r"opcode b'S'|opcode b'i'"),
    "obj": (lambda m: b"(cos\nsystem\no.", "os.system"),
    "extension": (lambda m: b"\x80\x02\x82\xf0.", r"opcode b'\\x82'"),
    "persistent id": (lambda m: b"\x80\x02\x8c\x01xQ.", "opcode b'Q'"),
    "persistent id in text": (lambda m: b"Pos.system\n.", "opcode b'P'"),
    "new with keywords": (lambda m: b"\x80\x04cos\nsystem\n)}\x92.", "os.system"),
    "bytearray without end": (lambda m: b"\x80\x05\x96" + b"\xff" * 8 + b".", r"opcode b'\\x96'"),
    "outer buffer": (lambda m: b"\x80\x05\x97.", r"opcode b'\\x97'"),
    "dotted name": (
        lambda m: b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.",
        "torch.distributed.checkpoint.filesystem.os.system",
    ),
    "attribute of a class": (
        lambda m: b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
        "Metadata.__init__",
    ),
    "dtype called": (lambda m: b"\x80\x04ctorch\nfloat32\n)R.", "a dtype, which is nothing to call"),
    "class called": (
        lambda m: b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)R.",
        "Metadata, which is nothing to call",
    ),
    "state of a list": (lambda m: b"\x80\x04]}b.", "a list, which has none to be set"),
    "state twice": (
        lambda m: b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}b}b.",
        "a Record, which has none to be set",
    ),
    "number beyond the memo": (lambda m: b"\x80\x04Nr\xff\xff\xff\xff.", "found a NoneType, expected a Metadata"),
    "memo that is not there": (lambda m: b"\x80\x04h\x07.", "no whole pickle"),
    "text without end": (lambda m: b"\x80\x04\x8d" + b"\xff" * 8 + b"x.", "no whole pickle"),
    "number too long": (lambda m: b"\x80\x04\x8b\xff\xff\xff\x7f.", r"opcode b'\\x8b'"),
    "empty": (lambda m: b"", "no whole pickle"),
    "nothing": (lambda m: b"\x80\x04.", "no whole pickle"),
    "two values": (lambda m: b"\x80\x04NN.", "no whole pickle"),
    "odd dictionary": (lambda m: b"\x80\x04}(Nu.", "no whole pickle"),
    "deep": (lambda m: b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "found a list, expected a Metadata"),
    "doubled sixty times": (
        lambda m: b"\x80\x04)" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60)) + b".",
        "found a tuple, expected a Metadata",
    ),
}  # fmt: skip
# Where in the metadata it stands.
PLACES: dict[str, Callable[[Any, Any], Any]] = {
    "instead": lambda metadata, payload: payload,
    "planner data": lambda metadata, payload: setattr(metadata, "planner_data", payload) or metadata,
    "an attribute": lambda metadata, payload: setattr(metadata, "mcore_data", {"x": [(payload,)]}) or metadata,
    "a key": lambda metadata, payload: metadata.state_dict_metadata.update({"x": payload}) or metadata,
    "a size": lambda metadata, payload: setattr(tensor_of(metadata), "size", payload) or metadata,
    "a dtype": lambda metadata, payload: setattr(tensor_of(metadata).properties, "dtype", payload) or metadata,
    "a file's name": lambda metadata, payload: (
        setattr(next(iter(metadata.storage_data.values())), "relative_path", payload) or metadata
    ),
    "where it was saved": lambda metadata, payload: (
        setattr(metadata, "storage_meta", torch_metadata.StorageMeta(checkpoint_id=payload)) or metadata
    ),
}


def tensor_of(metadata: Any) -> Any:
    return next(entry for entry in metadata.state_dict_metadata.values() if hasattr(entry, "properties"))


def real_metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


@pytest.fixture
def megatron(imported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(imported, tmp_path / "megatron"))


def assert_refused(megatron: Path, said: str) -> None:
    """By every command that opens the folder; one at a time, for a payload may end the process."""
    iteration = megatron / ITERATION
    with pytest.raises(ValueError, match=rf"\.metadata: cannot be read .*{said}"):
        read_metadata(iteration)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_refused_by_name(tmp_path: Path, call: str, protocol: int) -> None:
    """On its own, in each protocol; text protocols have opcodes of their own, of which none is read."""
    marker = tmp_path / "marker"
    make, name = CALLS[call]
    data = pickle.dumps(make(marker), protocol)
    said = {0: rf"opcode|{python_2(name)}", 1: rf"opcode|{python_2(name)}", 2: python_2(name)}.get(protocol, name)
    with pytest.raises(ValueError, match=said):
        unpickle(data, KNOWN)
    assert not marker.exists()


def python_2(name: str) -> str:
    """Protocols 0 to 2 say the names of Python 2."""
    module, _, last = name.rpartition(".")
    if (module, last) in _compat_pickle.REVERSE_NAME_MAPPING:
        return ".".join(_compat_pickle.REVERSE_NAME_MAPPING[module, last])
    return f"{_compat_pickle.REVERSE_IMPORT_MAPPING.get(module, module)}.{last}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", ["os.system", "os._exit", "eval", "getattr", "with a state", "pickle.loads"])
def test_a_call_is_refused_wherever_it_stands(megatron: Path, tmp_path: Path, call: str, place: str) -> None:
    marker = tmp_path / "marker"
    make, name = CALLS[call]
    path = megatron / ITERATION / ".metadata"
    path.write_bytes(pickle.dumps(PLACES[place](real_metadata(path.parent), make(marker))))
    assert_refused(megatron, name)
    assert not marker.exists()


@pytest.mark.parametrize("case", RAW)
def test_bytes_that_are_no_metadata(megatron: Path, tmp_path: Path, case: str) -> None:
    make, said = RAW[case]
    (megatron / ITERATION / ".metadata").write_bytes(make(tmp_path / "marker"))
    assert_refused(megatron, said)
    assert not (tmp_path / "marker").exists()


def test_an_extension_that_someone_registered_is_refused(tmp_path: Path) -> None:
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        data = pickle.dumps(Calls(os.system, f"touch {tmp_path}/marker"), 2)
        assert b"system" not in data
        with pytest.raises(ValueError, match=r"opcode b'\\x82'"):
            unpickle(data, KNOWN)
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)
    assert not (tmp_path / "marker").exists()


class Commands:
    """What a user runs on a folder, each of which opens it."""

    def __init__(self, megatron: Path, checkpoint: Path, out: Path):
        self.words = {
            "verify": ["verify", megatron, checkpoint],
            "verify, on the right": ["verify", checkpoint, megatron],
            "export": ["export", megatron, out, "--source", checkpoint, "--dry-run"],
            "export without source": ["export", megatron, out, "--scales", "fresh", "--dry-run"],
            "inspect": ["inspect", megatron],
        }


@pytest.mark.parametrize("command", ["verify", "verify, on the right", "export", "export without source", "inspect"])
@pytest.mark.parametrize("call", ["os.system", "os._exit", "eval"])
def test_commands_end_with_status_2(megatron: Path, checkpoint: Path, tmp_path: Path, call: str, command: str) -> None:
    marker = tmp_path / "marker"
    make, name = CALLS[call]
    metadata = PLACES["planner data"](real_metadata(megatron / ITERATION), make(marker))
    (megatron / ITERATION / ".metadata").write_bytes(pickle.dumps(metadata))
    words = Commands(megatron, checkpoint, tmp_path / "out").words[command]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 2, result.output
    assert not marker.exists()
    if command != "inspect":  # which is of Hugging Face folders
        assert name in result.stderr
    assert "Traceback" not in result.stderr


# --------------------------------------------------------------------------------------------------------------- read


class Other:
    """Of a class that no table has."""


def test_values_come_back_as_they_are() -> None:
    value = [
        None,
        True,
        False,
        0,
        255,
        256,
        65535,
        65536,
        -1,
        2**31,
        -(2**40),
        2**200,
        1.5,
        "",
        "ü" * 200,
        "x" * 70_000,
    ]
    value += [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [[]], ["\ud800"], [(i,) for i in range(3000)]]
    value += [value[14], value[20]]  # by reference
    for protocol in (2, 3, 4, 5):
        assert unpickle(pickle.dumps(value, protocol), {}) == value
        assert unpickle(pickletools.optimize(pickle.dumps(value, protocol)), {}) == value
    assert unpickle(pickle.dumps({"a": {1: 2}, (1, 2): []}), {}) == Items([("a", Items([(1, 2)])), ((1, 2), [])])


def test_an_instance_is_its_state() -> None:
    known = {("torch.distributed.checkpoint.metadata", "MetadataIndex"): Class("index"), ("torch", "Size"): SIZE}
    found = unpickle(pickle.dumps(MetadataIndex("key", (1, 2))), known)
    assert isinstance(found, Record)
    assert (found.kind, found.state) == ("index", {"fqn": "key", "offset": (1, 2), "index": None})
    with pytest.raises(ValueError, match=r"names .*\.Other, which is no part"):
        unpickle(pickle.dumps(Other()), known)


SIZE = Function("Size", lambda sizes: sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last, torch.preserve_format])
def test_properties_of_every_kind(dtype: torch.dtype, form: torch.memory_format) -> None:
    found = unpickle(pickle.dumps(TensorProperties(dtype=dtype, memory_format=form)), KNOWN)
    assert found.kind == "TensorProperties"
    assert found.state[0] is dtype


def test_pythons_enums_by_name() -> None:
    """Python 3.11 pickled members as `getattr(class, name)`."""
    encoding = torch_metadata._MEM_FORMAT_ENCODING

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            return (getattr, (encoding, value.name)) if isinstance(value, encoding) else NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer).dump(TensorProperties(dtype=torch.float16))
    assert b"getattr" in buffer.getvalue()
    assert unpickle(buffer.getvalue(), KNOWN).state[0] is torch.float16
    for name in ("__class__", "mro", "TORCH", "_value_"):
        with pytest.raises(ValueError, match=r"builtins\.getattr"):
            unpickle(pickle.dumps(Calls(getattr, encoding, name)), KNOWN)
