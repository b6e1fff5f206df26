"""Fused kernels and CUDA graphs of a run that names none: the fastest of those that were recorded with its settings.

Gains are those of `train_speed_h200.json`: one H200, four layers of true width, where a step with CUDA graphs alone
keeps the GPU busy for 259 ms. That losses and gradient norms agree is recorded

- of graphs with all of the fusions at EP 2, TP 2 (whole experts), PP 2 and CP 2, over six steps;
- of the same on one GPU over 200 steps, all of which have the digits of the fusions without graphs.

The records are `train_checked_h200_two_ranks.json` and `steps200_h200.json`. At PP 2 and CP 2 the experts' gradients
were added by cuBLAS, before `bridge.model.expert_products`; more ranks of PP, EP, CP and DP are taken to make no
difference. Whatever is not among these, more tensor parallelism, experts that are cut, virtual stages, recomputation,
frozen parameters, HybridModel or float32, has neither fusions nor graphs unless they are asked for.
"""

import torch

from bridge.model.fusions import FusionName
from bridge.model.layer_spec import default_backend
from bridge.training.settings import TrainJob

# Each by itself, under CUDA graphs. All together: 216 ms, and 1.63 times the speed of eager steps without any of them.
# Since then `gradient_accumulation` also saves the processor's time: of a step's 332 ms 25 (`train_speed_h100.json`).
GAINS: dict[FusionName, str] = {
    "router": "4 ms of the GPU's time",
    "permute": "19 ms",
    "cross_entropy": "8 ms",
    "gradient_accumulation": "18 ms",
    "grouped_gemm": "none of the GPU's time; 64 launches in place of 2048, which are the processor's",
}

# Settings, and the values that the records have of them.
RECORDED: dict[str, tuple[object, ...]] = {
    "dtype": ("bf16",),
    "model_class": ("gpt",),
    "tp": (1, 2),
    "etp": (1,),  # None is tp
    "vpp": (1,),
    "recompute": ("none",),
    "freeze": ((),),
}


def with_speed_defaults(job: TrainJob) -> TrainJob:
    """The job with `fusions` and `cuda_graphs` where it leaves them open, on this host."""
    settings = {name: getattr(job, name) for name in RECORDED} | {"etp": job.tp if job.etp is None else job.etp}
    recorded = _on_gpus() and all(settings[name] in values for name, values in RECORDED.items())
    graphs = recorded if job.cuda_graphs is None else job.cuda_graphs
    return job.at(cuda_graphs=graphs, fusions=job.fusions or (tuple(GAINS) if recorded else ("none",)))


def _on_gpus() -> bool:
    return torch.cuda.is_available() and default_backend() == "transformer_engine"
