"""`minimax-m2 inspect`, `plan` and `verify`: what a checkpoint is, what a layout holds, whether two are the same."""

from pathlib import Path
from typing import Annotated

import typer

from bridge.cli.common import (
    AsJson,
    CheckpointPath,
    Model,
    Workers,
    default_workers,
    is_rank_zero,
    progress_bars,
    reporting,
    say,
    say_json,
    say_line,
    say_notes,
)
from bridge.jobs.ranks import TorchrunRanks
from reference.activations import Recompute
from reference.model_class import DEFAULT_MODEL, ModelClass


def inspect(path: CheckpointPath, as_json: AsJson = False) -> None:
    """Architecture, dtypes, sizes, quantisation, and what is missing, unexpected or wrong. Reads headers only."""
    with reporting():
        from bridge.huggingface.hub import checkpoint_folder
        from bridge.huggingface.safetensors_folder import SafetensorsFolder
        from bridge.proof.inspect_checkpoint import inspect_checkpoint

        with SafetensorsFolder(checkpoint_folder(str(path))) as checkpoint:
            found = inspect_checkpoint(checkpoint)
    if as_json:
        say_json({"facts": dict(found.facts), "notes": found.notes, "problems": found.problems})
    else:
        say(str(path), [*found.facts, *(("note", note) for note in found.notes)])
        for line in found.problems:
            say_line(line, label="problem")
        whole = "whole: every tensor is there, as expected"
        say_line(f"{len(found.problems)} problems" if found.problems else whole)
    if found.problems:
        raise typer.Exit(1)


def verify(
    left: Annotated[Path, typer.Argument(help="A checkpoint: Hugging Face's or megatron-core's torch_dist.")],
    right: Annotated[Path, typer.Argument(help="Another one.")],
    logits: Annotated[bool, typer.Option(help="Compare the reference model's logits too, layer by layer.")] = False,
    tokens: Annotated[
        str, typer.Option(help="Token ids for --logits, such as '5 17 3' (default: two random sequences of 64).")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of random tokens.")] = 0,
    worst: Annotated[int, typer.Option(min=1, help="How many of the weights that differ to show.")] = 10,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints weight by weight, whatever format each of them has. Exit status 1 if they differ.

    Tensors of one dtype are compared byte by byte; float8 against bfloat16 or float32 by value, exactly.
    """
    with reporting(), TorchrunRanks(), progress_bars() as progress:
        from bridge.proof.compare import compare_logits, compare_pair, open_pair

        count = default_workers(workers, left, right)
        pair = open_pair(left, right)
        say_notes(note for side in (pair.left, pair.right) for note in side.notes)
        found = compare_pair(pair, workers=count, progress=progress)
        error = compare_logits(pair, tokens, seed=seed, progress=progress) if logits and is_rank_zero() else None
    if as_json:
        shown = found._replace(differences=found.differences[:worst])._asdict()
        say_json({"differ": len(found.differences), **shown, "logits_error": error})
    else:
        _table(f"{left} against {right}", found, error, worst)
    if found.differences or error:
        raise typer.Exit(1)


def _table(title: str, found, error: float | None, worst: int) -> None:
    rows = [
        ("tensors compared", f"{found.tensors:,}, {found.nbytes:,} bytes"),
        ("equal byte for byte", f"{found.same_bytes:,}"),
        ("equal in value, not in dtype", f"{found.same_values:,}"),
        ("other files compared", f"{found.files:,}"),
        ("different", f"{len(found.differences):,}"),
    ]
    if error is not None:
        rows.append(("logits, relative error", f"{error:.2e}"))
    say(title, rows)
    if found.differences:
        columns = ("worst", "what", "largest difference", "relative")
        lines = [(one.name, one.what, f"{one.largest:.3g}", f"{one.relative:.2e}") for one in found.differences[:worst]]
        say("", lines, columns=columns)


def plan(
    path: CheckpointPath,
    gpus: Annotated[int, typer.Option(help="Number of GPUs; data parallel is what the other sizes leave.")],
    memory: Annotated[str, typer.Option(help="Memory of one: 80GB (80e9 bytes), 79.6GiB.")] = "80GB",
    model: Model = DEFAULT_MODEL,
    tp: Annotated[int, typer.Option(help="Tensor parallel.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline parallel.")] = 1,
    vpp: Annotated[int, typer.Option(help="Virtual pipeline chunks on each pipeline rank.")] = 1,
    ep: Annotated[int, typer.Option(help="Expert parallel.")] = 1,
    etp: Annotated[int | None, typer.Option(help="Expert-tensor parallel (default: as --tp).")] = None,
    cp: Annotated[int, typer.Option(help="Context parallel.")] = 1,
    layers_per_stage: Annotated[
        str | None, typer.Option(help="Layers of each of the pp x vpp stages, 15,16,16,15 (default: spread).")
    ] = None,
    distributed_optimizer: Annotated[
        bool, typer.Option(help="Divide the optimizer's state among data-parallel ranks.")
    ] = True,
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens in a sequence; with it activations are counted.", show_default=False)
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass of a rank.")] = 1,
    global_batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences in a step (default: as many as fill the pipeline).", show_default=False),
    ] = None,
    recompute: Annotated[Recompute, typer.Option(help="Activations computed again in the backward pass.")] = "none",
    picture: Annotated[Path | None, typer.Option(help="Draw it as .svg or .html.")] = None,
    as_json: AsJson = False,
) -> None:
    """What each rank would hold, in parameters and bytes, and what to change if it does not fit.

    Reads config.json only. Exit status 1 if a rank needs more than --memory. Activations are counted where --seq-length
    is given, of bfloat16 with Transformer Engine and balanced routing. For a HybridModel the pattern of its layers is
    shown; it needs as much as a GPTModel but for --recompute full, where it keeps two inputs a layer, not one.
    """
    with reporting():
        from bridge.memory_plan import plan, report
        from bridge.memory_plan.picture import write_picture

        config = plan.read_config(path)
        layers = None if layers_per_stage is None else plan.parse_layers(layers_per_stage)
        sizes = {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "cp": cp}
        workload = plan.workload(
            seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            recompute=recompute,
            model=model,
        )
        found = plan.plan(
            config,
            plan.layout(config, gpus=gpus, layers_per_stage=layers, **sizes),
            memory=plan.parse_memory(memory),
            distributed_optimizer=distributed_optimizer,
            workload=workload,
        )
        if picture and is_rank_zero():
            write_picture(found, picture)
        advice = plan.advice(found)  # None when it fits
    if as_json:
        say_json(report.to_json(found))
    elif is_rank_zero():
        headings, rows = report.table(found)
        say(str(path), map(tuple, rows), columns=tuple(headings))
        if advice and advice.fits:
            headings, rows = report.advice_rows(advice)
            say("", map(tuple, rows), columns=tuple(headings))
        lines = [f"--hybrid-layer-pattern '{report.pattern(found)}'"] if model is ModelClass.HYBRID else []
        for line in [*report.summary(found, advice), *lines]:
            say_line(line)
    if advice:
        raise typer.Exit(1)
