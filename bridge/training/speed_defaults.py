"""Fused kernels and CUDA graphs of a run that names none: the fastest of those that were proven with its settings.

Gains are of `train_speed_h200.json`, which has each alone and all of them; losses and gradient norms of
`train_checked_*.json` agree with the run without them. Whatever is not recorded there stays off unless asked for.
"""

import torch

from bridge.model.fusions import FUSIONS, FusionName
from bridge.model.layer_spec import Backend, default_backend
from bridge.training.settings import TrainJob

DEFAULT_FUSIONS: tuple[FusionName, ...] = (
    "router",
    "permute",
    "cross_entropy",
    "gradient_accumulation",
    "grouped_gemm",
)


def with_speed_defaults(job: TrainJob) -> TrainJob:
    """The job with `fusions` and `cuda_graphs` where it leaves them open, on this host."""
    backend = default_backend()
    graphs = _graphs_are_proven(job, backend) if job.cuda_graphs is None else job.cuda_graphs
    return job.at(cuda_graphs=graphs, fusions=job.fusions or _fusions(job, backend))


def _graphs_are_proven(job: TrainJob, backend: Backend) -> bool:
    """At any tensor, pipeline, expert and context parallel size, in bfloat16, of `GPTModel`."""
    plain = job.vpp == 1 and job.recompute == "none" and not job.freeze
    return _on_gpus(backend) and job.dtype == "bf16" and job.model_class == "gpt" and plain


def _fusions(job: TrainJob, backend: Backend) -> tuple[FusionName, ...]:
    if job.dtype != "bf16" or not _on_gpus(backend):
        return ("none",)
    return tuple(name for name in DEFAULT_FUSIONS if backend in FUSIONS[name].backends)


def _on_gpus(backend: Backend) -> bool:
    return torch.cuda.is_available() and backend == "transformer_engine"
