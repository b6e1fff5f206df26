"""`minimax-m2 validate`: whether somebody's layers, or a converted checkpoint, are MiniMax-M2's, and what is wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from bridge.cli.common import AsJson, progress_bars, reporting, say, say_json, say_line, say_notes
from bridge.cli.prove import ModelDtype
from bridge.jobs.ranks import launched_by_torchrun

if TYPE_CHECKING:
    from bridge.proof.judge.layouts import RunLayout
    from bridge.proof.judge.verdict import Judgement, LayoutVerdict

SHOWN = 5  # of the tensors that differ at a layout
QUICK = "quick"
COLOURS = {"holds": "green", "differs": "red", "cannot be run": "yellow"}


def validate(
    target: Annotated[str, typer.Argument(help="package.module:function, or the folder of a converted checkpoint.")],
    tp: Annotated[
        int | None, typer.Option(min=1, help="Tensor parallel size: one layout instead of --layouts.")
    ] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline parallel size.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Expert parallel size.")] = None,
    cp: Annotated[int | None, typer.Option(min=1, help="Context parallel size, for an attention that has it.")] = None,
    layouts: Annotated[str, typer.Option(help="quick (1 or 2 ranks) or full (up to 4).")] = QUICK,
    part: Annotated[
        str | None, typer.Option(help="TARGET is this part of the layer: q_norm, k_norm, router or attention.")
    ] = None,
    dtype: Annotated[ModelDtype, typer.Option(help="Dtype of the megatron-core model.")] = ModelDtype.FP32,
    source: Annotated[Path | None, typer.Option(help="For a checkpoint: the one it was made from.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run somebody's megatron-core layers on ranks of their own, and say which law of MiniMax-M2 they break.

    TARGET is a function that returns a layer spec, a block spec, a hybrid stack spec or a model; or the class of a
    part. Logits, loss, every gradient, the gradient norm and, in float32, two steps of gradient descent are compared
    with the reference's. Exit status 1 if something differs, 2 if TARGET cannot be run. A checkpoint is compared with
    --source.
    """
    if Path(target).exists():
        _validate_checkpoint(Path(target), source, as_json)
        return
    with reporting(), progress_bars() as progress:
        if launched_by_torchrun():
            raise ValueError("validate starts its own ranks: run it without torchrun")
        chosen = _layouts(layouts, {"tp": tp, "pp": pp, "ep": ep, "cp": cp})
        from bridge.proof.judge.target import Target

        judged = Target.of(target, part)
        import torch

        from bridge.proof.judge.judge import judge

        model_dtype = {ModelDtype.FP32: torch.float32, ModelDtype.BF16: torch.bfloat16}[dtype]
        found = judge(judged, chosen, dtype=model_dtype, progress=progress)
    if as_json:
        say_json(_as_json(found))
    else:
        _say(found)
    if found.exit_status:
        raise typer.Exit(found.exit_status)


def _validate_checkpoint(target: Path, source: Path | None, as_json: bool) -> None:
    with reporting():
        if source is None:
            raise ValueError(f"{target}: is a file or folder; a checkpoint needs --source, the one it was made from")
    from bridge.cli.validate_checkpoint import validate_checkpoint_command

    validate_checkpoint_command(target, source, as_json)


def _layouts(layouts: str, sizes: dict[str, int | None]) -> "tuple[RunLayout, ...]":
    from bridge.proof.judge.layouts import SETS, layout_of

    if layouts not in SETS:
        raise ValueError(f"--layouts {layouts}: expected {' or '.join(SETS)}")
    given = {name: size for name, size in sizes.items() if size is not None}
    if not given:
        return SETS[layouts]
    if layouts != QUICK:
        raise ValueError(f"--layouts {layouts} and --{' --'.join(given)}: give the sizes of one layout, or a set")
    return (layout_of(**{name: size or 1 for name, size in sizes.items()}),)


def _say(found: "Judgement") -> None:
    """The layouts, what differs at each, worst first; then a sentence for each fault."""
    from bridge.proof.judge.report import sentences, traceback_of

    rows = [row for layout in found.layouts for row in _rows(layout)]
    title = f"{found.target}: {found.kind}, {found.dtype}"
    say(title, rows, columns=("layout", "", "what differs, worst first", "relative error", "bound"))
    for name, sentence in sentences(found):
        say_line(sentence, label=f"{name}:")
    for line in traceback_of(found):
        say_line(f"    {line}")
    say_notes(found.notes)


def _rows(layout: "LayoutVerdict") -> list[tuple[str | Text, ...]]:
    status = Text(layout.status, COLOURS[layout.status])
    if layout.failure is not None:
        return [(layout.layout, status, "", "", "")]
    bound = f"{layout.bound:.1e}"
    differing = layout.differing
    if not differing:
        return [
            (layout.layout, status, f"nothing of {len(layout.errors)}", f"{max(layout.errors.values()):.1e}", bound)
        ]
    rows: list[tuple[str | Text, ...]] = [("", "", name, f"{error:.1e}", "") for name, error in differing[:SHOWN]]
    rows[0] = (layout.layout, status, *rows[0][2:4], bound)
    more = len(differing) - SHOWN
    return [*rows, ("", "", f"and {more} more of {len(layout.errors)}", "", "")] if more > 0 else rows


def _as_json(found: "Judgement") -> dict[str, Any]:
    return {
        "target": found.target,
        "kind": found.kind,
        "dtype": found.dtype,
        "status": found.status,
        "faults": list(found.faults),
        "notes": list(found.notes),
        "layouts": [
            {
                "layout": layout.layout,
                "status": layout.status,
                "bound": layout.bound,
                "compared": len(layout.errors),
                "faults": [fault.name for fault in layout.faults],
                "differing": dict(layout.differing),
                "failure": layout.failure,
            }
            for layout in found.layouts
        ],
    }
