"""`minimax-m2 train`: one run, from its start or from where it stopped, to its end.

Everything that can be wrong with what was given is found out before the model is built. Then megatron-core does the
work (`bridge.training.loop`).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from bridge.jobs.alone import alone_in
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import (
    all_gather_objects,
    check_same_on_all_ranks,
    is_rank_zero,
    raise_on_all_ranks,
    rank_and_world_size,
)
from bridge.jobs.resumable import versions
from bridge.model.build import MakeSpec, build_model
from bridge.model.fusions import fusion_environment, fusion_settings
from bridge.model.layer_spec import Backend, default_backend
from bridge.model.process_groups import groups_of, joined_ranks
from bridge.training.checkpoints import load_checkpoint
from bridge.training.checks import begun_step, check_layout, check_place, tokenizer_of
from bridge.training.cuda_graphs import CudaGraphs
from bridge.training.data.batches import build_dataset
from bridge.training.data.indexed import Source, check_amount, check_files, describe, make_sources
from bridge.training.export import export_trained
from bridge.training.loop import run_steps
from bridge.training.optimizer import build_optimizer, build_scheduler, freeze, wrap
from bridge.training.run_record import check_data, make_record, read_record, write_record
from bridge.training.settings import TrainJob
from bridge.training.speed_defaults import with_speed_defaults
from bridge.training.start import CHECKPOINTS, Start, lay_companions, open_start
from bridge.training.step import Trained
from bridge.training.stop import asked_to_stop

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TrainSummary(NamedTuple):
    """What a call did: the step it went on from (0: from the start), the last, its loss, and what was written.

    `stopped_by` is None, or, where the run ended for a signal before its last step, the one that this rank got: 0 if
    only others did.
    """

    first: int
    last: int
    loss: float | None
    checkpoint: Path
    exported: Path | None
    stopped_by: int | None = None


def train(
    job: TrainJob,
    *,
    progress: Progress = no_progress,
    on_step: Callable[[dict[str, Any]], None] = lambda line: None,
    stop_signals: Sequence[int] = (),
) -> TrainSummary:
    """Train, or go on with a run that is in `job.out`; under torchrun all ranks must call it.

    `on_step` is given each step's metrics, on rank 0. One of `stop_signals` on any rank ends the run after the step
    that it is at, with a checkpoint; they need the main thread.

    Raises:
        ValueError: something that was given is not possible, or not the same on all ranks (before any weight is read);
            or the loss or the gradient is not finite (`NotFiniteError`; the last checkpoint stays).
        OSError: something cannot be written. All ranks raise the same.
    """
    out, backend = Path(job.out), default_backend()
    job = with_speed_defaults(job, backend)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, fusion_environment(job.fusions)))
        stack.enter_context(joined_ranks())
        # Before anything that follows from it: ranks that make other process groups wait for each other.
        check_same_on_all_ranks(versions("megatron-core") | asdict(job))
        with raise_on_all_ranks():
            check_files(job.data)
            start = stack.enter_context(open_start(job))
            parallelism = check_layout(job, start.config, rank_and_world_size()[1], backend)
        check_same_on_all_ranks(_what_is_read(job, start))
        with raise_on_all_ranks():
            if is_rank_zero():
                check_place(job)
                stack.enter_context(alone_in(out))
        stack.enter_context(groups_of(parallelism, seed=job.seed))
        if job.cuda_graphs:
            model_parallel_cuda_manual_seed(job.seed, te_rng_tracker=True, force_reset_rng=True)
        sources, begun = _prepare(job, start, backend, out, progress)
        return _run(job, start, out, sources, begun, progress, on_step, stop_signals)


def _what_is_read(job: TrainJob, start: Start) -> dict[str, Any]:
    """The model and the files as this rank finds them: another folder may be at the same path of another machine."""
    model = {f"{name} of the model": value for name, value in asdict(start.config).items()}
    data = {f"size of {path}": Path(path).stat().st_size for path in job.data}
    return model | {f"files of {job.model}": start.files} | data


def _prepare(job: TrainJob, start: Start, backend: Backend, out: Path, progress: Progress) -> tuple[list[Source], int]:
    """The data, tokenised, and the step to go on from; nothing of the model is there yet."""
    found: tuple[list[Source], int] | None = None
    with raise_on_all_ranks():
        if is_rank_zero():
            begun, record = begun_step(job, start.config, backend), make_record(job, start.config, backend)
            tokenizer, vocab_size = tokenizer_of(job, start), start.config.vocab_size
            sources = make_sources(job.data, tokenizer, vocab_size, out / "data", progress=progress)
            check_amount(job.data, sources, job.seq_length)
            record["data"] = describe(sources)
            if begun:
                check_data(out, read_record(out), record)
            else:  # what an attempt before the first checkpoint was begun with binds nobody
                write_record(out, record)
            lay_companions(start.folder, out / CHECKPOINTS, anew=not begun)
            found = sources, begun
    shared = all_gather_objects(found)[0]
    assert shared is not None
    return [Source(*source) for source in shared[0]], shared[1]


def _run(
    job: TrainJob,
    start: Start,
    out: Path,
    sources: list[Source],
    begun: int,
    progress: Progress,
    on_step: Callable[[dict[str, Any]], None],
    stop_signals: Sequence[int],
) -> TrainSummary:
    last = min(job.until or job.steps, job.steps)
    dataset = build_dataset(job, sources, out / "data" / "indices")
    trained = build(job, start, fill=not begun, progress=progress)
    checkpoints = out / CHECKPOINTS
    if begun:
        load_checkpoint(trained, checkpoints, begun)
    with asked_to_stop(stop_signals) as signal_that_came:
        steps = range(begun + 1, last + 1)
        made, loss = run_steps(trained, start.config, dataset, out, steps, on_step, signal_that_came)
    finished = made == job.steps
    exported = export_trained(job, start, trained.chunks, out, progress) if job.export and finished else None
    stopped_by = signal_that_came() if made < last else None
    return TrainSummary(begun, made, loss, checkpoints, exported, stopped_by)


def build(
    job: TrainJob,
    start: Start,
    *,
    fill: bool = True,
    progress: Progress = no_progress,
    spec: MakeSpec | None = None,
    **overrides: Any,
) -> Trained:
    """The model with its weights (`fill`), wrapped, and its optimizer; inside `model_parallel`, on all ranks.

    `spec` makes other layers than MiniMax-M2's, and `overrides` are `TransformerConfig` fields that win over the job's.
    """
    aux = {} if job.aux_loss is None else {"moe_aux_loss_coeff": job.aux_loss}
    with raise_on_all_ranks():
        built = build_model(
            start.config,
            model=job.model_class,
            params_dtype=DTYPES[job.dtype],
            perform_initialization=False,
            calculate_per_token_loss=True,
            moe_router_bias_update_rate=job.bias_update_rate,
            spec=spec,
            **{
                **aux,
                **RECOMPUTE[job.recompute],
                **fusion_settings(job.fusions),
                **(CudaGraphs.settings if job.cuda_graphs else {}),
                **overrides,
            },
        )
    chunks: list[Any] = built if isinstance(built, list) else [built]
    if fill:
        start.fill(chunks, progress)
    freeze(chunks, job.freeze)
    wrapped = wrap(chunks)
    optimizer = build_optimizer(job, wrapped)
    return Trained(job, chunks, wrapped, optimizer, build_scheduler(job, optimizer))
