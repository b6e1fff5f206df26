"""Distributed checkpoints on disk: torch's own loader reads what is written, and any rectangle comes back."""

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from bridge.huggingface.random_checkpoint import SMALL_CONFIG
from bridge.torch_dist.reader import TorchDistFolder, iteration_folder
from bridge.torch_dist.writer import COMMON_STATE, Chunk, extra_state_keys, finish, write_chunks, write_states
from reference.config import ModelConfig

CONFIG = ModelConfig.from_hf(SMALL_CONFIG | {"num_hidden_layers": 2, "num_local_experts": 4})
COMMON = {"args": Namespace(num_layers=2, params_dtype=torch.bfloat16), "iteration": 3}

# A stack of layers and experts in bands of rows, a matrix in quarters, a vector.
GENERATOR = torch.Generator().manual_seed(0)
VALUES = {
    "experts": torch.randn(2, 3, 7, 5, generator=GENERATOR).to(torch.bfloat16),
    "matrix": torch.randn(6, 8, generator=GENERATOR),
    "vector": torch.arange(9),
}


def cut(key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return VALUES[key][tuple(slice(i, i + size) for i, size in zip(start, shape, strict=True))]


def chunk(key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> Chunk:
    return Chunk(key, start, shape, tuple(VALUES[key].shape), VALUES[key].dtype)


BANDS = ((0, 3), (3, 3), (6, 1))
UNITS = [
    [chunk("experts", (0, e, row, 0), (1, 1, rows, 5)) for e in range(3) for row, rows in BANDS],
    [chunk("experts", (1, e, row, 0), (1, 1, rows, 5)) for e in range(3) for row, rows in BANDS],
    [chunk("matrix", (row, col), (3, 4)) for row in (0, 3) for col in (0, 4)] + [chunk("vector", (0,), (9,))],
]


def write(folder: Path, order: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    folder.mkdir()
    stored = {}
    for unit in order:
        if unit == len(UNITS):
            stored[unit] = write_states(folder, unit, CONFIG, COMMON)
        else:
            stored[unit] = write_chunks(folder, unit, [(c, partial(cut, *c[:3])) for c in UNITS[unit]])
    finish(folder, [c for unit in UNITS for c in unit], [s for unit in sorted(stored) for s in stored[unit]])
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("torch_dist") / "ck")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------------------------- writing


def test_torch_loads_it(written: Path) -> None:
    found = {key: torch.full_like(value, -1) for key, value in VALUES.items()}
    dcp.load(found, storage_reader=FileSystemReader(written), no_dist=True)
    for key, value in VALUES.items():
        assert torch.equal(found[key], value), key


def test_the_same_bytes_every_time_in_whatever_order_and_folder(written: Path, tmp_path: Path) -> None:
    again = files(write(tmp_path / "elsewhere", order=(3, 1, 0, 2)))
    assert again == files(written)
    assert set(again) == {".metadata", "metadata.json", *(f"__{unit}_0.distcp" for unit in range(4))}
    assert again["metadata.json"] == b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'


def test_values_are_made_one_at_a_time(tmp_path: Path) -> None:
    """When its turn comes, and not before what came earlier is in the file."""
    sizes = []

    def make(c: Chunk) -> Tensor:
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        return torch.zeros(c.shape, dtype=c.dtype)

    chunks = [Chunk("w", (i, 0), (1, 100_000), (8, 100_000), torch.float32) for i in range(8)]
    write_chunks(tmp_path, 0, [(c, partial(make, c)) for c in chunks])
    assert len(sizes) == 8
    assert all(size >= 400_000 * i for i, size in enumerate(sizes))


def test_files_get_the_rights_the_umask_allows(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        folder = write(tmp_path / "ck")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


# As megatron-core saves them from the Transformer Engine spec (H200; megatron-core 0.19.2, Transformer Engine 2.20).
EXTRA_STATES_SEEN = {
    *(f"decoder.layers.self_attention.linear_proj._extra_state/shard_{i}_2" for i in range(2)),
    *(f"decoder.layers.self_attention.linear_qkv._extra_state/shard_{i}_2" for i in range(2)),
    *(f"decoder.layers.pre_mlp_layernorm._extra_state/shard_{i}_2" for i in range(2)),
    *(
        f"decoder.layers.mlp.experts.experts.{name}._extra_state/shard_{i}.{e}_2.4"
        for name in ("linear_fc1", "linear_fc2")
        for i in range(2)
        for e in range(4)
    ),
    "decoder.final_layernorm._extra_state/shard_0_1",
}


def test_extra_states_are_those_of_transformer_engine(written: Path) -> None:
    keys = list(extra_state_keys(CONFIG))
    assert set(keys) == EXTRA_STATES_SEEN
    assert len(keys) == len(EXTRA_STATES_SEEN)
    metadata = FileSystemReader(written).read_metadata()
    assert set(metadata.state_dict_metadata) == {*VALUES, *EXTRA_STATES_SEEN, COMMON_STATE}


# -------------------------------------------------------------------------------------------------------------- reading


def test_any_rectangle_comes_back(written: Path) -> None:
    checkpoint = TorchDistFolder(written)
    assert checkpoint.shapes == {key: tuple(value.shape) for key, value in VALUES.items()}
    assert {key: checkpoint.dtype(key) for key in VALUES} == {key: value.dtype for key, value in VALUES.items()}
    assert [checkpoint.nbytes(key) for key in VALUES] == [value.numel() * value.itemsize for value in VALUES.values()]
    rectangles = [("experts", (i, e, r, 0), (1, 1, 7 - r, 5)) for i in range(2) for e in range(3) for r in range(7)]
    rectangles += [("experts", (1, 2, 2, 1), (1, 1, 3, 2))]
    rectangles += [("matrix", (r, c), (h, w)) for r in range(3) for c in range(4) for h in (1, 3) for w in (1, 4)]
    rectangles += [("matrix", (0, 0), (6, 8)), ("vector", (2,), (5,)), ("vector", (0,), (9,))]
    for key, start, shape in rectangles:
        assert torch.equal(checkpoint.read(key, start, shape), cut(key, start, shape)), (key, start, shape)


def test_chunks_of_one_row(tmp_path: Path) -> None:
    """Such an axis could be one of layers; several of its rows are read all the same."""
    rows = [chunk("matrix", (row, 0), (1, 8)) for row in range(6)]
    finish(tmp_path, rows, write_chunks(tmp_path, 0, [(c, partial(cut, *c[:3])) for c in rows]))
    checkpoint = TorchDistFolder(tmp_path)
    for start, shape in [((0, 0), (6, 8)), ((1, 2), (3, 5)), ((4, 0), (1, 8))]:
        assert torch.equal(checkpoint.read("matrix", start, shape), cut("matrix", start, shape))


def test_the_common_state(written: Path, tmp_path: Path) -> None:
    assert TorchDistFolder(written).common() == COMMON
    older = Path(shutil.copytree(written, tmp_path / "older"))  # megatron-core kept it in a file of its own
    torch.save({"iteration": 7}, older / "common.pt")
    assert TorchDistFolder(older).common() == {"iteration": 7}
    (tmp_path / "none").mkdir()
    stored = write_chunks(tmp_path / "none", 0, [(c, partial(cut, *c[:3])) for c in UNITS[2]])
    finish(tmp_path / "none", UNITS[2], stored)
    assert TorchDistFolder(tmp_path / "none").common() == {}


@pytest.mark.parametrize(("text", "name"), [("12\n", "iter_0000012"), ("release", "release")])
def test_the_tracker_names_the_iteration(written: Path, tmp_path: Path, text: str, name: str) -> None:
    shutil.copytree(written, tmp_path / name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert iteration_folder(tmp_path) == iteration_folder(tmp_path / name) == tmp_path / name
    assert torch.equal(TorchDistFolder(tmp_path).read("vector", (0,), (9,)), VALUES["vector"])


def spoil_tracker(folder: Path, text: str) -> None:
    folder.rename(folder.with_name("inner"))
    folder.mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text(text)


def drop_chunk(folder: Path) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["matrix"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def cut_file(folder: Path) -> None:
    (folder / "__2_0.distcp").write_bytes((folder / "__2_0.distcp").read_bytes()[:100])


def overwrite_file(folder: Path) -> None:
    size = (folder / "__2_0.distcp").stat().st_size
    (folder / "__2_0.distcp").write_bytes(b"\xff" * size)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a checkpoint": (lambda ck: (ck / ".metadata").unlink(), "neither .metadata nor latest_checkpointed_iteration"),
    "tracker is garbage": (partial(spoil_tracker, text="../../etc"), r"found '../../etc', expected an iteration"),
    "iteration is not there": (partial(spoil_tracker, text="5"), "names this iteration and it has no .metadata"),
    "metadata cut": (
        lambda ck: (ck / ".metadata").write_bytes((ck / ".metadata").read_bytes()[:99]),
        r"\.metadata: cannot be read",
    ),
    "metadata of something else": (
        lambda ck: (ck / ".metadata").write_bytes(pickle.dumps([1, 2])),
        r"\.metadata: cannot be read",
    ),
    "file cut": (cut_file, r"__2_0.distcp: matrix is said to be \d+ bytes from byte 0, and the file has 100"),
    "file gone": (lambda ck: (ck / "__1_0.distcp").unlink(), r"__1_0.distcp: .metadata names this file"),
}
DAMAGES_SEEN_ON_READING: dict[str, tuple[Callable[[Path], object], str]] = {
    "chunk gone": (drop_chunk, r"the chunks of matrix do not cover \[6, 8\] from \[0, 0\]"),
    "file overwritten": (overwrite_file, "matrix cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_refused_on_opening(written: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "ck"))
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        TorchDistFolder(folder)


@pytest.mark.parametrize("damage", DAMAGES_SEEN_ON_READING)
def test_refused_on_reading(written: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "ck"))
    spoil, message = DAMAGES_SEEN_ON_READING[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        TorchDistFolder(folder).read("matrix", (0, 0), (6, 8))


@pytest.mark.parametrize("change", ["touched", "gone"])
def test_a_file_that_changes_after_opening_is_named(written: Path, tmp_path: Path, change: str) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "ck"))
    checkpoint = TorchDistFolder(folder)
    file = folder / "__2_0.distcp"
    if change == "touched":
        os.utime(file, ns=(0, 0))
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"matrix|__2_0.distcp: changed while matrix was read"):
        checkpoint.read("matrix", (0, 0), (6, 8))
    assert torch.equal(checkpoint.read("experts", (0, 0, 0, 0), (1, 1, 7, 5)), VALUES["experts"][:1, :1])
