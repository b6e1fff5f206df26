"""Which fusions and graphs a run has that names none; with a GPU the same is asked as without one."""

import json
from typing import Any

import pytest
from support.checks import RESULTS

from bridge.model.fusions import FUSIONS
from bridge.training import speed_defaults
from bridge.training.settings import TrainJob
from bridge.training.speed_defaults import GAINS, with_speed_defaults

ALL = tuple(GAINS)


def resolved(**settings: Any) -> tuple[tuple[str, ...], bool | None]:
    given = {"model": "m", "data": ("d.txt",), "out": "o", "steps": 10, "seq_length": 8}
    job = with_speed_defaults(TrainJob(**given | settings))
    return job.fusions, job.cuda_graphs


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_defaults, "_on_gpus", lambda: True)


def test_on_a_processor_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_defaults, "_on_gpus", lambda: False)
    assert resolved() == (("none",), False)
    assert resolved(fusions=("cross_entropy",)) == (("cross_entropy",), False)


RECORDED = {
    "one GPU": ({}, (ALL, True)),
    "experts over ranks": ({"ep": 8}, (ALL, True)),
    "stages": ({"pp": 2}, (ALL, True)),
    "context": ({"cp": 2}, (ALL, True)),
    "virtual stages": ({"pp": 2, "vpp": 2}, (("none",), False)),
    "recomputation": ({"recompute": "full"}, (("none",), False)),
    "frozen": ({"freeze": ("*.experts.*",)}, (("none",), False)),
    "tensor parallel": ({"tp": 2}, (("none",), False)),
    "tensor parallel, whole experts": ({"tp": 2, "etp": 1}, (ALL, True)),
    "more tensor parallel": ({"tp": 4, "etp": 1}, (("none",), False)),
    "experts cut": ({"etp": 2}, (("none",), False)),
    "float32": ({"dtype": "fp32"}, (("none",), False)),
    "hybrid": ({"model_class": "hybrid"}, (("none",), False)),
    "asked for": ({"tp": 2, "fusions": ("router",), "cuda_graphs": True}, (("router",), True)),
    "asked for none": ({"fusions": ("none",), "cuda_graphs": False}, (("none",), False)),
}


@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize("name", RECORDED)
def test_on_gpus_there_are_those_that_are_recorded(name: str) -> None:
    settings, wanted = RECORDED[name]
    assert resolved(**settings) == wanted


def test_gains_are_those_of_the_record() -> None:
    """Milliseconds in which the GPU was busy, of the step with graphs alone less that with the fusion."""
    rows = json.loads((RESULTS / "train_speed_h200.json").read_text())["rows"]
    busy = {name: 1e3 * row["profiled"]["busy seconds"] for name, row in rows.items()}
    assert round(busy["graphs"]) == 259
    assert round(busy["fusions and graphs"]) == 216
    assert round(rows["fusions and graphs"]["x defaults"], 2) == 1.63
    for name, gain in GAINS.items():
        assert FUSIONS[name].record == "train_speed_h200.json"
        saved = busy["graphs"] - busy[f"graphs, {name}"]
        assert gain.split()[0] == (f"{saved:.0f}" if saved > 1 else "none")
