"""What the verbs of the command share: options, how errors end a run, progress, and how results are said.

Whatever is printed goes through `printable`: names of tensors and files, config values and errors that quote them are
text from files, which must neither steer the terminal nor fail to be printed.
"""

import json
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from click import ClickException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bridge.jobs.escaped import escaped
from bridge.jobs.ranks import all_gather_objects, is_rank_zero, raise_on_all_ranks
from bridge.jobs.third_party_logs import drop_remark_on_gpus
from reference.model_class import ModelClass

LOG_WIDTH = 160  # where no terminal says how wide it is: names of tensors are long

output = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
errors = Console(stderr=True)

CheckpointPath = Annotated[Path, typer.Argument(help="A folder with a Hugging Face checkpoint, or a hub id.")]
Model = Annotated[ModelClass, typer.Option(help="megatron-core's GPTModel, or its successor HybridModel.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a checkpoint that is in the output folder.")]
DryRun = Annotated[bool, typer.Option(help="Say what would be read and written, and stop.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Local processes (default: one a core, at most 8; one below 2 GB); torchrun has its own."),
]

# What gloo and NCCL say where another rank has ended.
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")

SMALL_BYTES, MOST_WORKERS = 2 * 10**9, 8


def default_workers(workers: int | None, *folders: Path) -> int:
    """Starting a process costs seconds: small work, by the bytes of the folders' files, is done in this one."""
    if workers is not None:
        return workers
    nbytes = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return 1 if nbytes < SMALL_BYTES else min(MOST_WORKERS, os.cpu_count() or 1)


@contextmanager
def reporting() -> Iterator[None]:
    """Errors as one message on stderr and status 2; what our own log says as notes there; third-party start-up noise
    silenced."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    drop_remark_on_gpus()
    try:
        with _notes():
            yield
    except (ValueError, OSError) as error:
        first, *others = "\n".join([str(error), *getattr(error, "__notes__", [])]).split("\n")
        say_line(first, label="error:", console=errors)
        for line in others:  # set in: a name with a newline must not look like another message
            say_line(f"       {line}", console=errors)
        raise typer.Exit(2) from error


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say_line(record.getMessage(), label="note:", console=errors)


@contextmanager
def _notes() -> Iterator[None]:
    """What `bridge` logs is shown as notes, once, whatever other packages do with the root logger."""
    log, handler = logging.getLogger("bridge"), _Notes()
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = True


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose unexpected errors say that they are a bug and end with status 2: 1 means that something differs."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, ClickException):
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and any(words in str(error).split("\n")[0] for words in LOST):
                _say_error("the connection to another rank is lost: it has ended, and what it said says why")
            else:
                _say_bug(error)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(128 + signal.SIGINT) from error

    return run


def _say_bug(error: Exception) -> None:
    """On the rank that it happened to: the others may know nothing of it."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        errors.print(Text(printable(line, errors)), soft_wrap=True)
    _say_error(
        f"a bug in minimax-m2 ({type(error).__name__}), not in your files; please report it with the lines above"
    )


def _say_error(said: str) -> None:
    errors.print(Text.assemble(("error: ", "red"), said), soft_wrap=True)


@contextmanager
def folder(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, or one that is deleted when the block or the process ends; on all ranks the same."""
    if keep is not None:
        yield keep
        return
    with ExitStack() as stack:
        with raise_on_all_ranks():
            make = tempfile.TemporaryDirectory(prefix="minimax-m2-") if is_rank_zero() else nullcontext()
            made = stack.enter_context(make)
            if made is not None:
                stack.enter_context(_deleted_by_signals(made))
        yield Path(all_gather_objects(made)[0])


@contextmanager
def _deleted_by_signals(path: str) -> Iterator[None]:
    """SIGTERM and SIGHUP delete a folder before they end the process; the status is the shell's, 143 and 129.

    The handler does both itself: an exception could be raised where nothing lets it through.
    """

    def leave(number: int, _: object) -> None:
        shutil.rmtree(path, ignore_errors=True)
        os._exit(128 + number)

    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    ours = [one for one, handler in before.items() if handler is signal.SIG_DFL]  # nohup's stays as it is
    for one in ours:
        signal.signal(one, leave)
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, signal.SIG_DFL)


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def progress_bars() -> Iterator:
    """A `Progress` that draws a bar for each loop on stderr: on a terminal, and on rank 0 only."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not (errors.is_terminal and is_rank_zero())) as bars:

        def progress(iterable: Iterable, what: str, length: int) -> Iterable:
            return bars.track(iterable, total=length, description=what)

        yield progress


def printable(text: str, console: Console) -> str:
    r"""Text of any origin, in one line that does nothing to a terminal: what `repr` would escape is escaped.

    That is control characters (\x1b), newlines, marks that turn the writing direction, lone surrogates and the like,
    and what the console's encoding lacks.
    """
    return escaped(text).encode(console.encoding, "backslashreplace").decode(console.encoding)


def say_line(text: str, *, label: str = "", console: Console | None = None) -> None:
    """One line, however long, after a red label; on rank 0, on stdout by default."""
    if not is_rank_zero():
        return
    console = console or output
    console.print(Text.assemble((f"{label} " if label else "", "red"), printable(text, console)), soft_wrap=True)


def say(title: str, rows: Iterable[tuple[str | Text, ...]], *, columns: tuple[str, ...] = ()) -> None:
    """A table on stdout, on rank 0; without `columns` it has no header. A cell that is a `Text` has its own style."""
    if not is_rank_zero():
        return
    rows = list(rows)
    table = Table(title=_cell(title), title_justify="left", show_header=bool(columns))
    for name in columns or ("" for _ in rows[0]):
        table.add_column(name, overflow="fold")  # names of tensors are long, and are copied from here
    for row in rows:
        table.add_row(*map(_cell, row))
    output.print(table)


def _cell(text: str | Text) -> Text:
    return text if isinstance(text, Text) else Text(printable(text, output))


def say_notes(notes: Iterable[str]) -> None:
    """A line each on stderr, on rank 0."""
    for note in dict.fromkeys(notes) if is_rank_zero() else ():
        say_line(note, label="note:", console=errors)


def say_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, on rank 0; what is not a number there is null, what is not ASCII is escaped."""
    if is_rank_zero():
        print(json.dumps(_plain(value), indent=2).replace("\x7f", "\\u007f"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
