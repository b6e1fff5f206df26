"""Hugging Face files: what comes back is what was planned and handed over, and safetensors itself reads it."""

import json
import math
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.huggingface import writer
from bridge.huggingface.companions import companions
from bridge.huggingface.safetensors_folder import CONFIG_NAME, INDEX_NAME, SafetensorsFolder
from bridge.huggingface.safetensors_header import DTYPES
from bridge.huggingface.writer import FilePlan, TensorPlan, finish_folder, plan_files, write_file

U8, F32 = torch.uint8, torch.float32


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(U8).numpy().tobytes()


def planned(tensor: Tensor) -> TensorPlan:
    return TensorPlan(tensor.dtype, tuple(tensor.shape))


def write_folder(folder: Path, tensors: dict[str, Tensor], config: Any = None, **options: Any) -> list[FilePlan]:
    folder.mkdir(exist_ok=True)
    files = plan_files([{name: planned(tensor)} for name, tensor in tensors.items()], **options)
    for plan in files:
        write_file(folder, plan, ((name, tensors[name]) for name in plan.tensors))
    finish_folder(folder, files, config or {})
    return files


def all_values(dtype: torch.dtype) -> Tensor:
    """Every bit pattern of one or two bytes, repeated to fill wider dtypes; False and True."""
    if dtype == torch.bool:
        return torch.tensor([[False, True]])
    width = dtype.itemsize
    patterns = torch.arange(256, dtype=U8) if width == 1 else torch.arange(-(2**15), 2**15).to(torch.int16)
    return patterns.view(U8).reshape(-1, min(width, 2)).repeat(1, max(width // 2, 1)).view(dtype).reshape(16, -1)


# ------------------------------------------------------------------------------------------------------ what comes back


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    wanted = {f"model.{name}": all_values(dtype) for name, dtype in DTYPES.items()}
    wanted |= {"scalar": torch.tensor(-0.0, dtype=torch.bfloat16), "no rows": torch.empty(0, 7)}
    wanted |= {"no columns": torch.empty(3, 0), 'quoted "name" é': torch.ones(2)}
    assert wanted["model.BF16"].isnan().sum() == 2 * 127, "every NaN payload of bfloat16"
    assert wanted["model.F8_E4M3"].isnan().sum() == 2
    files = write_folder(tmp_path / "out", wanted, max_shard_bytes=100_000)
    assert len(files) > 1
    theirs: dict[str, Tensor] = {}
    for plan in files:
        theirs |= load_file(tmp_path / "out" / plan.file)
    with SafetensorsFolder(tmp_path / "out") as checkpoint:
        assert checkpoint.tensors.keys() == theirs.keys() == wanted.keys()
        for name, tensor in wanted.items():
            for found in (theirs[name], checkpoint.read(name)):
                assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
                assert bytes_of(found) == bytes_of(tensor), name


def test_the_data_are_aligned_and_the_header_says_what_safetensors_own_writer_says(tmp_path: Path) -> None:
    for length in range(1, 10):  # names of all lengths: the blanks that fill up the header
        tensors = {"n" * length: torch.arange(6.0).view(2, 3)}
        (plan,) = write_folder(tmp_path / str(length), tensors)
        ours = (tmp_path / str(length) / plan.file).read_bytes()
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        theirs = (tmp_path / "theirs").read_bytes()
        sizes = [int.from_bytes(data[:8], "little") for data in (ours, theirs)]
        assert sizes[0] % 8 == 0
        assert [json.loads(data[8 : 8 + size]) for data, size in zip((ours, theirs), sizes, strict=True)] == [
            {"__metadata__": {"format": "pt"}, "n" * length: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
        ] * 2
        assert ours[8 + sizes[0] :] == theirs[8 + sizes[1] :]


def test_a_checkpoint_read_and_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((i + 1,), i, dtype=torch.float8_e4m3fn) for i in range(20)}
    (tmp_path / "config").write_bytes(b'{ "odd":   "spacing" }')
    write_folder(tmp_path / "one", tensors, tmp_path / "config", max_shard_bytes=64)
    with SafetensorsFolder(tmp_path / "one") as source:
        again = {name: source.read(name) for name in tensors}
    write_folder(tmp_path / "two", again, tmp_path / "one" / CONFIG_NAME, max_shard_bytes=64)
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("one", "two")]
    assert files[0] == files[1]
    assert files[0][CONFIG_NAME] == b'{ "odd":   "spacing" }'


def test_views_are_written_as_they_look(tmp_path: Path) -> None:
    """Overlapping views, a tied weight, a transpose, a gradient leaf: safetensors' own writer refuses some."""
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "rows": matrix[:2],
        "overlapping rows": matrix[1:],
        "tied": matrix[:2],
        "transposed": matrix.T,
        "strided": matrix[:, ::2],
        "expanded": matrix[0].expand(2, 4),
        "parameter": torch.nn.Parameter(matrix.clone()),
    }
    (plan,) = write_folder(tmp_path / "out", tensors)
    found = load_file(tmp_path / "out" / plan.file)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach()), name


