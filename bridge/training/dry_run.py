"""What a run would be, without a model: its settings, and what each rank would hold."""

import os
from typing import Any, NamedTuple

import torch
from torch import distributed

from bridge.memory_plan import plan, report
from bridge.model.layer_spec import Backend, default_backend
from bridge.training.checks import begun_step, check_layout, check_place, tokenizer_of
from bridge.training.data.indexed import check_files
from bridge.training.settings import TrainJob
from bridge.training.speed_defaults import with_speed_defaults
from bridge.training.start import open_start

ELSEWHERE = (
    "fusions and cuda_graphs are those of hosts with GPUs and Transformer Engine, which this one is not: there "
    "cross_entropy_te is in the place of cross_entropy from Transformer Engine 2.20 on"
)
FROZEN = "frozen parameters are counted as if they were trained, with gradient and optimizer state"


class DryRun(NamedTuple):
    """The resolved settings, the memory plan as a table and as JSON, and whether the fullest rank fits.

    `advice` is a table of layouts that fit, where this one does not; `notes` say what is planned otherwise than it
    would be.
    """

    settings: dict[str, Any]
    headings: list[str]
    rows: list[Any]
    advice: tuple[list[str], list[list[str]]] | None
    lines: list[str]
    notes: list[str]
    plan: dict[str, Any]
    fits: bool


def _ranks_to_be() -> int:
    """How many ranks the run has: torchrun says it before they have joined."""
    if distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def _backend_to_be(gpus: int | None) -> Backend:
    """What layers the run has: where GPUs are named and this host has none, those of another host."""
    return "transformer_engine" if gpus is not None and not torch.cuda.is_available() else default_backend()


def dry_run(job: TrainJob, gpus: int | None, memory: str) -> DryRun:
    """Check the job as a run would, on `gpus` ranks of `memory` each, and plan what they hold.

    Raises:
        ValueError: as `train`, but for what only the data's contents show.
    """
    check_files(job.data)
    backend = _backend_to_be(gpus)
    job = with_speed_defaults(job, backend)
    with open_start(job) as start:
        parallelism = check_layout(job, start.config, _ranks_to_be() if gpus is None else gpus, backend)
        check_place(job)
        begun = begun_step(job, start.config, backend)
        tokenizer_of(job, start)
        found = plan.plan(
            start.config,
            parallelism,
            memory=plan.parse_memory(memory),
            distributed_optimizer=True,
            workload=job.workload,
        )
        advice = plan.advice(found)
        headings, rows = report.table(found)
        settings = {
            **vars(job),
            "etp": parallelism.expert_tp,
            "dp": parallelism.dp,
            "layers_per_stage": parallelism.layers_per_stage,
            "microbatches": job.workload.microbatches(parallelism),
            "starts from": f"step {begun} of the run in {job.out}" if begun else start.what,
        }
        notes = [ELSEWHERE] * (backend != default_backend()) + [FROZEN] * bool(job.freeze)
        lines, others = report.summary(found, advice), report.advice_rows(advice) if advice and advice.fits else None
        return DryRun(settings, headings, rows, others, lines, notes, report.to_json(found), advice is None)
