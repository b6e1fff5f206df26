"""Curves of one or more runs, from their metrics.jsonl."""

import math
from collections.abc import Sequence
from pathlib import Path

from bridge.training.metrics import read_metrics

SUFFIXES = (".png", ".svg")
# What is drawn, one below the other: the key of a line, and how its axis is called.
CURVES = {"loss": "loss", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
MARKED = 50  # runs of fewer steps have a dot at each


def draw(runs: Sequence[Path], out: Path) -> None:
    """Write the picture.

    Raises:
        ValueError: matplotlib is not installed, `out` is no .png or .svg, or a run has no metrics.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(SUFFIXES)}")
    found = {run: read_metrics(run) for run in runs}
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  # of the extra `train`
    except ImportError as error:
        raise ValueError("plot needs matplotlib; pip install -e '.[train]' brings it") from error
    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(len(CURVES), sharex=True)
    for axis, (key, label) in zip(axes, CURVES.items(), strict=True):
        for run, lines in found.items():
            if not lines:
                raise ValueError(f"{run}: has no step yet; train first")
            marker = "." if len(lines) < MARKED else ""
            steps, values = [one["step"] for one in lines], [one.get(key, math.nan) for one in lines]
            axis.plot(steps, values, marker=marker, label="run")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    for text, run in zip(axes[0].legend().get_texts(), found, strict=True):  # a label in `plot` is read: of _ and $
        text.set_parse_math(False)
        text.set_text(str(run))
    figure.savefig(out)
