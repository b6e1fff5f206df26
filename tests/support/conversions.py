"""Import and export without a model, each into several files: here, or as runs of their own that a fault can befall.

And what must come of them, by the reference.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, ExportSummary, export_checkpoint
from reference.fp8 import FP8, dequantize_blockwise
from support.checkpoints import SCALE
from support.faults import Fault
from support.forks import Fork, Outcome, fork

UNIT_BYTES, SHARD_BYTES = 100_000, 150_000


def imported_from(source: Path, out: Path, **options) -> Path:
    job = ImportJob(str(source), str(out), **{"unit_bytes": UNIT_BYTES} | options)
    import_checkpoint(job)
    return out


def export(megatron: Path, out: Path, **options) -> ExportSummary:
    return export_checkpoint(ExportJob(str(megatron), str(out), **{"max_shard_bytes": SHARD_BYTES} | options))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """By the reference; what is not quantised as it is."""
    found = {}
    for name, value in tensors.items():
        if value.dtype == FP8:
            found[name] = dequantize_blockwise(value, tensors[name + SCALE], dtype=dtype)
        elif not name.endswith(SCALE):
            found[name] = value
    return found


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(found[name]), bits(value)), name


# ------------------------------------------------------------------------------------------------------------ as a run

DIRECTIONS = ("import", "export")
Job = ImportJob | ExportJob


class Conversion(NamedTuple):
    """One direction: what is converted, and what comes of it when nothing happens."""

    job: Callable[[Path], Job]
    undisturbed: Path
    expected: dict[str, str]


def import_job(source: Path, out: Path) -> ImportJob:
    """Into 15 files."""
    return ImportJob(str(source), str(out), unit_bytes=UNIT_BYTES)


def export_job(megatron: Path, source: Path, out: Path) -> ExportJob:
    """Into 14 files."""
    return ExportJob(str(megatron), str(out), source=str(source), max_shard_bytes=60_000)


def convert(job: Job, **options: Any) -> Any:
    """Do what the job says."""
    return import_checkpoint(job, **options) if isinstance(job, ImportJob) else export_checkpoint(job, **options)


def _convert(job: Job, fault: Fault, options: dict[str, Any]) -> Any:
    return convert(job, **options, **fault())


def start(job: Job, *, fault: Fault = dict, **options: Any) -> Fork:
    """The run has begun when this returns."""
    return fork(_convert, job, fault, options)


def run(job: Job, *, fault: Fault = dict, **options: Any) -> Outcome:
    """A whole run."""
    return start(job, fault=fault, **options).outcome()
