"""The steps of a run: after each its metrics are written, and its checkpoint is begun where one is due.

What one rank alone finds out, that its metrics cannot be written or that its part of a checkpoint is, goes to the
others with the losses of the next step: no step has a collective more for it.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from torch import Tensor

from bridge.jobs.ranks import rank_and_world_size
from bridge.training.checkpoints import latest_step
from bridge.training.cuda_graphs import CudaGraphs
from bridge.training.data.batches import microbatches
from bridge.training.garbage import short_collections
from bridge.training.metrics import Reporter, step_metrics
from bridge.training.nonfinite import first_not_finite, gradient_not_finite
from bridge.training.saver import Saver
from bridge.training.start import CHECKPOINTS
from bridge.training.step import Flags, NotFinite, Trained, train_step
from reference.config import ModelConfig


class NotFiniteError(ValueError):
    """The loss or the gradient is not finite."""


def run_steps(
    trained: Trained,
    config: ModelConfig,
    dataset: Any,
    out: Path,
    steps: range,
    on_step: Callable[[dict[str, Any]], None] = lambda line: None,
    should_stop: Callable[[], object] = lambda: False,
) -> tuple[int, float | None]:
    """Make the steps, numbered from 1, with metrics and checkpoints in `out`: the last, and its loss if there is one.

    After a step at which any rank `should_stop` there is a checkpoint, and no other step. All ranks must call it, and
    all raise the same.

    Raises:
        NotFiniteError: the step was not made, and the model is as it was before it.
        OSError: metrics or a checkpoint cannot be written.
    """
    job, checkpoints = trained.job, out / CHECKPOINTS
    graphs = CudaGraphs(trained) if job.cuda_graphs and steps else None
    step, loss, world = steps.start - 1, None, rank_and_world_size()[1]
    with (
        short_collections(),
        Reporter(out, steps.start - 1, on_step) as reporter,
        Saver(trained, checkpoints, config) as saver,
    ):
        if graphs is not None:
            graphs.capture()
        for step in steps:
            began = time.perf_counter()
            batches = _batches(trained, dataset, step)
            result = train_step(trained, batches, Flags(reporter.failed, saver.is_writing(), bool(should_stop())))
            if isinstance(result, NotFinite):
                if graphs is not None:
                    graphs.delete()  # a replay calls no layer, whose output is looked at
                is_loss = result.what == "loss"
                again = _batches(trained, dataset, step)
                where = first_not_finite(trained, config, again) if is_loss else gradient_not_finite(trained, config)
                saver.finish()
                raise NotFiniteError(_not_finite(step, result.what, where, checkpoints))
            if result.flags.failed or not result.flags.writing:
                saver.finish()
            if result.flags.failed:
                reporter.raise_failure()
            seconds, loss = time.perf_counter() - began, result.loss
            reporter.report(partial(step_metrics, job, config, step, result, seconds, world))
            if step == steps[-1] or result.flags.stopping or (job.save_every and step % job.save_every == 0):
                saver.finish()
                reporter.raise_failure()  # a run that goes on from here would lack this step's line
                saver.save(step)
            if result.flags.stopping:
                break
        if graphs is not None:
            graphs.delete()  # their memory is the export's
    return step, loss


def _batches(trained: Trained, dataset: Any, step: int) -> list[Iterator[dict[str, Tensor]]]:
    """The microbatches of a step, for each chunk."""
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    made = microbatches(dataset, trained.job, step, dp=dp, dp_rank=dp_rank)
    return list(itertools.tee(made, len(trained.chunks)))


def _not_finite(step: int, what: str, where: str, checkpoints: Path) -> str:
    kept = latest_step(checkpoints)
    remains = (
        f"the checkpoint of step {kept} is kept, which may have gone wrong already; look at the data, and a lower "
        "learning rate needs another run, with another --out, from what this one started from or an older checkpoint"
        if kept
        else "there is no checkpoint yet; look at the data and weights, or give the same command a lower learning rate"
    )
    return f"step {step}: the {what} is not finite; it began in {where}; this step was not made, and {remains}"
