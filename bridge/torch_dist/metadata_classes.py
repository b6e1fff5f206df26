"""The names that a `.metadata` file may use, and what each of them is when it is read as data.

Sources: torch.distributed.checkpoint.metadata, .planner and .filesystem (torch 2.0 to 2.14). megatron-core adds the
plans of all ranks as an attribute `all_local_plans`, and in older versions `mcore_data` and a plan class of its own.
"""

from collections.abc import Iterable
from typing import Any

import torch

from bridge.torch_dist.unpickle import Class, Function, Items


def _size(*arguments: Any) -> tuple[int, ...]:
    (sizes,) = arguments
    return whole_numbers("torch.Size", sizes)


def whole_numbers(what: str, value: Any) -> tuple[int, ...]:
    """A shape or an offset.

    Raises:
        ValueError: it is not made of whole numbers from 0 to 2**63 - 1; names `what` has it.
    """
    if type(value) not in (tuple, list) or any(type(size) is not int for size in value):
        raise ValueError(f"{what}: found a {type(value).__name__}, expected whole numbers")
    if any(not 0 <= size < 2**63 for size in value):
        raise ValueError(f"{what}: found a size of {min(value)} to {max(value)}, expected 0 to 2**63 - 1")
    return tuple(value)


def _layout(*arguments: Any) -> None:
    if arguments != ("torch.strided",):
        raise ValueError("found a tensor that is not dense, expected the layout torch.strided")


def _ignored(name: str) -> Function:
    """Something that nothing here needs to know."""
    return Function(name, lambda *_: None)


_MEMORY_FORMAT, _ITEM_TYPE = _ignored("_MEM_FORMAT_ENCODING"), _ignored("WriteItemType")
_MEMBERS = {
    _MEMORY_FORMAT: ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"),
    _ITEM_TYPE: ("TENSOR", "SHARD", "BYTE_IO"),
}


def _member(*arguments: Any) -> None:
    """Python 3.11 pickled a member of an enum as `getattr(enum, name)`; of anything else it is refused."""
    owner, name = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(owner, Function) or name not in _MEMBERS.get(owner, ()):
        raise ValueError("calls builtins.getattr, which is no part of a checkpoint's metadata")


def _classes(module: str, names: Iterable[str]) -> dict[tuple[str, str], Class]:
    return {(module, name): Class(name) for name in names}


_DCP, _SHARDED = "torch.distributed.checkpoint", "torch.distributed._shard.sharded_tensor.metadata"
_ENTRIES = ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties")
KNOWN: dict[tuple[str, str], Any] = {
    **_classes(f"{_DCP}.metadata", ("Metadata", "MetadataIndex", "StorageMeta", *_ENTRIES)),
    **_classes(f"{_DCP}.filesystem", ("_StorageInfo", "_StoragePrefix")),
    **_classes(f"{_DCP}.planner", ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData")),
    **_classes("megatron.core.dist_checkpointing.strategies.torch", ("MCoreSavePlan",)),
    **_classes(_SHARDED, ("TensorProperties",)),  # torch 2.0 to 2.2
    (_SHARDED, "MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _MEMORY_FORMAT,
    (f"{_DCP}.planner", "WriteItemType"): _ITEM_TYPE,
    ("builtins", "getattr"): Function("builtins.getattr", _member),
    ("collections", "OrderedDict"): Function("collections.OrderedDict", lambda *_: Items()),
    ("pathlib", "PosixPath"): _ignored("pathlib.PosixPath"),  # the folder that it was saved to
    ("pathlib", "WindowsPath"): _ignored("pathlib.WindowsPath"),
    ("pathlib._local", "PosixPath"): _ignored("pathlib.PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"): _ignored("pathlib.WindowsPath"),
    ("torch", "Size"): Function("torch.Size", _size),
    ("torch.serialization", "_get_layout"): Function("torch.layout", _layout),
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
