"""Saving a run: one checkpoint at a time, which is the run's newest once it is complete and not before.

In order: the folder of the step, its files (in the background with `async_save`), `.metadata`, the tracker file; then
older checkpoints go. Killed anywhere in between, the tracker file names the checkpoint before, and the next save of
this step replaces the folder.
"""

import shutil
from pathlib import Path
from typing import Self

from bridge.jobs.durable import sync, write_bytes
from bridge.jobs.ranks import is_rank_zero, raise_on_all_ranks, rank_and_world_size
from bridge.training.checkpoint_writer import CheckpointWriter
from bridge.training.checkpoints import METADATA, TRACKER, common_of, complete_steps, iteration_name, model_state
from bridge.training.optimizer import gather_parameters
from bridge.training.step import Trained
from reference.config import ModelConfig


class Saver:
    """Saves what is trained to a folder of checkpoints. At the end of a `with` block everything is complete.

    An error in the block waits for what is being written too, if there is one rank. Of many, others may be elsewhere
    then, and cannot complete it with this one: it is given up. Call `finish` before an error that all ranks raise.
    """

    def __init__(self, trained: Trained, folder: Path, config: ModelConfig):
        self._trained, self._folder, self._config = trained, folder, config
        self._writer: CheckpointWriter | None = None
        self._step = 0

    def save(self, step: int) -> None:
        """Save what a step has come to, after what is being written; all ranks must call it.

        With the job's `async_save` this returns when what is to be written has been copied.

        Raises:
            OSError: it, or the one before, cannot be written; the tracker file names the last that could.
        """
        self.finish()
        trained, target = self._trained, self._folder / iteration_name(step)
        with raise_on_all_ranks():
            if is_rank_zero():
                if target.exists():  # left by a save that was killed
                    shutil.rmtree(target)
                target.mkdir(parents=True)
        gather_parameters(trained.wrapped)
        model = model_state(trained.chunks)
        state = {
            **common_of(trained.job, self._config, step),
            "opt_param_scheduler": trained.scheduler.state_dict(),
            **model,
            "optimizer": trained.optimizer.sharded_state_dict(model, metadata=dict(METADATA)),
        }
        in_background = trained.job.async_save
        self._step, self._writer = step, CheckpointWriter(state, target, dict(METADATA), in_background=in_background)
        if not in_background:
            self.finish()

    def is_writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._writer is not None and self._writer.is_at_work()

    def finish(self) -> None:
        """Wait for what is being written, and make it the newest checkpoint; all ranks must call it.

        Raises:
            OSError: as `save`.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.complete(self._make_newest)

    def _make_newest(self) -> None:
        """Of this step's and earlier checkpoints the job's `keep_last` are kept."""
        write_bytes(self._folder / TRACKER, str(self._step).encode())
        sync(self._folder)
        until_now = [one for one in complete_steps(self._folder) if one <= self._step]
        for old in until_now[: -self._trained.job.keep_last]:
            shutil.rmtree(self._folder / iteration_name(old))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None:
            self.finish()
        elif isinstance(error, Exception) and rank_and_world_size()[1] == 1:
            try:
                self.finish()
            except OSError as second:
                error.add_note(str(second))
        elif self._writer is not None:
            self._writer.abandon()