# ------------------------------------------------------------------------------------------------------------- planning


def test_names_index_and_file_sizes(tmp_path: Path) -> None:
    sizes = {"z": 3, "big": 50, "c": 4, "d": 6, "e": 1}  # 10 bytes a file: [z] [big] [c d] [e]
    tensors = {name: torch.zeros(size, dtype=U8) for name, size in sizes.items()}
    write_folder(tmp_path / "out", tensors, {"zeta": 1, "alpha": "é"}, max_shard_bytes=10)
    files = {name: f"model-0000{n}-of-00004.safetensors" for name, n in zip(sizes, [1, 2, 3, 3, 4], strict=True)}
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert index == {"metadata": {"total_size": 64}, "weight_map": files}
    assert list(index["weight_map"]) == sorted(sizes)
    assert list(json.loads((tmp_path / "out" / CONFIG_NAME).read_text()).items()) == [("zeta", 1), ("alpha", "é")]
    assert set(os.listdir(tmp_path / "out")) == {*files.values(), CONFIG_NAME, INDEX_NAME}
    for file in files.values():
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert set(shard.keys()) == {name for name in sizes if files[name] == file}


def test_a_group_stays_in_one_file() -> None:
    """As a weight and its scales do: a reader of one file can dequantise it."""
    groups = [
        {f"w{i}": TensorPlan(U8, (size,)), f"s{i}": TensorPlan(F32, (1,))} for i, size in enumerate((4, 1, 20, 4))
    ]
    files = plan_files(groups, max_shard_bytes=13)
    assert [list(plan.tensors) for plan in files] == [["w0", "s0", "w1", "s1"], ["w2", "s2"], ["w3", "s3"]]
    assert [plan.file[6:11] for plan in files] == ["00001", "00002", "00003"]


def test_what_cannot_be_planned_is_named() -> None:
    one = TensorPlan(F32, (1,))
    with pytest.raises(ValueError, match="no tensor to write"):
        plan_files([])
    with pytest.raises(ValueError, match="a: planned twice"):
        plan_files([{"a": one}, {"b": one}, {"a": one}], max_shard_bytes=4)
    with pytest.raises(ValueError, match=r"c: is torch\.complex128, expected .*torch\.bfloat16"):
        plan_files([{"c": TensorPlan(torch.complex128, (1,))}])


# ---------------------------------------------------------------------------------------------------- one file's stream


def one_file(**tensors: TensorPlan) -> FilePlan:
    (plan,) = plan_files([tensors])
    return plan


