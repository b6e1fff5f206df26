"""A Hugging Face checkpoint folder, written whole or not at all.

Everything goes into a hidden folder beside the target, `.{name}.partial-{unique}`: shards under temporary names while
their count is unknown, then config.json, then the index, each on the disk before the next. One rename puts the folder
in place. Whatever stops the run, the target is what it was; a folder with an index is complete.

Replacing a checkpoint takes two renames, the old one aside to `.{name}.old-{unique}` and the new one in. A machine that
dies between them leaves no target and both checkpoints, complete, beside it.

A killed run leaves its hidden folder behind. Later runs use names of their own and never touch it: it could belong to
a run that is still alive. Delete it by hand.
"""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Shaped
from safetensors.torch import save_file
from torch import Tensor

from bridge.hf_files import CONFIG_NAME, DTYPES, INDEX_NAME, SHARD_SUFFIX, stays_inside

SHARD_BYTES = 2 * 10**9  # one file's worth is held in memory


class HFWriter:
    """`out` holds every added tensor and file once `finish` returns, and is untouched before.

    Keeps at most `max_shard_bytes` of tensors in memory, or one tensor that is larger. Leaving the `with` block without
    `finish` deletes what was written.

    Raises: ValueError, with nothing written, if `out` is a link, a mount point or a file; if it holds anything and
    `overwrite` is off; if it is to be replaced and has no config.json, so is no checkpoint.
    """

    def __init__(self, out: Path | str, *, overwrite: bool = False, max_shard_bytes: int = SHARD_BYTES):
        self.out = Path(os.path.abspath(out))
        check_target(self.out, overwrite)
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0
        self._folder = self._sibling("partial")
        self._folder.mkdir(parents=True)

    def add(self, name: str, tensor: Shaped[Tensor, "..."]) -> None:
        """Copies the tensor, bit for bit, to the CPU; writes a shard when this one would not fit in it any more.

        Raises: ValueError if the name was added before or safetensors has no such dtype.
        """
        self._check_open()
        if name in self._shard_of:
            raise ValueError(f"{self.out}: {name} was added twice; each tensor belongs in one shard")
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{self.out}: {name} is {tensor.dtype}, expected one of {', '.join(map(str, DTYPES.values()))}"
            )
        nbytes = tensor.numel() * tensor.element_size()
        if self._pending_bytes + nbytes > self._max_shard_bytes:
            self._flush()
        # A copy even on the CPU: the caller may reuse its buffer, and a view would keep a larger storage alive.
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._shard_of[name] = self._num_shards + 1
        self._pending_bytes += nbytes
        self._total_bytes += nbytes

    def add_file(self, path: Path | str, relative_name: Path | str) -> None:
        """Copies the file's bytes to `relative_name` inside the checkpoint.

        Raises: ValueError if that name leaves the folder, is one the writer itself writes, or was used before.
        """
        self._check_open()
        name = Path(relative_name)
        if not stays_inside(str(name)) or str(name) in (CONFIG_NAME, INDEX_NAME) or name.suffix == SHARD_SUFFIX:
            raise ValueError(
                f"{self.out}: cannot carry {path} as {str(name)!r}; expected a path inside the checkpoint other than "
                f"{CONFIG_NAME}, {INDEX_NAME} and *{SHARD_SUFFIX}, which the writer makes"
            )
        target = self._folder / name
        if target.exists():
            raise ValueError(f"{self.out}: {name} was added twice; cannot carry {path} over it")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        _sync(target)

    def finish(self, config: dict[str, Any] | bytes) -> None:
        """Writes the last shard, config.json (bytes verbatim), then the index, and puts the folder in place.

        Raises: ValueError if no tensor was added or `out` was filled by someone else meanwhile.
        """
        self._check_open()
        self._flush()
        if not self._num_shards:
            raise ValueError(f"{self.out}: no tensor was added; a checkpoint holds at least one")
        files = {n: f"model-{n:05d}-of-{self._num_shards:05d}{SHARD_SUFFIX}" for n in range(1, self._num_shards + 1)}
        for number, file in files.items():
            self._unnamed_shard(number).rename(self._folder / file)
        self._write(CONFIG_NAME, config if isinstance(config, bytes) else _json_bytes(config))
        for root, _, _ in self._folder.walk():
            _sync(root)
        weight_map = {name: files[self._shard_of[name]] for name in sorted(self._shard_of)}
        self._write(INDEX_NAME, _json_bytes({"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}))
        _sync(self._folder)
        self._put_in_place()

    def _put_in_place(self) -> None:
        if self._overwrite and self.out.exists():
            old = self._sibling("old")
            self.out.rename(old)
            try:
                self._folder.rename(self.out)
            finally:
                if not self.out.exists():
                    old.rename(self.out)
            _sync(self.out.parent)
            shutil.rmtree(old)
            return
        try:
            self._folder.rename(self.out)  # also onto an empty folder, never onto a full one
        except OSError as error:
            raise ValueError(
                f"{self.out}: was empty when writing began and is not now ({error}); write elsewhere"
            ) from error
        _sync(self.out.parent)

    def _flush(self) -> None:
        if not self._pending:
            return
        self._num_shards += 1
        shard = self._unnamed_shard(self._num_shards)
        save_file(self._pending, shard, metadata={"format": "pt"})
        shard.chmod(self._folder.stat().st_mode & 0o666)  # safetensors makes it 0600 whatever the umask says
        _sync(shard)
        self._pending = {}
        self._pending_bytes = 0

    def _write(self, name: str, data: bytes) -> None:
        unnamed = self._folder / f"{name}.partial"
        unnamed.write_bytes(data)
        _sync(unnamed)
        unnamed.rename(self._folder / name)

    def _unnamed_shard(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.partial"

    def _sibling(self, role: str) -> Path:
        return self.out.with_name(f".{self.out.name}.{role}-{uuid.uuid4().hex}")

    def _check_open(self) -> None:
        if not self._folder.exists():
            raise ValueError(f"{self.out}: this writer has finished or was left; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder.exists():
            shutil.rmtree(self._folder)


def check_target(out: Path, overwrite: bool) -> None:
    """A checkpoint may be written to `out`.

    Raises: ValueError, naming `out`, what is there and what to do.
    """
    if out.is_symlink() or out.is_mount():
        raise ValueError(f"{out}: is a link or a mount point, which one rename cannot replace; give a plain folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder or nothing; give another path")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{out}: is not empty; give another folder, or overwrite to replace the checkpoint in it")
    if not (out / CONFIG_NAME).is_file():
        raise ValueError(f"{out}: holds files and no {CONFIG_NAME}, so is no checkpoint to overwrite; empty it by hand")


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
