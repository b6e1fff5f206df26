"""Which fusions and graphs a run has that names none; with a GPU the same is asked as without one."""

from typing import Any

import pytest

from bridge.model.fusions import FASTEST, MODEL_DEFAULTS
from bridge.model.layer_spec import Backend
from bridge.training.settings import TrainJob
from bridge.training.speed_defaults import with_speed_defaults


def resolved(backend: Backend = "transformer_engine", **settings: Any) -> tuple[tuple[str, ...], bool | None]:
    given = {"model": "m", "data": ("d.txt",), "out": "o", "steps": 10, "seq_length": 8}
    job = with_speed_defaults(TrainJob(**given | settings), backend)
    return job.fusions, job.cuda_graphs


def test_on_a_processor_there_are_none() -> None:
    assert resolved("local") == (("none",), False)
    assert resolved("local", fusions=("cross_entropy",)) == (("cross_entropy",), False)


RECORDED = {
    "one GPU": ({}, (FASTEST, True)),
    "experts over ranks": ({"ep": 8}, (FASTEST, True)),
    "stages": ({"pp": 2}, (FASTEST, True)),
    "context": ({"cp": 2}, (FASTEST, True)),
    "virtual stages": ({"pp": 2, "vpp": 2}, (MODEL_DEFAULTS, False)),
    "recomputation": ({"recompute": "full"}, (MODEL_DEFAULTS, False)),
    "frozen": ({"freeze": ("*.experts.*",)}, (MODEL_DEFAULTS, False)),
    "tensor parallel": ({"tp": 2}, (MODEL_DEFAULTS, False)),
    "tensor parallel, whole experts": ({"tp": 2, "etp": 1}, (FASTEST, True)),
    "more tensor parallel": ({"tp": 4, "etp": 1}, (MODEL_DEFAULTS, False)),
    "experts cut": ({"etp": 2}, (MODEL_DEFAULTS, False)),
    "float32": ({"dtype": "fp32"}, (("none",), False)),
    "hybrid": ({"model_class": "hybrid"}, (FASTEST, True)),
    "asked for": ({"tp": 2, "fusions": ("router",), "cuda_graphs": True}, (("router",), True)),
    "asked for none": ({"fusions": ("none",), "cuda_graphs": False}, (("none",), False)),
}


@pytest.mark.parametrize("name", RECORDED)
def test_on_gpus_there_are_those_that_are_recorded(name: str) -> None:
    settings, wanted = RECORDED[name]
    assert resolved(**settings) == wanted
