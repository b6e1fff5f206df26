"""Steps that are replays of CUDA graphs, on a GPU."""

from pathlib import Path

import pytest
from support.checks import NO_GPU
from support.training_runs import job_of

from bridge.training.cuda_graphs import CudaGraphs
from bridge.training.metrics import read_metrics
from bridge.training.train import train

pytestmark = [pytest.mark.gpu, NO_GPU]

# Graphs may have other attention kernels than eager steps, and of bfloat16 a rounding is 2^-8; a token that goes to
# another expert is more than 1 % of the load of one.
RELATIVE = {"loss": 2**-8, "grad_norm": 2**-7, "aux_loss": 2**-7, "expert_load": 0.05}


@pytest.mark.parametrize(("model", "layers"), {"gpt": 2, "hybrid": 4}.items())
def test_they_report_what_eager_steps_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, layers: int
) -> None:
    replayed: list[int] = []

    def counted(graphs: CudaGraphs) -> None:
        capture(graphs)
        replayed.extend(len(layer.cuda_graphs) for layer in graphs._wrapped[0].module.decoder.layers)

    capture = CudaGraphs.capture
    monkeypatch.setattr(CudaGraphs, "capture", counted)
    settings = {"steps": 6, "lr": 1e-4, "warmup_steps": 1, "dtype": "bf16", "model_class": model}
    for name, graphs in {"eager": False, "graphs": True}.items():
        train(job_of(source, tmp_path / name, cuda_graphs=graphs, **settings))
    assert replayed == [1] * layers
    for eager, replay in zip(*(read_metrics(tmp_path / name) for name in ("eager", "graphs")), strict=True):
        for name, relative in RELATIVE.items():
            assert replay[name] == pytest.approx(eager[name], rel=relative), (name, eager["step"])