def test_bands_add_up(tmp_path: Path) -> None:
    tensor, vector = torch.arange(35.0).view(7, 5), torch.arange(4)
    plan = one_file(a=planned(tensor), v=planned(vector), empty=TensorPlan(F32, (0, 5)), z=planned(tensor[:1]))
    bands = [("a", tensor[0:3]), ("a", tensor[3:4]), ("a", tensor[4:7])]
    write_file(
        tmp_path,
        plan,
        iter([*bands, ("v", vector[:1]), ("v", vector[1:]), ("empty", tensor[:0]), ("z", tensor[:1])]),
    )
    found = load_file(tmp_path / plan.file)
    assert torch.equal(found["a"], tensor)
    assert torch.equal(found["v"], vector)
    assert found["empty"].shape == (0, 5)


MATRIX = torch.zeros(4, 3)
WRONG: dict[str, tuple[list[tuple[str, Tensor]], str]] = {
    "another order": (
        [("b", torch.zeros(2)), ("a", MATRIX)],
        r"found b as torch.float32 \[2\], expected a as .* \[4, 3\]",
    ),
    "another dtype": ([("a", MATRIX.double())], r"found a as torch.float64 \[4, 3\], expected a as torch.float32"),
    "too many columns": ([("a", torch.zeros(4, 4))], r"found a as torch.float32 \[4, 4\], expected a as .* \[4, 3\]"),
    "as many values": ([("a", torch.zeros(3, 4))], r"found a as torch.float32 \[3, 4\], expected a as .* \[4, 3\]"),
    "another rank": ([("a", torch.zeros(12))], r"found a as torch.float32 \[12\], expected a as .* \[4, 3\]"),
    "too many rows": ([("a", torch.zeros(5, 3))], r"found a as torch.float32 \[5, 3\], expected a as .* \[4, 3\]"),
    "a band too many": ([("a", MATRIX[:3]), ("a", MATRIX[:2])], r"found a as torch.float32 \[2, 3\], expected a as"),
    "a band too few": ([("a", MATRIX[:3]), ("b", torch.zeros(2))], r"found b as torch.float32 \[2\], expected a as"),
    "a band without rows": ([("a", MATRIX[:0]), ("a", MATRIX[:3])], "a was planned and did not come whole"),
    "no rows": ([("a", MATRIX), ("b", torch.zeros(0))], "b was planned and did not come whole"),
    "ends inside a tensor": ([("a", MATRIX[:2])], "a was planned and did not come whole"),
    "a tensor too few": ([("a", MATRIX)], "b was planned and did not come whole"),
    "a tensor too many": ([("a", MATRIX), ("b", torch.zeros(2)), ("c", MATRIX)], "found c as .*expected nothing more"),
    "nothing": ([], "a was planned and did not come whole"),
}


@pytest.mark.parametrize("stream", WRONG)
def test_a_stream_that_is_not_as_planned_leaves_no_file(tmp_path: Path, stream: str) -> None:
    tensors, message = WRONG[stream]
    plan = one_file(a=planned(MATRIX), b=TensorPlan(F32, (2,)))
    with pytest.raises(ValueError, match=f"^{plan.file}: {message}"):
        write_file(tmp_path, plan, iter(tensors))
    assert os.listdir(tmp_path) == []


