"""What `.metadata` says is true, or is refused before it is used; what torch and megatron-core write is read whole."""

import math
import os
import pickle
import shutil
import time
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.folders import bind
from torch import Tensor
from torch.distributed._shard.sharded_tensor import metadata as older
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, StorageMeta

from bridge.torch_dist.metadata import Span, StoredChunk, overlapping, read_metadata
from bridge.torch_dist.reader import TorchDistFolder

GENERATOR = torch.Generator().manual_seed(0)
VALUES = {
    "matrix": torch.randn(6, 8, generator=GENERATOR),
    "half": torch.randn(4, 3, generator=GENERATOR).bfloat16(),
    "ids": torch.arange(5),
    "scalar": torch.tensor(2.5),
    "flags": torch.tensor([True, False]),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By torch, objects included."""
    folder = tmp_path_factory.mktemp("saved") / "ck"
    dcp.save({**VALUES, "step": 3, "state": {"lr": [0.1], "args": Namespace(a=1)}}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "ck"))


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def whole(folder: Path) -> dict[str, Tensor]:
    opened = TorchDistFolder(folder)
    return {key: opened.read(key, tuple(0 for _ in shape), shape) for key, shape in opened.shapes.items()}


def assert_whole(folder: Path) -> None:
    found = whole(folder)
    assert found.keys() == VALUES.keys()
    for key, value in VALUES.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        assert torch.equal(found[key], value)


# ---------------------------------------------------------------------------------------------------------------- read


def test_what_torch_saves(saved: Path) -> None:
    assert_whole(saved)
    assert {"step", "state.args"} <= read_metadata(saved).objects.keys()


def test_files_are_those_of_the_folder(saved: Path) -> None:
    found = TorchDistFolder(saved).versions
    assert found == tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(saved.iterdir()))


def to_older(metadata: Any) -> None:
    """torch 2.0 to 2.2: the properties' class was another module's, and some attributes were not there yet."""
    for entry in metadata.state_dict_metadata.values():
        if hasattr(entry, "properties"):
            entry.properties = older.TensorProperties(dtype=entry.properties.dtype)
    for info in metadata.storage_data.values():
        vars(info).pop("transform_descriptors", None)
    for name in ("storage_meta", "version"):
        vars(metadata).pop(name, None)


VARIANTS: dict[str, Callable[[Any], object]] = {
    "torch 2.0": to_older,
    "megatron-core's own attribute": lambda m: setattr(
        m, "mcore_data", {"matrix": {"nd_reformulated_orig_global_shape": torch.Size((6, 8))}}
    ),
    "saved to a path": lambda m: setattr(m, "storage_meta", StorageMeta(Path("/a/b"), "s", "l", ["m"])),
    "saved to a text": lambda m: setattr(m, "storage_meta", StorageMeta("s3://a/b")),
    "no planner data": lambda m: setattr(m, "planner_data", None),
    "ordered dictionaries": lambda m: setattr(m, "state_dict_metadata", OrderedDict(m.state_dict_metadata)),
    "version": lambda m: setattr(m, "version", "1.0.0"),
    "an index hint": lambda m: setattr(
        m, "storage_data", {MetadataIndex(i.fqn, i.offset, 0): info for i, info in m.storage_data.items()}
    ),
    "ranks that hold nothing": lambda m: m.state_dict_metadata["matrix"].chunks.append(
        ChunkStorageMetadata(torch.Size((6, 0)), torch.Size((0, 8)))
    ),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_other_versions_write(folder: Path, variant: str, protocol: int) -> None:
    edit(folder, VARIANTS[variant])
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    assert_whole(folder)


# ------------------------------------------------------------------------------------------------------------- refused


def info(key: str, **changes: Any) -> Callable[[Any], None]:
    """Change where a tensor is said to lie."""

    def change(metadata: Any) -> None:
        for index, found in metadata.storage_data.items():
            if index.fqn == key:
                vars(found).update(changes)

    return change


def tensor(key: str, **changes: Any) -> Callable[[Any], None]:
    return lambda metadata: vars(metadata.state_dict_metadata[key]).update(changes)


def dtype(key: str, value: Any) -> Callable[[Any], None]:
    return lambda metadata: setattr(metadata.state_dict_metadata[key].properties, "dtype", value)


def chunk(key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Callable[[Any], None]:
    """The tensor's one chunk is another rectangle, stored where it was."""

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[key].chunks[:] = [ChunkStorageMetadata(torch.Size(start), torch.Size(shape))]
        (old,) = (index for index in metadata.storage_data if index.fqn == key)
        metadata.storage_data[MetadataIndex(key, start)] = metadata.storage_data.pop(old)

    return change


def more_chunks(key: str, *places: tuple[tuple[int, ...], tuple[int, ...]]) -> Callable[[Any], None]:
    """Chunks that have bytes of their own: of the objects, which are nobody's weights."""

    def change(metadata: Any) -> None:
        spare = [index for index, found in metadata.storage_data.items() if index.offset is None]
        for (start, shape), index in zip(places, spare, strict=False):
            metadata.state_dict_metadata[key].chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
            metadata.storage_data[MetadataIndex(key, start)] = metadata.storage_data.pop(index)

    return change


def both(*changes: Callable[[Any], object]) -> Callable[[Any], None]:
    return lambda metadata: [change(metadata) for change in changes] and None


LARGE = 2**60
UNTRUE: dict[str, tuple[Callable[[Any], object], str]] = {
    "absolute file": (info("matrix", relative_path="/etc/passwd"), r"matrix: is said to lie in '/etc/passwd'"),
    "file above": (info("matrix", relative_path="../__0_0.distcp"), r"matrix: is said to lie in '\.\./__0_0"),
    "file above, later": (info("ids", relative_path="a/../../x"), "ids: is said to lie in 'a/../../x'"),
    "file without a name": (info("ids", relative_path=""), "ids: is said to lie in ''"),
    "file is the folder": (info("ids", relative_path="."), "ids: is said to lie in '.'"),
    "file with a zero byte": (info("ids", relative_path="a\0b"), "cannot be looked at"),
    "file with a lone surrogate": (info("ids", relative_path="a\ud800b"), "cannot be looked at"),
    "file with a long name": (info("ids", relative_path="a" * 5000), "cannot be looked at"),
    "file is not there": (info("ids", relative_path="other"), "other: .metadata names this file and it is not there"),
    "file is a number": (info("ids", relative_path=3), "_StorageInfo.relative_path: found a int, expected str"),
    "file is a path": (info("ids", relative_path=PurePosixPath("a")), "names pathlib.PurePosixPath"),
    "offset below 0": (info("matrix", offset=-1), "matrix is said to be .* bytes from byte -1"),
    "offset beyond the file": (info("matrix", offset=10**6), "matrix is said to be .* from byte 1000000"),
    "offset beyond all files": (info("matrix", offset=2**70), "from byte 1180591620717411303424"),
    "length below 0": (info("matrix", length=-5), "matrix is said to be -5 bytes"),
    "length beyond the file": (info("matrix", length=10**7), "matrix is said to be 10000000 bytes"),
    "length of a real number": (info("matrix", length=5.0), "_StorageInfo.length: found a float, expected int"),
    "offset true": (info("matrix", offset=True), "_StorageInfo.offset: found a bool"),
    "length too small": (info("matrix", length=100), "matrix: a chunk of shape .* needs 192 bytes, and .* has 100"),
    "bytes of another": (info("matrix", offset=0), "are said to share the bytes"),
    "compressed": (info("matrix", transform_descriptors=["stream.zstd/1"]), "matrix: is stored compressed"),
    "2**60 elements": (tensor("ids", size=torch.Size((LARGE,))), "the chunks of ids do not cover"),
    "2**60 elements in one chunk": (
        both(tensor("ids", size=torch.Size((LARGE,))), chunk("ids", (0,), (LARGE,))),
        f"ids: a chunk of shape .{LARGE}. and torch.int64 needs {8 * LARGE} bytes",
    ),
    "2**120 elements": (tensor("matrix", size=torch.Size((LARGE, LARGE))), "the chunks of matrix do not cover"),
    "size below 0": (tensor("ids", size=(-5,)), "ids: found a size of -5"),
    "size of a real number": (tensor("ids", size=(5.0,)), "ids: found a tuple, expected whole numbers"),
    "size true": (tensor("ids", size=(True,)), "ids: found a tuple, expected whole numbers"),
    "size a list": (tensor("ids", size=[5]), "TensorStorageMetadata.size: found a list, expected tuple"),
    "size beyond numbers": (tensor("ids", size=(2**64,)), "ids: found a size of"),
    "one axis too many": (tensor("ids", size=torch.Size((5, 1))), "ids: a chunk of shape .5. at .0. leaves the tensor"),
    "smaller than its chunk": (tensor("ids", size=torch.Size((4,))), "ids: a chunk of shape .5. at .0. leaves"),
    "larger than its chunk": (tensor("ids", size=torch.Size((6,))), "the chunks of ids do not cover .6."),
    "chunk outside": (chunk("matrix", (3, 0), (6, 8)), "a chunk of shape .6, 8. at .3, 0. leaves the tensor"),
    "chunk smaller": (chunk("matrix", (0, 0), (5, 8)), "the chunks of matrix do not cover"),
    "chunk elsewhere": (
        lambda m: setattr(m.state_dict_metadata["ids"].chunks[0], "offsets", torch.Size((1,))),
        "ids: a chunk begins at .1. and is stored nowhere",
    ),
    "no chunk": (tensor("matrix", chunks=[]), "the chunks of matrix do not cover"),
    "chunks overlap": (
        both(chunk("matrix", (0, 0), (5, 8)), more_chunks("matrix", ((4, 0), (1, 8)))),
        r"matrix: the chunks at \[[04], 0\] and \[[04], 0\] overlap",
    ),
    "dtype a text": (dtype("half", "bfloat16"), "half: found a TensorProperties without a dtype"),
    "properties of another class": (
        lambda m: setattr(m.state_dict_metadata["ids"], "properties", StorageMeta()),
        "ids: found a StorageMeta without a dtype",
    ),
    "entry a number": (lambda m: m.state_dict_metadata.update(x=3), "found a str: a int, expected names of entries"),
    "entry of another class": (lambda m: m.state_dict_metadata.update(x=StorageMeta()), "found a str: a StorageMeta"),
    "key a number": (
        lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["ids"]}),
        "found a int: a TensorStorageMetadata",
    ),
    "entries a list": (lambda m: setattr(m, "state_dict_metadata", []), "state_dict_metadata: found a list"),
    "no entries": (lambda m: vars(m).pop("state_dict_metadata"), "state_dict_metadata: found a NoneType"),
    "nothing stored": (lambda m: setattr(m, "storage_data", None), "storage_data: found a NoneType"),
    "stored by name": (
        lambda m: setattr(m, "storage_data", {i.fqn: x for i, x in m.storage_data.items()}),
        "found a str, expected a MetadataIndex",
    ),
    "stored a text": (
        lambda m: m.storage_data.update({MetadataIndex("x"): "y"}),
        "found a str, expected a _StorageInfo",
    ),
}


