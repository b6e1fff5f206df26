"""The header of a safetensors file: which tensors it holds, and where; and the format's law, every rule of it.

    8 bytes: the length of the header | the header, JSON: {name: {dtype, shape, data_offsets}} | the tensors' bytes

Source: the safetensors crate, `SafeTensors::read_metadata` and `Metadata::validate`. Its own reader does not say where
in the file a tensor lies, so this one reads the header, and reads it once.
"""

import json
import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_HEADER_BYTES = 100_000_000
_KEYS = ("dtype", "shape", "data_offsets")
_LIMIT = 2**64
_INT = {int}  # not bool


class TensorInfo(NamedTuple):
    """What a header says of one tensor; `offset` is its first byte in `file`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_length(start: bytes, file_bytes: int) -> int:
    """The length of the header, from a file's first 8 bytes and its size.

    Raises:
        ValueError: the file is too short for it, or no header is so long.
    """
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(file_bytes - 8, MOST_HEADER_BYTES):
        raise _not_safetensors(f"{file_bytes} bytes that begin with {start!r}")
    return length


def read_header(header: bytes, file_bytes: int, file: str) -> dict[str, TensorInfo]:
    """The tensors of a file of this header and size, in the header's order.

    Raises:
        ValueError: the header breaks the format's law (JSON, an entry's keys and types, as many bytes as its dtype and
            shape ask for, no gap, no overlap, nothing past the end), or has a dtype that is not read here.
    """
    data = 8 + len(header)
    entries = _entries(header)
    tensors = {name: _tensor(name, entry, file, data) for name, entry in entries.items()}
    spans = sorted(entry["data_offsets"] for entry in entries.values())
    for (_, end), (start, _) in pairwise([(0, 0), *spans, (file_bytes - data, file_bytes - data)]):
        if start != end:
            raise _not_safetensors(f"found byte {start} of the data where byte {end} comes next")
    return tensors


def _tensor(name: str, entry: Any, file: str, data: int) -> TensorInfo:
    """One entry; `data` is where the tensors begin."""
    try:
        code, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [first, last, *shape]
        if len(entry) != len(_KEYS) or type(shape) is not list or set(map(type, sizes)) != _INT:
            raise TypeError
    except (KeyError, TypeError, ValueError) as error:
        raise _not_safetensors(f"{name}: found {entry!r}, expected dtype, shape and data_offsets") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{name} has dtype {code}, expected one of {', '.join(DTYPES)}")
    info = TensorInfo(DTYPES[code], tuple(shape), file, data + first)
    if min(sizes) < 0 or last - first != info.nbytes or (last == first and math.prod(filter(None, shape)) >= _LIMIT):
        raise _not_safetensors(f"{name}: {code} {shape} at bytes {[first, last]}")
    return info


def _entries(header: bytes) -> dict[str, Any]:
    """The header's JSON without `__metadata__`."""
    try:
        text = header.decode()
        entries = json.loads(text, parse_constant=_refuse)
        # Twice the same key would be one here; looked for only where there can be one, since that costs as much again.
        if not isinstance(entries, dict):
            raise ValueError("not a JSON object")
        if "\\" in text or any(text.count(f'"{key}"') > count for key, count in _most(entries).items()):
            json.loads(text, object_pairs_hook=_once)
            json.dumps(entries, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(str(error)) from error
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and (
        not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values())
    ):
        raise _not_safetensors(f"__metadata__ is {metadata!r}, expected strings by name")
    return entries


def _most(entries: dict[str, Any]) -> dict[str, int]:
    """How often a key occurs where none comes twice."""
    return dict.fromkeys(_KEYS, len(entries)) | {"__metadata__": 1}


def _not_safetensors(what: str) -> ValueError:
    return ValueError(f"truncated or not a safetensors file ({what}); download it again")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key comes twice in {[key for key, _ in pairs]}")
    return found