def test_an_error_while_a_tensor_is_made_leaves_no_file(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", MATRIX
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path, one_file(a=planned(MATRIX), b=planned(MATRIX)), tensors())
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published folder must not hold the half-written file of an earlier run, whatever process wrote it."""
    plan = one_file(a=planned(MATRIX))
    seen: list[str] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        seen.extend(os.listdir(tmp_path))
        yield "a", MATRIX

    write_file(tmp_path, plan, tensors())
    (unnamed,) = seen
    (tmp_path / unnamed).write_bytes(b"x" * 10_000)
    monkeypatch.setattr(os, "getpid", lambda: 1)  # another process
    write_file(tmp_path, plan, iter([("a", MATRIX + 1)]))
    assert os.listdir(tmp_path) == [plan.file]
    assert torch.equal(load_file(tmp_path / plan.file)["a"], MATRIX + 1)


def test_memory_holds_two_tensors_at_most(tmp_path: Path) -> None:
    """The one being written, and the next while it is made."""
    plan = one_file(**{f"t{i}": TensorPlan(U8, (100_000,)) for i in range(10)})
    alive: list[weakref.ref] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for i, name in enumerate(plan.tensors):
            made = torch.full((100_000,), i, dtype=U8)
            alive.append(weakref.ref(made))
            assert sum(ref() is not None for ref in alive) <= 2
            yield name, made
            del made
            on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
            assert on_disk >= 100_000 * i, "written when it came, but for a buffer"

    write_file(tmp_path, plan, tensors())
    assert load_file(tmp_path / plan.file)["t9"].eq(9).all()


# ------------------------------------------------------------------------------------------------------- a whole folder


def test_carried_files(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    out.mkdir()
    source.write_bytes(b"\x00\xff")
    files = plan_files([{"a": planned(MATRIX)}])
    write_file(out, files[0], iter([("a", MATRIX)]))
    finish_folder(out, files, {}, carried={"chat_templates/a.jinja": source, "tokenizer.json": source})
    assert companions(out).carried == [Path("chat_templates/a.jinja"), Path("tokenizer.json")]
    assert (out / "chat_templates/a.jinja").read_bytes() == (out / "tokenizer.json").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("name", ["../f", "/f", "a/../../f", "", CONFIG_NAME, INDEX_NAME, "x.safetensors"])
def test_a_carried_name_that_is_not_free_is_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.write_text("x")
    (tmp_path / "out").mkdir()
    files = plan_files([{"a": planned(MATRIX)}])
    write_file(tmp_path / "out", files[0], iter([("a", MATRIX)]))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/out: cannot carry .* as '{name}'"):
        finish_folder(tmp_path / "out", files, {}, carried={name: source})
    assert os.listdir(tmp_path / "out") == [files[0].file]
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_files_get_the_rights_the_umask_allows(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("x")
    private.chmod(0o600)
    umask = os.umask(0o027)
    try:
        (tmp_path / "out").mkdir()
        files = plan_files([{"a": planned(MATRIX)}])
        write_file(tmp_path / "out", files[0], iter([("a", MATRIX)]))
        finish_folder(tmp_path / "out", files, {}, carried={"sub/carried": private})
    finally:
        os.umask(umask)
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(paths) == 4
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert modes.pop("carried") == 0o600
    assert set(modes.values()) == {0o640}


def test_every_file_is_on_the_disk_before_it_has_its_name_and_the_index_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Any]] = []
    rename, fsync = Path.rename, os.fsync

    def record_rename(old: Path, new: Path) -> Path:
        done.append(("rename", new.name))
        assert ("fsync", old.stat().st_ino, old.stat().st_size) in done, f"{old} was not on the disk"
        return rename(old, new)

    def record_fsync(handle: int) -> None:
        found = os.fstat(handle)
        done.append(("fsync", found.st_ino, found.st_size))
        fsync(handle)

    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(writer.os, "fsync", record_fsync)
    source = tmp_path / "source"
    source.write_text("carried")
    out = tmp_path / "out"
    out.mkdir()
    files = plan_files([{"a": planned(MATRIX)}, {"b": planned(MATRIX)}], max_shard_bytes=1)
    for plan in files:
        write_file(out, plan, ((name, MATRIX) for name in plan.tensors))
    finish_folder(out, files, {}, carried={"carried": source})
    assert [name for kind, name, *_ in done if kind == "rename"] == [
        *(plan.file for plan in files),
        CONFIG_NAME,
        INDEX_NAME,
    ]
    carried = (out / "carried").stat()
    assert done.index(("fsync", carried.st_ino, carried.st_size)) < done.index(("rename", CONFIG_NAME))


def test_total_size_counts_bytes() -> None:
    plan = TensorPlan(torch.bfloat16, (3, 5, 7))
    assert plan.nbytes == math.prod(plan.shape) * 2 == 210
    assert TensorPlan(F32, ()).nbytes == 4
