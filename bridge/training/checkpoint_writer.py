"""One torch_dist checkpoint on its way to the disk, written by a process of its own while training goes on.

What is written is a copy: tensors of a GPU are copied to the host, and the process that writes is a fork, which has the
host's memory as it was when it started. It touches no GPU, and ends when the process that started it does: an orphan
would go on writing where the next run writes.

megatron-core plans and writes; its own completion is not taken. There an error of rank 0 leaves the other ranks
waiting, what went wrong with a file is lost, and results come through a process that each rank spawns, which imports
the program again. Until `complete` has written `.metadata` no reader takes the folder for a checkpoint.
"""

import os
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from traceback import format_exception
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from bridge.jobs.durable import sync
from bridge.jobs.os_errors import os_errors_of
from bridge.jobs.ranks import end_with, is_rank_zero, raise_on_all_ranks, rank_and_world_size


class CheckpointWriter:
    """Plans a checkpoint of a sharded state and starts to write it; all ranks must make one.

    Args:
        state: as `megatron.core.dist_checkpointing.save` takes it.
        target: an empty folder.
        metadata: what it says of its contents.
        in_background: whether a process of its own writes; otherwise everything is written when this returns.
    """

    def __init__(self, state: dict[str, Any], target: Path, metadata: dict[str, Any], *, in_background: bool):
        self._target, self._strategy, self._caller = target, _Strategy(), TemporalAsyncCaller()
        # Else megatron-core starts a process for its queue of results.
        with os_errors_of(target), patch.object(filesystem_async, "get_write_results_queue", lambda: None):
            request: Any = dist_checkpointing.save(
                state,
                str(target),
                self._strategy,
                async_sharded_save=True,
                async_strategy="mcore",
                content_metadata=metadata,
            )
        with raise_on_all_ranks():
            if in_background:
                self._caller.schedule_async_call(request)
            elif request.async_fn is not None:
                parent, _, *others = request.async_fn_args
                request.async_fn(parent, request.preload_fn(), *others)

    def is_at_work(self) -> bool:
        """Whether this rank's process is still writing."""
        process = self._caller.process
        return process is not None and process.is_alive()

    def complete(self, then: Callable[[], None]) -> None:
        """Wait for all ranks' files, make them a checkpoint, and do `then` on rank 0; all ranks must call it.

        Raises:
            OSError: it could not be written, or a process that wrote was killed. All ranks raise the same.
        """
        self._caller.close()
        with raise_on_all_ranks():
            written = self._strategy.results.get()
            if written is None:
                raise OSError(
                    f"{self._target}: the process that wrote it died: it was killed, or memory ran out; the checkpoint "
                    "before it is kept, and the same command goes on from there"
                )
            if isinstance(written, Exception):
                raise written
        rank, world = rank_and_world_size()
        everyone = [written] * world if rank == 0 else None
        if world > 1:
            torch.distributed.gather_object(written, everyone)
        with raise_on_all_ranks(), os_errors_of(self._target):
            if is_rank_zero():
                self._strategy.writer.finish(self._strategy.plan, everyone)
                save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(self._target))
                for path in (*self._target.iterdir(), self._target, self._target.parent):
                    sync(path)
                then()

    def abandon(self) -> None:
        """End this rank's process; its folder stays as it is, which is no checkpoint."""
        self._caller.close(abort=True)


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's, whose requests write with `_write`; `writer` and `plan` are what completes the checkpoint."""

    writer: Any
    plan: Any

    def __init__(self) -> None:
        super().__init__()
        self.results = _Results()

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *_: Any) -> AsyncRequest:
        self.writer, self.plan, _wrapper = save_state_dict_ret
        _, preload, _ = writer.get_save_function_and_args()
        if not writer.write_buckets:  # other ranks have all of it
            self.results.put([])
            return AsyncRequest(None, (), [])
        arguments = (os.getpid(), writer.write_buckets, [writer.transforms], self.results)
        return AsyncRequest(_write, arguments, [], preload_fn=preload)


class _Results:
    """What the process that writes leaves for the one that started it, in a file without a name."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  # it is open in both processes

    def put(self, value: Any) -> None:
        pickle.dump(value, self._file)
        self._file.flush()

    def get(self) -> Any:
        """None if nothing whole was left."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return None


def _write(parent: int, buckets: list[Any], transforms: list[Any], results: _Results) -> None:
    """Write this rank's files, in the process of that id or in a fork of it."""
    if os.getpid() != parent:
        end_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM):  # the one that started it decides; all of a group get them
            signal.signal(number, signal.SIG_IGN)
    results.put(_written(buckets, transforms))


def _written(buckets: list[Any], transforms: list[Any]) -> list[Any] | Exception:
    """What `.metadata` will say of each tensor, or what went wrong."""
    found = []
    for number, bucket in enumerate(buckets):
        file = Path(bucket[0])
        try:
            with os_errors_of(file):
                _, written = FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, None, None, True)  # pyright: ignore
                if isinstance(written, Exception):
                    raise written
                sync(file)  # megatron-core syncs before its last bytes are there
        except OSError as error:
            return OSError(error.errno, error.strerror, error.filename or str(file))  # without what it was raised from
        except Exception as error:
            return RuntimeError("".join(format_exception(error)))
        found += written
    return found
