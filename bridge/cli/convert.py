"""`minimax-m2 import` and `export`: checkpoints between Hugging Face and megatron-core, without a model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from bridge.cli.common import (
    AsJson,
    DryRun,
    Model,
    Overwrite,
    Workers,
    default_workers,
    progress_bars,
    reporting,
    say,
    say_json,
    say_notes,
)
from reference.model_class import DEFAULT_MODEL


class StoredDtype(StrEnum):
    """The dtype of a distributed checkpoint's weights."""

    BF16 = "bf16"
    FP32 = "fp32"


class Quantization(StrEnum):
    """How a Hugging Face checkpoint stores its linear layers."""

    FP8 = "fp8"
    NONE = "none"


class Scales(StrEnum):
    """Where an FP8 export's block scales come from."""

    SOURCE = "source"
    FRESH = "fresh"


def import_(
    path: Annotated[
        Path, typer.Argument(help="A folder with a Hugging Face checkpoint, or a hub id; or a torch_dist checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make: Megatron-LM's --load.")],
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[
        StoredDtype | None,
        typer.Option(help="Dtype of the weights; the router's stay float32 (default: bf16, or that of a torch_dist)."),
    ] = None,
    hugging_face: Annotated[
        Path | None,
        typer.Option(help="The Hugging Face checkpoint of a torch_dist one that has no hugging_face/ beside it."),
    ] = None,
    iteration: Annotated[int, typer.Option(min=1, help="The iteration that the checkpoint says it is of.")] = 1,
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a megatron-core torch_dist checkpoint of a Hugging Face one, tensor by tensor, without a GPU.

    Of a torch_dist one it makes another of --model: so a GPTModel's checkpoint loads into a HybridModel, and the other
    way. The optimizer's state is left out.

    It loads at any parallel layout: in Megatron-LM with --load OUT --finetune --ckpt-format torch_dist, elsewhere with
    megatron.core.dist_checkpointing.load(sharded_state_dict, OUT/iter_0000001). Memory: about 1 GB a worker, whatever
    the model's size. The output appears when it is complete; an interrupted run is taken up again by the same command.
    """
    with reporting(), progress_bars() as progress:
        from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
        from bridge.huggingface.hub import checkpoint_folder

        folder = checkpoint_folder(str(path))
        job = ImportJob(
            str(folder),
            str(out),
            dtype and str(dtype),
            iteration,
            model=str(model),
            hugging_face=hugging_face and str(checkpoint_folder(str(hugging_face))),
        )
        count = default_workers(workers, folder)
        summary = import_checkpoint(job, workers=count, overwrite=overwrite, dry_run=dry_run, progress=progress)
    _conclude(f"{path} -> {out}", summary, mtp="of them MTP, left out", dry_run=dry_run, as_json=as_json)


def export_(
    megatron: Annotated[
        Path, typer.Argument(help="A torch_dist checkpoint: Megatron-LM's --save, or one iteration's folder.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    quantization: Annotated[
        Quantization, typer.Option(help="fp8: linear layers as float8 blocks; none: as the checkpoint has them.")
    ] = Quantization.FP8,
    scales: Annotated[
        Scales,
        typer.Option(help="source: an untouched weight gets the source's own bytes; fresh: amax / 448 everywhere."),
    ] = Scales.SOURCE,
    source: Annotated[
        Path | None,
        typer.Option(
            help="The Hugging Face checkpoint that training started from: its scales, config, tokenizer, MTP layers."
        ),
    ] = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Make a Hugging Face checkpoint of a megatron-core torch_dist one, whatever layout saved it, without a GPU.

    Says how many quantised weights kept the source's bytes, how many were encoded anew, and the worst error of those.
    Memory: about 1 GB a worker. The output appears when it is complete; an interrupted run is taken up again by the
    same command.
    """
    with reporting(), progress_bars() as progress:
        from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
        from bridge.huggingface.hub import checkpoint_folder

        folder = source and str(checkpoint_folder(str(source)))
        # The enums' values are the job's literals.
        job = ExportJob(str(megatron), str(out), cast(Any, quantization.value), cast(Any, scales.value), folder)
        count = default_workers(workers, megatron)
        summary = export_checkpoint(job, workers=count, overwrite=overwrite, dry_run=dry_run, progress=progress)
    _conclude(f"{megatron} -> {out}", summary, mtp="of them MTP, the source's", dry_run=dry_run, as_json=as_json)


_LABELS = {
    "tensors": "tensors",
    "unneeded_tensors": "of them not needed, left out",
    "trained_mtp": "trained MTP tensors, not converted",
    "other_tensors": "of them not the model's (optimizer), left out",
    "bytes_read": "bytes read",
    "bytes_written": "bytes written",
    "files": "files",
    "reused": "of them, weights of an earlier run",
    "identical": "quantised weights with the source's bytes",
    "requantised": "quantised weights encoded anew",
    "worst": "worst of those",
    "worst_error": "its relative error",
}


def _conclude(title: str, summary: Any, *, mtp: str, dry_run: bool, as_json: bool) -> None:
    say_notes(summary.notes)
    if as_json:
        say_json({"dry_run": dry_run, **summary._asdict()})
        return
    labels = _LABELS | {"mtp_tensors": mtp}
    facts = [(labels[name], value) for name, value in summary._asdict().items() if name in labels]
    rows = [(label, f"{value:,}" if isinstance(value, int) else f"{value}") for label, value in facts if value]
    say(f"{title}{' (dry run: nothing was written)' if dry_run else ''}", rows)
