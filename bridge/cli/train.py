"""`minimax-m2 train` and `plot`: a training run, and what its metrics look like."""

import inspect
import signal
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from bridge.cli.common import (
    AsJson,
    errors,
    progress_bars,
    reporting,
    say,
    say_json,
    say_line,
)
from bridge.jobs.ranks import is_rank_zero
from bridge.training.settings import TrainJob, optional, read_yaml, setting_fields, setting_types

SHOWN = {"loss": ".4f", "grad_norm": ".3f", "lr": ".2e", "tokens_per_second": ",.0f", "tflops_per_gpu": ".0f",
         "expert_load": ".2f"}  # fmt: skip
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def train(files: list[str] | None, config: Path | None, dry_run: bool, gpus: int | None, memory: str, as_json: bool,
          **given: Any) -> None:  # fmt: skip
    """Train with megatron-core, on this host or, under torchrun, on all ranks; the same command again goes on.

    What decides the numbers (data, batch, schedule, seed) is kept in the run's folder, and a run goes on only with the
    same; the parallel sizes may change. Settings come from --config, a YAML file with a line `name: value` for each
    (names as below, with _ for -), and from options, which win. In the run's folder: metrics.jsonl, one object a step;
    tensorboard/, where it is installed; checkpoints/, in Megatron-LM's layout; export/.

        minimax-m2 train --model checkpoint --data corpus.jsonl --out run --steps 1000 --seq-length 4096
        torchrun --nproc-per-node 8 --no-python minimax-m2 train --config run.yaml --tp 2 --ep 8

    SIGTERM or Ctrl-C ends it after the step that it is at, with a checkpoint, and with status 143 or 130; Ctrl-C again
    ends it at once. Without a GPU it trains on the processor, by gloo, for models that are small.
    """
    with reporting(), progress_bars() as progress:
        job = _job(config, given, files or [])
        if dry_run:
            if not _dry_run(job, gpus, memory, as_json):
                raise typer.Exit(1)
            return
        from bridge.training.train import train as run

        try:
            on_step = (lambda line: None) if as_json else _say_step
            summary = run(job, progress=progress, on_step=on_step, stop_signals=STOP_SIGNALS)
        except KeyboardInterrupt:
            say_line(_what_is_kept(job), label="interrupted:", console=errors)
            raise
    if as_json:
        say_json({name: str(v) if isinstance(v, Path) else v for name, v in summary._asdict().items()})
    else:
        made = f"steps {summary.first + 1} to {summary.last} are done"
        done = made if summary.last > summary.first else f"step {summary.last} was done before"
        say_line(f"{done}; {summary.checkpoint}")
        if summary.exported:
            say_line(f"exported to {summary.exported}")
    if summary.stopped_by is not None:
        say_line(_what_is_kept(job), label="stopped:", console=errors)
        raise typer.Exit(128 + (summary.stopped_by or signal.SIGTERM))


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or their metrics.jsonl.")],
    out: Annotated[Path, typer.Option(help="The picture to write: .png or .svg.")] = Path("training.png"),
) -> None:
    """Draw loss, gradient norm and tokens per second of one or more runs, over their steps."""
    with reporting():
        from bridge.training.plot import draw

        draw(runs, out)
    say_line(f"{out}")


def _job(config: Path | None, given: dict[str, Any], files: list[str]) -> TrainJob:
    values = read_yaml(config) if config else {}
    options = {name: value for name, value in given.items() if value is not None and value != []}
    if files:
        options["data"] = [*options.get("data", []), *files]
    return TrainJob.from_values(values | options, str(config) if config else "train")


def _what_is_kept(job: TrainJob) -> str:
    from bridge.training.checkpoints import latest_step
    from bridge.training.start import CHECKPOINTS

    try:
        step = latest_step(Path(job.out) / CHECKPOINTS)
    except ValueError as error:
        return str(error)
    if step is None:
        return "there is no checkpoint yet, and the same command begins anew"
    return f"the checkpoint of step {step} is kept, and the same command goes on from there"


def _say_step(line: dict[str, Any]) -> None:
    shown = [f"{name.replace('_', ' ')} {line[name]:{form}}" for name, form in SHOWN.items() if name in line]
    say_line(f"step {line['step']:>6}  {'  '.join(shown)}", console=errors if errors.is_terminal else None)


def _dry_run(job: TrainJob, gpus: int | None, memory: str, as_json: bool) -> bool:
    from bridge.training.dry_run import dry_run

    found = dry_run(job, gpus, memory)
    if as_json:
        say_json({"settings": found.settings, "plan": found.plan, "notes": found.notes, "fits": found.fits})
    elif is_rank_zero():
        say("settings", [(name, str(value)) for name, value in found.settings.items()])
        say("memory", [tuple(row) for row in found.rows], columns=tuple(found.headings))
        if found.advice:
            headings, rows = found.advice
            say("", [tuple(row) for row in rows], columns=tuple(headings))
        for line in (*found.lines, *found.notes):
            say_line(line)
    return found.fits


def _signature() -> inspect.Signature:
    """An option for each setting, whose value is None where it is not given: then YAML, or the default, has it."""
    types, kept = setting_types(), []
    for name, setting in setting_fields().items():
        kind, _ = optional(types[name])
        default = setting.default
        words = ", ".join(default) if isinstance(default, tuple) else str(default).lower()
        shown = "" if default in (MISSING, None, ()) else f" (default: {words})"
        extra: dict[str, Any] = {"help": setting.metadata["help"] + shown, "rich_help_panel": setting.metadata["panel"]}
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            if get_origin(item) is Literal:  # which typer has no lists of: `TrainJob` looks at the words
                extra["help"] += f"; of {', '.join(get_args(item))}"
                item = str
            kind = list[item]
        flag = "--" + name.replace("_", "-")
        flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
        option = typer.Option(*flags, show_default=False, **extra)
        kept.append((name, Annotated[kind | None, option], None))
    own = [
        ("files", Annotated[list[str] | None, typer.Argument(help="More files to train on.", show_default=False)],
         None),
        ("config", Annotated[Path | None, typer.Option(help="Settings in a YAML file.", show_default=False)], None),
        ("dry_run", Annotated[bool, typer.Option("--dry-run", help="Print the settings and what each rank would hold, "
                              "and stop: status 1 if it does not fit.")], False),
        ("gpus", Annotated[int | None, typer.Option(help="GPUs of a --dry-run, on other hosts if this one has none "
                           "(default: those of this command).", show_default=False)], None),
        ("memory", Annotated[str, typer.Option(help="Memory of a GPU, for a --dry-run.")], "80GB"),
        ("as_json", AsJson, False),
    ]  # fmt: skip
    kinds = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature([
        inspect.Parameter(name, kinds, default=default, annotation=annotation)
        for name, annotation, default in [own[0], *kept, *own[1:]]
    ])  # fmt: skip


train.__signature__ = _signature()  # pyright: ignore[reportFunctionMemberAccess]
train.__annotations__ = {name: one.annotation for name, one in train.__signature__.parameters.items()}  # pyright: ignore
