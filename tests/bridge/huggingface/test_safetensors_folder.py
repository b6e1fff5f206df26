"""Reading: the bytes are those of the files, and a folder that is not whole is refused before any of them is read."""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from bridge.huggingface.safetensors_folder import SafetensorsFolder
from bridge.huggingface.safetensors_header import TensorInfo

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]
FIRST, SECOND = "model-00002-of-00130.safetensors", "odd-name.safetensors"


def every_byte(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Arbitrary bit patterns: NaN payloads, infinities, both zeros."""
    size = torch.Size(shape).numel() * dtype.itemsize
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bytes_on_disk(path: Path, name: str) -> bytes:
    """By the format's own words: 8 bytes of header length, the JSON header, then the data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return data[8 + length + start : 8 + length + stop]


def write_index(folder: Path, weight_map: Any, **more: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards whose names count to 130, and an index whose order is neither the files' nor the alphabet's."""
    (tmp_path / "config.json").write_text('{"rotary_dim": 64, "unknown_key": [1, 2]}')
    save_file({f"{d}.2d".removeprefix("torch."): every_byte(d, 7, 5) for d in FLOATS}, tmp_path / FIRST)
    second = {f"{d}.1d".removeprefix("torch."): every_byte(d, 11) for d in FLOATS}
    second |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "flags": torch.tensor([True, False, True])}
    save_file(second, tmp_path / SECOND, metadata={"format": "pt"})
    names = [(n, SECOND) for n in reversed(second)] + [(f"{d}.2d".removeprefix("torch."), FIRST) for d in FLOATS]
    write_index(tmp_path, dict(names), metadata={"total_size": 12345})
    return tmp_path


def test_names_dtypes_shapes_and_order_come_from_the_index(folder: Path):
    with SafetensorsFolder(folder) as checkpoint:
        assert checkpoint.config_json == {"rotary_dim": 64, "unknown_key": [1, 2]}
        assert checkpoint.metadata == {"total_size": 12345}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert list(checkpoint.tensors) == list(index["weight_map"])
        assert {name: info.file for name, info in checkpoint.tensors.items()} == index["weight_map"]
        assert checkpoint.tensors["bfloat16.2d"][:3] == (torch.bfloat16, (7, 5), FIRST)
        assert checkpoint.tensors["float8_e4m3fn.1d"][:3] == (torch.float8_e4m3fn, (11,), SECOND)
        assert checkpoint.tensors["scalar"][:3] == (torch.float32, (), SECOND)
        assert checkpoint.tensors["float16.2d"].nbytes == 70
        assert checkpoint.nbytes == (7 * 5 + 11) * (2 + 2 + 4 + 1) + 4 + 3


def test_every_tensor_is_its_bytes_on_disk(folder: Path):
    with SafetensorsFolder(folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)
            assert bytes_of(tensor) == bytes_on_disk(folder / info.file, name), name
            with safe_open(folder / info.file, "pt") as file:
                assert bytes_of(tensor) == bytes_of(file.get_tensor(name)), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(st.tuples(*[st.integers(0, 7)] * 2).map(sorted))
@settings(max_examples=25, deadline=None)
def test_rows_are_the_rows_of_the_whole(tmp_path_factory, dtype: torch.dtype, rows: list[int]):
    folder = tmp_path_factory.getbasetemp() / f"slices-{dtype}"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file({"m": every_byte(dtype, 7, 5), "v": every_byte(dtype, 7)}, folder / "model.safetensors")
    first, last = rows
    with SafetensorsFolder(folder) as checkpoint:
        matrix, vector = checkpoint.read("m"), checkpoint.read("v")
        for part, whole in [
            (checkpoint.read("m", slice(first, last)), matrix[first:last]),
            (checkpoint.read("m", slice(first, None)), matrix[first:]),
            (checkpoint.read("m", slice(None, last)), matrix[:last]),
            (checkpoint.read("v", slice(first, last)), vector[first:last]),
        ]:
            assert part.shape == whole.shape
            assert part.is_contiguous()
            assert bytes_of(part) == bytes_of(whole)


def test_many_slices_in_one_go(folder: Path):
    """Of both files, some of one tensor, one of nothing; each into a place of the caller's."""
    wanted = [
        ("float32.2d", slice(1, 6)),
        ("bfloat16.1d", slice(3, 9)),
        ("float32.2d", None),
        ("empty", None),
        ("float16.2d", slice(2, 2)),
        ("flags", None),
        ("float8_e4m3fn.2d", slice(0, 7)),
    ]
    with SafetensorsFolder(folder) as checkpoint:
        expected = [bytes_of(checkpoint.read(*one)) for one in wanted]
        ends = np.cumsum([len(one) for one in expected])
        before, memory = checkpoint.bytes_read, np.full(ends[-1] + 1, 7, np.uint8)
        places = [memory[end - len(one) : end] for end, one in zip(ends, expected, strict=True)]
        checkpoint.read_into((place, *one) for place, one in zip(places, wanted, strict=True))
        assert memory.tobytes() == b"".join(expected) + b"\x07"
        assert checkpoint.bytes_read - before == ends[-1]
        with pytest.raises(ValueError, match="flags: found a buffer of 4 bytes, expected 3"):
            checkpoint.read_into([(memory[:4], "flags", None)])
        (folder / FIRST).unlink()
        with pytest.raises(ValueError, match=rf"{FIRST}: changed while float32\.2d and 2 more were read"):
            checkpoint.read_into((place, *one) for place, one in zip(places, wanted, strict=True))


def test_a_read_tensor_owns_its_memory(folder: Path):
    with SafetensorsFolder(folder) as checkpoint:
        before = bytes_of(checkpoint.read("float32.2d"))
        checkpoint.read("float32.2d").zero_()
        kept = checkpoint.read("float32.2d")
        assert bytes_of(kept) == before
        assert kept.untyped_storage().nbytes() == 140
        assert checkpoint.read("float32.2d", slice(1, 3)).untyped_storage().nbytes() == 40
    assert bytes_of(kept) == before


def test_a_row_slice_reads_only_its_rows(tmp_path: Path):
    """Reading 2 rows of a 64 MB tensor costs the process some KB of reads (Linux counts them in /proc/self/io)."""

    def read_so_far() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    (tmp_path / "config.json").write_text("{}")
    save_file({"w": torch.zeros(16384, 1024)}, tmp_path / "model.safetensors")
    start = read_so_far()
    with SafetensorsFolder(tmp_path) as checkpoint:
        checkpoint.read("w", slice(9000, 9002))
    assert read_so_far() - start < 100_000


def test_a_single_file_needs_no_index(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"b": torch.arange(3.0), "a": torch.arange(4.0)}, tmp_path / "model.safetensors")
    with SafetensorsFolder(str(tmp_path)) as checkpoint:
        assert sorted(checkpoint.tensors) == ["a", "b"]
        assert torch.equal(checkpoint.read("a"), torch.arange(4.0))
        assert checkpoint.metadata == {}


def test_the_index_decides_which_file_holds_a_tensor(folder: Path):
    """Other copies, tensors and files are not read, and that is said once for each kind."""
    with SafetensorsFolder(folder) as checkpoint:
        assert checkpoint.notes == []
        names = list(checkpoint.tensors)
    matrices = {f"{d}.2d".removeprefix("torch."): every_byte(d, 7, 5) for d in FLOATS}
    save_file(matrices | {"scalar": torch.tensor(9.0), "extra.weight": torch.ones(2)}, folder / FIRST)
    save_file({"scalar": torch.tensor(8.0), "stray": torch.zeros(1)}, folder / "model.safetensors")
    save_file({"stray": torch.zeros(1)}, folder / "consolidated.safetensors")
    with SafetensorsFolder(folder) as checkpoint:
        assert list(checkpoint.tensors) == names
        assert checkpoint.read("scalar") == 2.5
        copies, unindexed, files = checkpoint.notes
        assert "index.json puts into another file" in copies
        assert copies.endswith(f": scalar in {FIRST}")
        assert "index.json does not name" in unindexed
        assert unindexed.endswith(f": extra.weight in {FIRST}")
        assert files.endswith(": consolidated.safetensors and 1 more")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_whole_checkpoint_in_one_file_needs_no_index(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.arange(3.0)}, tmp_path / name)
    with SafetensorsFolder(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.arange(3.0))
        assert checkpoint.notes == []
    save_file({"b": torch.arange(3.0)}, tmp_path / "other.safetensors")
    with SafetensorsFolder(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]
        assert [note.rpartition(": ")[2] for note in checkpoint.notes] == ["other.safetensors"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model-00001-of-00002.safetensors"], "neither model.safetensors.index.json nor model.safetensors is there"),
        (["model-00002-of-00002.safetensors"], "neither model.safetensors.index.json nor model.safetensors is there"),
        (["model-00001-of-00001.safetensors", "model.safetensors"], "which one is meant"),
    ],
)
def test_parts_of_a_checkpoint_need_an_index(tmp_path: Path, names: list[str], said: str):
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        save_file({"a": torch.arange(3.0)}, tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(said)):
        SafetensorsFolder(tmp_path)


