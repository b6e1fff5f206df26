"""What `minimax-m2 validate` says of a checkpoint."""

import math
from pathlib import Path

import typer

from bridge.cli.common import default_workers, progress_bars, reporting, say, say_json, say_line
from bridge.jobs.ranks import TorchrunRanks


def validate_checkpoint_command(target: Path, source: Path, as_json: bool) -> None:
    """Judge a converted checkpoint by its original: a row for each kind of mistake. Exit status 1 if there is one."""
    with reporting(), TorchrunRanks(), progress_bars() as progress:
        from bridge.proof.judge_checkpoint import judge_checkpoint

        workers = default_workers(None, target, source)
        found = judge_checkpoint(target, source, workers=workers, progress=progress)
    if as_json:
        say_json({"holds": found.holds, **found._asdict()})
    else:
        rows = [*found.findings, *([found.unexplained] if found.unexplained else [])]
        if rows:
            columns = ("mistake", "tensors", "what happened, and what to do", "worst", "relative error")
            lines = [(one.name, f"{one.tensors:,}", one.said, one.worst, _shown(one.error)) for one in rows]
            say(f"{target} by {source}", lines, columns=columns)
        say_line(f"{found.right:,} of {found.tensors:,} weights are the original's")
    if not found.holds:
        raise typer.Exit(1)


def _shown(error: float) -> str:
    return "" if math.isnan(error) else f"{error:.2e}"
