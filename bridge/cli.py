"""The `minimax-m2` command.

Exit status: 0 when everything holds, 1 when something differs or a checkpoint is not as it should be, 2 when the
command could not do its work (bad input, output folder in use). Megatron and its imports load only for the verbs that
build a model, so that `inspect` and `--help` answer at once.
"""

import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)
_output, _errors = Console(), Console(stderr=True)


class ModelDtype(StrEnum):
    """The dtype in which a model is built."""

    BF16 = "bf16"
    FP32 = "fp32"


class Benchmark(StrEnum):
    """A script of tests/benchmarks."""

    NORM = "norm"
    LAYER = "layer"


CheckpointPath = Annotated[Path, typer.Argument(help="A folder with a Hugging Face checkpoint, or a hub id.")]


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Keep the two checkpoints in this folder (default: a temporary one).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and tokens.")] = 0,
) -> None:
    """Make a small FP8 checkpoint, take it through a real megatron-core GPTModel and back, and prove it unchanged."""
    with _reporting(), _folder(keep) as folder, _progress() as track:
        from bridge.demo import demo as run

        findings = run(folder, seed=seed, track=track)
    _conclude("Hugging Face FP8 -> megatron-core -> Hugging Face FP8", findings)


@app.command()
def roundtrip(
    path: CheckpointPath,
    out: Annotated[
        Path | None, typer.Option(help="Write the exported checkpoint here and keep it (default: a temporary folder).")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that is in --out.")] = False,
    dtype: Annotated[ModelDtype, typer.Option(help="Dtype of the megatron-core model.")] = ModelDtype.BF16,
    tokens: Annotated[int, typer.Option(help="Length of the two random sequences whose logits are compared.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tokens.")] = 0,
) -> None:
    """The demo's proof on a checkpoint of yours.

    Memory: the model in --dtype, one layer of it while the reference runs, and one file of the output. Disk: as much as
    the checkpoint.
    """
    with _reporting(), _folder(out and out.parent) as folder, _progress() as track:
        import torch

        from bridge.minimax_m2_bridge import MiniMaxM2Bridge
        from bridge.roundtrip import random_tokens
        from bridge.roundtrip import roundtrip as run

        target = out or folder / "exported"
        params_dtype = {ModelDtype.BF16: torch.bfloat16, ModelDtype.FP32: torch.float32}[dtype]
        with MiniMaxM2Bridge.from_hf_pretrained(str(path)) as bridge:
            sample = random_tokens(bridge.config, length=tokens, seed=seed)
            findings = run(bridge, target, sample, params_dtype=params_dtype, overwrite=overwrite, track=track)
    _conclude(f"{path} -> megatron-core -> {target if out else 'Hugging Face'}", findings)


@app.command()
def inspect(path: CheckpointPath) -> None:
    """Architecture, dtypes, sizes, quantisation, and what is missing, unexpected or wrong. Reads headers only."""
    with _reporting():
        from bridge.hf_files import HFCheckpoint
        from bridge.hub import checkpoint_folder
        from bridge.inspection import inspect_checkpoint

        with HFCheckpoint(checkpoint_folder(str(path))) as checkpoint:
            found = inspect_checkpoint(checkpoint)
    table = Table(title=escape(str(path)), show_header=False, title_justify="left")
    for what, value in found.facts:
        table.add_row(what, escape(value))
    _output.print(table)
    for line in found.problems:
        _output.print(f"[red]problem[/red] {escape(line)}", soft_wrap=True)
    _output.print(f"{len(found.problems)} problems" if found.problems else "whole: every tensor is there, as expected")
    if found.problems:
        raise typer.Exit(1)


@app.command()
def bench(
    what: Annotated[Benchmark, typer.Argument(help="norm: the query and key norms; layer: whole layers.")],
    out: Annotated[Path, typer.Argument(help="Where the result goes (JSON, with hardware, versions and date).")],
    gpus: Annotated[int, typer.Option(help="Ranks, one a GPU: tensor parallel size of norm and layer.")] = 1,
) -> None:
    """Run a benchmark of tests/benchmarks, with its baselines, on this machine. They need an NVIDIA GPU."""
    script = Path(__file__).parents[1] / "tests" / "benchmarks" / f"bench_{what}.py"
    with _reporting():
        if not script.is_file():
            raise ValueError(f"{script}: not there; benchmarks run from a checkout, installed with pip install -e .")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    raise typer.Exit(subprocess.run([sys.executable, *launcher, str(script), str(out)], check=False).returncode)


@contextmanager
def _reporting() -> Iterator[None]:
    """Errors as one message on stderr and status 2; third-party start-up noise silenced."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except (ValueError, OSError) as error:
        _errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(2) from error


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, or one that is deleted at the end."""
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="minimax-m2-") as folder:
        yield Path(folder)


@contextmanager
def _progress() -> Iterator:
    """A `Track` that draws a bar for each loop on stderr, and nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_errors, disable=not _errors.is_terminal) as progress:

        def track(iterable: Iterable, what: str, length: int) -> Iterable:
            return progress.track(iterable, total=length, description=what)

        yield track


def _conclude(title: str, findings: list) -> None:
    """Print what was proven; leave with status 1 if anything does not hold."""
    marks = {True: "[green]holds[/green]", False: "[red]FAILS[/red]", None: "[yellow]skipped[/yellow]"}
    table = Table("claim", "found", "", title=escape(title), title_justify="left")
    for finding in findings:
        table.add_row(escape(finding.claim), escape(finding.found), marks[finding.holds])
    _output.print(table)
    if any(finding.holds is False for finding in findings):
        raise typer.Exit(1)