def test_shards_may_be_links_and_lie_in_sub_folders(folder: Path):
    """A hub cache's snapshot holds links to ../../blobs."""
    blobs = folder / "blobs"
    blobs.mkdir()
    (folder / SECOND).rename(blobs / "0123")
    (folder / SECOND).symlink_to(blobs / "0123")
    (folder / "sub").mkdir()
    (folder / FIRST).rename(folder / "sub" / FIRST)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, {name: f"sub/{file}" if file == FIRST else file for name, file in index.items()})
    with SafetensorsFolder(folder) as checkpoint:
        assert checkpoint.read("scalar") == 2.5
        assert bytes_of(checkpoint.read("float32.2d")) == bytes_of(every_byte(torch.float32, 7, 5))


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def edit_header(data: bytes, change: Callable[[str], str]) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length].decode()).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def remap(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(folder, change(weight_map))


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "not there"]),
    "config not JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), ["config.json", "not JSON"]),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff\xfe"}'), ["config.json", "not JSON"]),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        ["config.json", "expected a JSON object", "list"],
    ),
    "no index": (lambda f: (f / "model.safetensors.index.json").unlink(), ["index.json", "nor model.safetensors"]),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["index.json", "not JSON"]),
    "no weight_map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), ["index.json", "weight_map"]),
    "weight_map a list": (lambda f: write_index(f, ["scalar"]), ["index.json", "weight_map", "['scalar']"]),
    "weight_map empty": (lambda f: write_index(f, {}), ["no tensor", "index.json"]),
    "file not a string": (lambda f: remap(f, lambda m: {**m, "scalar": 3}), ["scalar", "3"]),
    "file above the folder": (lambda f: remap(f, lambda m: {**m, "scalar": "../x.safetensors"}), ["scalar", "../x"]),
    "file above, later": (lambda f: remap(f, lambda m: {**m, "scalar": "a/../../x"}), ["scalar", "a/../../x"]),
    "absolute file": (lambda f: remap(f, lambda m: {**m, "scalar": str(f / SECOND)}), ["scalar", "inside"]),
    "empty file name": (lambda f: remap(f, lambda m: {**m, "scalar": ""}), ["scalar", "''"]),
    "missing shard": (lambda f: (f / FIRST).unlink(), [FIRST, "not there"]),
    "shard is a folder": (lambda f: ((f / FIRST).unlink(), (f / FIRST).mkdir()), [FIRST, "is a folder"]),
    "one byte short": (lambda f: rewrite(f / FIRST, lambda d: d[:-1]), [FIRST, "truncated"]),
    "one byte long": (lambda f: rewrite(f / FIRST, lambda d: d + b"\0"), [FIRST, "truncated"]),
    "header cut": (lambda f: rewrite(f / FIRST, lambda d: d[:60]), [FIRST, "truncated"]),
    "header length cut": (lambda f: rewrite(f / FIRST, lambda d: d[:5]), [FIRST, "truncated"]),
    "empty shard": (lambda f: rewrite(f / FIRST, lambda d: b""), [FIRST, "is empty"]),
    "git-lfs pointer": (
        lambda f: (f / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n"),
        [FIRST, "is a git-lfs pointer"],
    ),
    "header not JSON": (lambda f: rewrite(f / FIRST, lambda d: d[:8] + b"x" + d[9:]), [FIRST, "not a safetensors"]),
    "unknown dtype": (
        lambda f: rewrite(f / SECOND, lambda d: edit_header(d, lambda h: h.replace('"BOOL"', '"F6_E2M3"'))),
        [SECOND, "flags", "F6_E2M3", "BF16"],
    ),
    "tensor not in its shard": (
        lambda f: remap(f, lambda m: {**m, "lost.weight": FIRST}),
        [FIRST, "lost.weight", "its header does not"],
    ),
    "tensor in the other shard": (
        lambda f: remap(f, lambda m: {**m, "scalar": FIRST}),
        [FIRST, "scalar", "its header does not"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_opening_refuses_a_broken_folder_and_says_what_is_broken(folder: Path, case: str):
    SafetensorsFolder(folder).close()
    before = len(os.listdir("/proc/self/fd"))
    breaking, words = BROKEN[case]
    breaking(folder)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
        SafetensorsFolder(folder)
    for word in words:
        assert word in str(error.value)
    assert len(os.listdir("/proc/self/fd")) == before, "a file was left open"


def test_a_single_file_is_checked_like_a_shard(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    rewrite(tmp_path / "model.safetensors", lambda data: data[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        SafetensorsFolder(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor in model\.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("float32.2D", "float32.2d"), ("scalr", "scalar"), ("model.float8_e4m3fn.1d", "float8_e4m3fn.1d")],
)
def test_an_unknown_name_is_answered_with_the_likeliest(folder: Path, wrong: str, meant: str):
    with SafetensorsFolder(folder) as checkpoint, pytest.raises(ValueError, match=f"no tensor '{wrong}'.*'{meant}'"):
        checkpoint.read(wrong)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("float32.2d", slice(0, 8)),
        ("float32.2d", slice(8, None)),
        ("float32.2d", slice(-1, None)),
        ("float32.2d", slice(3, 2)),
        ("float32.2d", slice(0, 4, 2)),
        ("float32.1d", slice(0, 12)),
        ("scalar", slice(0, 1)),
    ],
)
def test_rows_that_leave_the_tensor_are_an_error(folder: Path, name: str, rows: slice):
    with SafetensorsFolder(folder) as checkpoint:
        shape = re.escape(str(checkpoint.tensors[name].shape))
        with pytest.raises(ValueError, match=f"^{name}: .*{shape}"):
            checkpoint.read(name, rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: rewrite(path, lambda data: data[:-1]),
        lambda path: rewrite(path, lambda data: data[:9]),
        lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
        lambda path: save_file({"other": torch.zeros(2)}, path),
    ],
    ids=["gone", "one byte short", "cut", "touched", "replaced"],
)
def test_a_file_that_changes_after_opening_is_an_error(folder: Path, change: Callable[[Path], Any]):
    with SafetensorsFolder(folder) as checkpoint:
        checkpoint.read("float32.2d")
        change(folder / FIRST)
        with pytest.raises(ValueError, match=rf"{FIRST}: changed while float32\.2d was read"):
            checkpoint.read("float32.2d")
        assert checkpoint.read("scalar") == 2.5  # the other shard is as it was


def test_closing_closes_the_files(folder: Path):
    before = len(os.listdir("/proc/self/fd"))
    with SafetensorsFolder(folder) as checkpoint:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed file"):
        checkpoint.read("scalar")


def test_tensor_info_counts_bytes():
    assert TensorInfo(torch.bfloat16, (3, 4), "f", 0).nbytes == 24
    assert TensorInfo(torch.float32, (), "f", 0).nbytes == 4
    assert TensorInfo(torch.float32, (0, 5), "f", 0).nbytes == 0
