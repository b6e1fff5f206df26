"""A bit flipped in a written checkpoint, and what reading then says; in a process without test-time type checks."""

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import torch
from torch.distributed.checkpoint import FileSystemReader

from bridge.huggingface.companions import companions
from bridge.huggingface.safetensors_folder import SafetensorsFolder
from bridge.torch_dist.checkpoint import MegatronCheckpoint
from bridge.torch_dist.reader import TorchDistFolder, iteration_folder
from reference.names import all_names
from reference.weights import Dialect
from support.faults import flip


class Unnoticed(NamedTuple):
    """A flipped bit without effect."""

    file: str
    at: int
    in_a_tensor: bool


class Flips(NamedTuple):
    """What became of the flipped bits."""

    files: int
    refused: int
    differing: int
    unnoticed: list[Unnoticed]


def flip_and_read(direction: str, folder: Path) -> Flips:
    """In every file of what an import or export wrote: two bits anywhere, three in tensors."""
    chance = random.Random(direction)
    contents = {"import": torch_dist_contents, "export": hf_contents}[direction]
    right, unnoticed, refused, differing = contents(folder), [], 0, 0
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        data = path.read_bytes()
        inside = tensor_bytes(path)
        places = [chance.randrange(len(data)) for _ in range(2)]
        places += [chance.choice(chance.choice(inside)) for _ in range(3) if inside]
        for at in places:
            flip(path, at, chance.randrange(8))
            try:
                if contents(folder) == right:
                    in_a_tensor = any(at in span for span in inside)
                    unnoticed.append(Unnoticed(str(path.relative_to(folder)), at, in_a_tensor))
                else:
                    differing += 1
            except ValueError:
                refused += 1
            path.write_bytes(data)
    return Flips(len(files), refused, differing, unnoticed)


def tensor_bytes(path: Path) -> list[range]:
    """Where the tensors' own bytes lie in a file."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return [range(8 + int.from_bytes(data[:8], "little"), len(data))]
    if path.suffix != ".distcp":
        return []
    stored = FileSystemReader(path.parent).read_metadata().storage_data.values()
    here = [info for info in stored if info.relative_path == path.name]
    return [span for info in here for span in storages(data[info.offset : info.offset + info.length], info.offset)]


def storages(archive: bytes, offset: int) -> Iterator[range]:
    """torch.save's zip archive holds a tensor's bytes, uncompressed, as `archive/data/0`."""
    with ZipFile(io.BytesIO(archive)) as opened:
        for member in opened.infolist():
            if "/data/" in member.filename and member.file_size:
                head = member.header_offset
                name, extra = (int.from_bytes(archive[head + at : head + at + 2], "little") for at in (26, 28))
                begin = offset + head + 30 + name + extra
                yield range(begin, begin + member.file_size)


def torch_dist_contents(folder: Path) -> dict[str, object]:
    """Everything that can be read of it, the bytes of tensors and of the files beside."""
    opened = TorchDistFolder(folder)
    found: dict[str, object] = {"common": repr(opened.common()), "tracker": iteration_folder(folder).name}
    weights = MegatronCheckpoint(folder)
    for name in all_names(weights.config, Dialect.HF_DISK):
        value = weights.read_weight(name)
        found[name] = (value.dtype, value.shape, value.contiguous().view(torch.uint8).numpy().tobytes())
    beside = [opened.folder / "metadata.json", *(folder / "hugging_face").iterdir()]
    return found | {path.name: path.read_bytes() for path in beside}


def hf_contents(folder: Path) -> dict[str, object]:
    with SafetensorsFolder(folder) as opened:
        found: dict[str, object] = {"config": (folder / "config.json").read_bytes(), "metadata": opened.metadata}
        found |= {str(path): (folder / path).read_bytes() for path in companions(folder).carried}
        for name, info in opened.tensors.items():
            found[name] = (info.dtype, info.shape, opened.read(name).view(-1).view(torch.uint8).numpy().tobytes())
        return found
