"""The trained model as a Hugging Face checkpoint, in the run's `export/`."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.jobs.progress import Progress
from bridge.training.settings import TrainJob
from bridge.training.start import CHECKPOINTS, HuggingFaceStart, Start

FOLDER = "export"


def export_trained(job: TrainJob, start: Start, chunks: Sequence[nn.Module], out: Path, progress: Progress) -> Path:
    """Write it; all ranks must call it. A weight that training did not touch keeps the source's float8 bytes.

    A run that started from other than a Hugging Face checkpoint has no source: its last checkpoint is converted, with
    fresh scales.

    Raises:
        ValueError, OSError: as `save_hf_pretrained` and `export_checkpoint`.
    """
    target, fp8 = out / FOLDER, job.export == "fp8"
    if isinstance(start, HuggingFaceStart):
        quantization = "fp8" if fp8 else None
        start.bridge.save_hf_pretrained(chunks, target, quantization=quantization, overwrite=True, progress=progress)
    else:
        work = ExportJob(str(out / CHECKPOINTS), str(target), "fp8" if fp8 else "none", "fresh")
        export_checkpoint(work, overwrite=True, progress=progress)
    return target
