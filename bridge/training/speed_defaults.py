"""Fused kernels and CUDA graphs of a run that names none: the fastest of those that were recorded with its settings.

Gains are those of `train_speed_h200.json`: one H200, four layers of true width, where a step with CUDA graphs alone
keeps the GPU busy for 259 ms. Losses and gradient norms that agree are in `train_checked_h200.json` and, on two ranks,
in `train_checked_h200_two_ranks.json`. What is in neither stays off unless it is asked for.
"""

import torch

from bridge.model.fusions import FusionName
from bridge.model.layer_spec import default_backend
from bridge.training.settings import TrainJob

# Each by itself, under CUDA graphs. All together: 216 ms, and 1.63 times the speed of eager steps without any of them.
GAINS: dict[FusionName, str] = {
    "router": "4 ms of the GPU's time",
    "permute": "19 ms",
    "cross_entropy": "8 ms",
    "gradient_accumulation": "18 ms",
    "grouped_gemm": "none of the GPU's time; 64 launches in place of 2048, which are the processor's",
}


def with_speed_defaults(job: TrainJob) -> TrainJob:
    """The job with `fusions` and `cuda_graphs` where it leaves them open, on this host."""
    recorded = _on_gpus() and job.dtype == "bf16" and job.model_class == "gpt" and job.tp == (job.etp or job.tp) == 1
    plain = job.vpp == 1 and job.recompute == "none" and not job.freeze
    graphs = (recorded and plain) if job.cuda_graphs is None else job.cuda_graphs
    return job.at(cuda_graphs=graphs, fusions=job.fusions or (tuple(GAINS) if recorded else ("none",)))


def _on_gpus() -> bool:
    return torch.cuda.is_available() and default_backend() == "transformer_engine"
