"""Fused kernels and CUDA graphs of a run that names none: the fastest of those that were recorded with its settings.

What each fusion gains is in `bridge.model.fusions`. That losses and gradient norms agree is recorded

- of graphs with all of the fusions on one GPU, at EP 2, TP 2 (whole experts), DP 2, PP 2 and CP 2, over six steps;
- of the same on one GPU over 200 steps, all of which have the digits of the fusions without graphs.

The records are `train_checked_h200_second.json`, `train_checked_h200_two_ranks.json` and `steps200_h200_second.json`,
of HybridModel on one GPU `train_speed_h200_hybrid.json` and at EP 2 `train_checked_h200_hybrid_ep2.json`, and of ten
steps against `transformers`, at TP 2 x EP 2 too, `steps_h200_layouts_second.json`. More ranks of PP, EP, CP and DP are
taken to make no difference, and HybridModel, of the same modules, at any layout that is recorded. Whatever is not among
these, more tensor parallelism, experts that are cut, virtual stages, recomputation or frozen parameters, has no graphs
unless they are asked for, and the fusions that every bfloat16 model on a GPU has; float32 has none.
"""

from bridge.model.fusions import FASTEST, MODEL_DEFAULTS
from bridge.model.layer_spec import Backend
from bridge.training.settings import TrainJob

# Settings, and the values that the records have of them.
RECORDED: dict[str, tuple[object, ...]] = {
    "model_class": ("gpt", "hybrid"),
    "tp": (1, 2),
    "etp": (1,),  # None is tp
    "vpp": (1,),
    "recompute": ("none",),
    "freeze": ((),),
}


def with_speed_defaults(job: TrainJob, backend: Backend) -> TrainJob:
    """The job with `fusions` and `cuda_graphs` where it leaves them open, with layers of a backend."""
    settings = {name: getattr(job, name) for name in RECORDED} | {"etp": job.tp if job.etp is None else job.etp}
    fused = backend == "transformer_engine" and job.dtype == "bf16"
    recorded = fused and all(settings[name] in values for name, values in RECORDED.items())
    graphs = recorded if job.cuda_graphs is None else job.cuda_graphs
    fastest = FASTEST if recorded else MODEL_DEFAULTS if fused else ("none",)
    return job.at(cuda_graphs=graphs, fusions=job.fusions or fastest)
