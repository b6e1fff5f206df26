"""The format's law: whatever safetensors' own reader refuses is refused here, and the rest is read alike."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from bridge.huggingface.safetensors_header import DTYPES, TensorInfo, header_length, read_header

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b.weight": torch.zeros(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7, dtype=torch.uint8),
    "z.é": torch.zeros(3, 2, dtype=torch.float8_e4m3fn),
}
GOOD = save(TENSORS, metadata={"format": "pt"})


def read(data: bytes) -> dict[str, TensorInfo]:
    length = header_length(data[:8], len(data))
    return read_header(data[8 : 8 + length], len(data), "file")


def accepted_by_safetensors(data: bytes, folder: Path) -> dict[str, list[int]] | None:
    path = folder / "oracle.safetensors"
    path.write_bytes(data)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return None


def with_header(text: str | bytes, data: bytes | None = None) -> bytes:
    header = text if isinstance(text, bytes) else text.encode()
    (length,) = struct.unpack("<Q", GOOD[:8])
    return struct.pack("<Q", len(header)) + header + (GOOD[8 + length :] if data is None else data)


def entries() -> dict[str, Any]:
    (length,) = struct.unpack("<Q", GOOD[:8])
    return json.loads(GOOD[8 : 8 + length])


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    header = entries()
    change(header)
    return with_header(json.dumps(header))


ONE = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
FOUR = b"\0" * 4

BROKEN: dict[str, bytes] = {
    "empty": b"",
    "length alone": GOOD[:8],
    "header cut": GOOD[:50],
    "a byte less": GOOD[:-1],
    "a byte more": GOOD + b"\0",
    "a huge header": struct.pack("<Q", 2**40) + GOOD[8:],
    "no header could be so long": struct.pack("<Q", 2**63) + GOOD[8:],
    "not JSON": with_header("x" * 40),
    "not UTF-8": with_header(b'{"a\xff":{' + ONE.encode() + b"}}", FOUR),
    "byte order mark": with_header("\ufeff{" + f'"a":{{{ONE}}}}}', FOUR),
    "a list": with_header("[]", b""),
    "a number": with_header("7", b""),
    "text after it": with_header(f'{{"a":{{{ONE}}}}} x', FOUR),
    "control character": with_header(f'{{"a\x01":{{{ONE}}}}}', FOUR),
    "half a surrogate pair": with_header(f'{{"\\ud800":{{{ONE}}}}}', FOUR),
    "NaN": with_header(f'{{"a":{{{ONE},"x":NaN}}}}', FOUR),
    "a key twice": with_header(f'{{"a":{{{ONE},"dtype":"F32"}}}}', FOUR),
    "an escaped key twice": with_header(f'{{"a":{{{ONE},"dt\\u0079pe":"F32"}}}}', FOUR),
    "metadata twice": with_header(f'{{"a":{{{ONE}}},"__metadata__":{{}},"__metadata__":{{}}}}', FOUR),
    "metadata of numbers": changed(lambda h: h.update(__metadata__={"x": 1})),
    "metadata a list": changed(lambda h: h.update(__metadata__=["x"])),
    "nested deeply": with_header(f'{{"a":{{{ONE},"x":{"[" * 5000}{"]" * 5000}}}}}', FOUR),
    "no tensors but data": with_header("{}"),
    "entry null": changed(lambda h: h.update(a=None)),
    "entry a number": changed(lambda h: h.update(a=3)),
    "dtype missing": changed(lambda h: h["a"].pop("dtype")),
    "shape missing": changed(lambda h: h["a"].pop("shape")),
    "offsets missing": changed(lambda h: h["a"].pop("data_offsets")),
    "dtype unknown": changed(lambda h: h["a"].update(dtype="XX")),
    "dtype in small letters": changed(lambda h: h["a"].update(dtype="f32")),
    "dtype a list": changed(lambda h: h["a"].update(dtype=["F32"])),
    "shape a number": changed(lambda h: h["a"].update(shape=6)),
    "shape of fractions": changed(lambda h: h["a"].update(shape=[2.0, 3])),
    "shape of truth": changed(lambda h: h["scalar"].update(shape=[True])),
    "shape of text": changed(lambda h: h["a"].update(shape=["2", "3"])),
    "shape an object": changed(lambda h: h["a"].update(shape={"2": 3})),
    "shape negative": changed(lambda h: h["a"].update(shape=[-2, -3])),
    "shape too small": changed(lambda h: h["a"].update(shape=[2, 2])),
    "shape too large": changed(lambda h: h["a"].update(shape=[2, 4])),
    "shape past any memory": changed(lambda h: h["empty"].update(shape=[2**40, 2**40, 0])),
    "offsets negative": changed(lambda h: h["empty"].update(data_offsets=[-1, -1])),
    "three offsets": changed(lambda h: h["a"]["data_offsets"].append(9)),
    "one offset": changed(lambda h: h["a"]["data_offsets"].pop()),
    "offsets an object": changed(lambda h: h["a"].update(data_offsets={"0": 1, "1": 2})),
    "offsets fractions": changed(lambda h: h["a"].update(data_offsets=[0.0, 24.0])),
    "empty inside another": with_header(
        f'{{"a":{{{ONE}}},"b":{{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}}}', FOUR
    ),
    "two at one place": with_header(f'{{"a":{{{ONE}}},"b":{{{ONE}}}}}', FOUR),
    "a gap": with_header(f'{{"a":{{{ONE.replace("[0,4]", "[4,8]")}}}}}', FOUR * 2),
    "the last is missing": changed(lambda h: h.popitem()),
    "one is missing": changed(lambda h: h.pop("b.weight")),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_safetensors_refuses_is_refused(data: bytes, tmp_path: Path):
    assert accepted_by_safetensors(data, tmp_path) is None
    with pytest.raises(ValueError, match=r"truncated or not a safetensors file \(|has dtype"):
        read(data)


STRICTER = {
    "a tensor twice": with_header(f'{{"a":{{{ONE}}},"a":{{{ONE}}}}}', FOUR),
    "an unknown key": with_header(f'{{"a":{{{ONE},"x":1}}}}', FOUR),
    "a list for an object": with_header('{"a":["F32",[1],[0,4]]}', FOUR),
    "a dtype that torch has not": with_header(f'{{"a":{{{ONE.replace("F32", "F4").replace("[1]", "[8]")}}}}}', FOUR),
}


@pytest.mark.parametrize("data", STRICTER.values(), ids=STRICTER)
def test_what_could_be_misread_is_refused_too(data: bytes, tmp_path: Path):
    assert accepted_by_safetensors(data, tmp_path) is not None
    with pytest.raises(ValueError, match=r"truncated or not a safetensors file \(|has dtype"):
        read(data)


FINE = {
    "as it was written": GOOD,
    "blanks around it": with_header("  " + json.dumps(entries()) + "\n\t "),
    "escapes": with_header(json.dumps(entries(), ensure_ascii=True)),
    "pairs of surrogates": with_header(f'{{"\\ud83d\\ude00":{{{ONE}}}}}', FOUR),
    "without metadata": changed(lambda h: h.pop("__metadata__")),
    "metadata null": changed(lambda h: h.update(__metadata__=None)),
    "another order": with_header(json.dumps(dict(reversed(entries().items())))),
    "nothing in it": with_header("{}", b""),
    "names that look like keys": with_header(f'{{"dtype":{{{ONE}}}}}', FOUR),
}


@pytest.mark.parametrize("data", FINE.values(), ids=FINE)
def test_what_safetensors_reads_is_read_alike(data: bytes, tmp_path: Path):
    shapes = accepted_by_safetensors(data, tmp_path)
    found = read(data)
    assert {name: list(info.shape) for name, info in found.items()} == shapes
    for name, info in found.items():
        if name in TENSORS:
            whole = TENSORS[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert info.dtype == TENSORS[name].dtype
            assert data[info.offset : info.offset + info.nbytes] == whole


def test_headers_of_random_changes(tmp_path: Path):
    """A byte of the header is changed, removed or doubled, 3,000 times: nothing is read that safetensors refuses."""
    generator = random.Random(0)
    (length,) = struct.unpack("<Q", GOOD[:8])
    agreed = 0
    for _ in range(3000):
        header = bytearray(GOOD[8 : 8 + length])
        at = generator.randrange(len(header))
        kind = generator.randrange(3)
        if kind == 0:
            header[at] = generator.choice(b'0123456789[]{}",:-e.\\ \x00\xffaF')
        elif kind == 1:
            del header[at]
        else:
            header.insert(at, header[at])
        data = with_header(bytes(header))
        shapes = accepted_by_safetensors(data, tmp_path)
        try:
            found = {name: list(info.shape) for name, info in read(data).items()}
        except ValueError:
            found = None
        assert found is None or found == shapes or b"-0" in header, bytes(header)
        agreed += found == shapes
    assert agreed > 2900


def test_every_dtype_that_torch_and_the_format_have(tmp_path: Path):
    tensors = {code: torch.zeros(3, 2, dtype=dtype) for code, dtype in DTYPES.items()}
    assert {code: (info.dtype, info.shape) for code, info in read(save(tensors)).items()} == {
        code: (dtype, (3, 2)) for code, dtype in DTYPES.items()
    }