@pytest.mark.parametrize("case", UNTRUE)
def test_what_is_not_so_is_refused(folder: Path, case: str) -> None:
    change, said = UNTRUE[case]
    edit(folder, change)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=said) as caught:
        TorchDistFolder(folder)
    assert str(folder) in str(caught.value)
    assert "again" in str(caught.value) or "expected" in str(caught.value)
    assert time.monotonic() - begun < 5


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "__0_0.distcp").rename(folder.with_name("moved"))
        make(folder / "__0_0.distcp")

    return apply


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "link out": (replace_by(lambda p: p.symlink_to(p.parent.with_name("moved"))), "leads to .*moved, outside"),
    "relative link out": (replace_by(lambda p: p.symlink_to("../moved")), "leads to .*moved, outside"),
    "link to nothing": (replace_by(lambda p: p.symlink_to("nothing")), "is a link to nothing, which is not there"),
    "link to itself": (replace_by(lambda p: p.symlink_to(p)), "__0_0.distcp: cannot be looked at"),
    "device": (replace_by(lambda p: p.symlink_to("/dev/zero")), "leads to /dev/zero, outside"),
    "FIFO": (replace_by(os.mkfifo), "names this file and it is a FIFO, expected a regular file"),
    "folder": (replace_by(Path.mkdir), "names this file and it is a folder"),
    "socket": (replace_by(bind), "names this file and it is a socket"),
    "gone": (replace_by(lambda p: None), "names this file and it is not there"),
    "empty": (replace_by(Path.touch), "and the file has 0"),
    "metadata is a FIFO": (
        lambda f: ((f / ".metadata").unlink(), os.mkfifo(f / ".metadata")),
        r"\.metadata: is a FIFO",
    ),
    "metadata is a link out": (
        lambda f: ((f / ".metadata").rename(f.with_name("moved")), (f / ".metadata").symlink_to("../moved")),
        r"\.metadata: leads to .*moved, outside",
    ),
    "metadata is a folder": (lambda f: ((f / ".metadata").unlink(), (f / ".metadata").mkdir()), "is a folder"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_none_of_the_folder(folder: Path, case: str) -> None:
    change, said = FILES[case]
    change(folder)
    with pytest.raises(ValueError, match=said):
        TorchDistFolder(folder)


def test_links_inside_the_folder_and_to_the_blobs_of_a_hub_cache(folder: Path, tmp_path: Path) -> None:
    (folder / "data").mkdir()
    (folder / "__0_0.distcp").rename(folder / "data/0")
    (folder / "__0_0.distcp").symlink_to("data/0")
    assert_whole(folder)
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots/0123/iter_0000001"
    shutil.copytree(folder, snapshot)
    (repository / "blobs").mkdir()
    (snapshot / "data/0").rename(repository / "blobs/abc")
    (snapshot / "__0_0.distcp").unlink()
    (snapshot / "__0_0.distcp").symlink_to("../../../blobs/abc")
    assert_whole(snapshot)


# What lies where the metadata says, and is not what it says. The tensor is written anew, over bytes that are kept.
STORED: dict[str, tuple[Callable[[], Any], str]] = {
    "another dtype": (lambda: torch.zeros(6, 8, dtype=torch.int32), r"found torch.int32 \[6, 8\] at \[0, 0\]"),
    "integers": (lambda: torch.zeros(6, 8, dtype=torch.int8), "found torch.int8 .* says torch.float32"),
    "another shape": (lambda: torch.zeros(8, 6), r"found torch.float32 \[8, 6\]"),
    "flat": (lambda: torch.zeros(48), r"found torch.float32 \[48\]"),
    "no tensor": (lambda: [1, 2], "no plain tensor"),
    "without values": (lambda: torch.zeros(6, 8, device="meta"), "no plain tensor"),
    "sparse": (lambda: torch.eye(6, 8).to_sparse(), "no plain tensor"),
    "code": (lambda: Runs(), "names posix.mkdir, which is no part of a tensor"),
    "older format": (lambda: None, "not a zip file"),
}


class Runs:
    """torch's weights-only loader refuses it."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("case", STORED)
def test_bytes_that_are_not_what_is_said(folder: Path, tmp_path: Path, monkeypatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    make, said = STORED[case]
    with (folder / "new").open("wb") as file:
        if case == "older format":
            torch.save(VALUES["matrix"], file, _use_new_zipfile_serialization=False)
        else:
            torch.save(make(), file)
    edit(folder, info("matrix", relative_path="new", offset=0, length=(folder / "new").stat().st_size))
    opened = TorchDistFolder(folder)
    with pytest.raises(ValueError, match=rf"matrix cannot be read from new .*{said}"):
        opened.read("matrix", (0, 0), (6, 8))
    assert not (tmp_path / "ran").exists()
    assert torch.equal(opened.read("half", (0, 0), (4, 3)), VALUES["half"])


@pytest.mark.parametrize("said", [torch.float16, torch.int8, torch.bool, torch.complex128, torch.float8_e4m3fn])
def test_a_dtype_that_is_not_the_one_that_is_stored(folder: Path, said: torch.dtype) -> None:
    edit(folder, dtype("half", said))
    with pytest.raises(ValueError, match=rf"half cannot be read from .* \(found torch.bfloat16 .* says {said}"):
        TorchDistFolder(folder).read("half", (0, 0), (4, 3))


def test_an_archive_that_unpacks_to_more_than_it_has(folder: Path) -> None:
    """A compressed one could fill the memory."""
    torch.save(torch.zeros(1000, 1000), folder / "plain")
    with zipfile.ZipFile(folder / "plain") as plain, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
        for member in plain.infolist():
            new.writestr(member.filename, plain.read(member))
    edit(folder, info("matrix", relative_path="new", offset=0, length=(folder / "new").stat().st_size))
    with pytest.raises(ValueError, match="bytes that unpack to 4"):
        TorchDistFolder(folder).read("matrix", (0, 0), (6, 8))


def test_the_common_state_is_weights_only(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"args": Namespace(a=1), "x": Runs()}, folder / "common.pt")
    with pytest.raises(ValueError, match=r"common\.pt: the common state .*names posix.mkdir"):
        TorchDistFolder(folder).common()
    assert not (tmp_path / "ran").exists()
    (folder / "common.pt").unlink()
    os.mkfifo(folder / "common.pt")
    with pytest.raises(ValueError, match=r"common\.pt: is a FIFO"):
        TorchDistFolder(folder).common()


# ------------------------------------------------------------------------------------------------------------- overlap


def stored(start: tuple[int, ...], shape: tuple[int, ...]) -> StoredChunk:
    return StoredChunk(start, shape, Span("f", 0, math.prod(shape)))


GRID = [stored((layer, row, col), (1, 3, 2)) for layer, row, col in product(range(4), (0, 3, 6), (0, 2, 4))]
# Around a middle, each beside the next: no cut across an axis separates them.
PINWHEEL = [stored((0, 0), (1, 2)), stored((0, 2), (2, 1)), stored((2, 1), (1, 2)), stored((1, 0), (2, 1))]
PINWHEEL.append(stored((1, 1), (1, 1)))


@pytest.mark.parametrize("chunks", [[], [stored((), ())], GRID, PINWHEEL, GRID[::-1]], ids=range(5))
def test_chunks_side_by_side(chunks: list[StoredChunk]) -> None:
    assert overlapping(chunks) is None


@pytest.mark.parametrize("chunks", [GRID, PINWHEEL, [stored((), ())]], ids=["grid", "pinwheel", "scalar"])
def test_one_more_chunk_always_overlaps(chunks: list[StoredChunk]) -> None:
    for chunk in chunks:
        sizes = [range(1, size + 1) for size in chunk.shape]
        for shape in product(*sizes):
            pair = overlapping([*chunks, replace_shape(chunk, shape)])
            assert pair is not None
            assert chunk.start in (pair[0].start, pair[1].start)


def replace_shape(chunk: StoredChunk, shape: tuple[int, ...]) -> StoredChunk:
    return chunk._replace(shape=shape)


def test_chunks_of_a_model_of_full_size_take_no_time() -> None:
    chunks = [stored((layer, expert, 0, 0), (1, 1, 8, 8)) for layer in range(62) for expert in range(256)]
    begun = time.monotonic()
    assert overlapping(chunks) is None
    assert overlapping([*chunks, stored((61, 255, 7, 7), (1, 1, 1, 1))]) is not None
    assert time.monotonic() - begun < 5
