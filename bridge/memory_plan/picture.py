"""A plan as a picture: a row for each rank, or for ranks that hold the same, with what it holds and what that weighs.

A row shows which of the model's layers and experts its ranks hold (a filled piece of a bar that stands for all of them)
and the bytes that training keeps, against a dashed line where the GPU's memory ends. Plain SVG: no script, no font, no
resource from elsewhere. Colours are Okabe and Ito's, told apart with any colour vision; text and ground follow the
reader's light or dark setting. Text is monospaced, so that its width is known where the columns are laid out.
"""

from itertools import groupby
from math import ceil
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from bridge.memory_plan.plan import Plan, RankGroup, rank_groups
from bridge.memory_plan.report import compact, experts_of, gigabytes, holds, runs, summary

MOST_ROWS = 64  # more ranks than this are drawn together
FONT, CHARACTER = 12, 7.3  # pixels: the font's size, and the width of one character with some room
LINE, GAP, MARGIN = 20, 18, 16
STRIP, BAR = 150, 420  # widths

STYLE = f"""
text {{ font: {FONT}px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", "Liberation Mono", monospace; }}
text {{ fill: #1f2328; }} .strong {{ font-weight: bold; }} .ground {{ fill: #ffffff; }}
.all {{ fill: #eaeef2; stroke: #6e7781; stroke-width: 0.5; }} .held {{ fill: #57606a; }}
.memory {{ stroke: #1f2328; stroke-width: 2; stroke-dasharray: 5 3; }}
.dense {{ fill: #0072b2; }} .expert {{ fill: #56b4e9; }} .gradients {{ fill: #009e73; }} .optimizer {{ fill: #e69f00; }}
@media (prefers-color-scheme: dark) {{
  text {{ fill: #e6edf3; }} .ground {{ fill: #0d1117; }} .memory {{ stroke: #e6edf3; }}
  .all {{ fill: #21262d; }} .held {{ fill: #b1bac4; }}
}}
"""
PARTS = {
    "dense": "weights, dense",
    "expert": "weights, experts",
    "gradients": "gradients",
    "optimizer": "optimizer",
}
ACTIVATIONS = {"activations": "activations"}  # of a plan with a workload
ACTIVATIONS_STYLE = ".activations { fill: #d55e00; }\n"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>:root {{ color-scheme: light dark; }} body {{ margin: 0; overflow-x: auto; }}</style></head>
<body>{svg}</body></html>
"""


def write_picture(plan: Plan, path: Path) -> None:
    """The picture as .svg, or in a page as .html; rows say more when the pointer rests on them.

    Raises:
        ValueError: the file's name ends otherwise.
    """
    if path.suffix not in (".svg", ".html"):
        raise ValueError(f"{path}: a picture's name must end in .svg or .html")
    svg = picture(plan)
    page = PAGE.format(title=summary(plan)[0], svg=svg)
    path.write_text(page if path.suffix == ".html" else svg + "\n", encoding="utf-8")


def picture(plan: Plan) -> str:
    """The plan as one `<svg>` element."""
    rows = rank_groups(plan, MOST_ROWS)
    lines = [f"MiniMax-M2, {summary(plan)[0]}", *summary(plan)[1:]]
    columns = _columns(plan, rows, lines)
    edge = columns.bar + BAR * plan.memory / max(plan.memory, plan.largest)
    svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": lines[0]})
    SubElement(svg, "style").text = STYLE + ACTIVATIONS_STYLE * (plan.workload is not None)
    ground = SubElement(svg, "rect", {"class": "ground"})
    y = top = _heading(svg, plan, columns, lines, edge)
    for _, of_stage in groupby(rows, key=lambda group: group.stage):
        held = list(of_stage)
        _text(svg, columns.ranks, y, _stage(plan, held[0]), strong=True)
        for number, group in enumerate(held, 1):
            _row(svg, plan, group, columns, y + number * LINE)
        y += (len(held) + 1) * LINE
    line = {"class": "memory", "x1": f"{edge:.1f}", "x2": f"{edge:.1f}", "y1": str(top - FONT), "y2": str(y - FONT)}
    SubElement(svg, "line", line)
    size = {"width": str(columns.right), "height": str(y)}
    ground.attrib |= size
    svg.attrib |= {"viewBox": f"0 0 {columns.right} {y}", **size}
    return tostring(svg, encoding="unicode")


class _Columns(NamedTuple):
    """Where each begins, and where the picture ends."""

    ranks: float
    layers: float
    strip: float
    experts: float
    bar: float
    totals: float
    right: int


def _columns(plan: Plan, rows: list[RankGroup], lines: list[str]) -> _Columns:
    layers = MARGIN + _width("ranks", *(_ranks(group) for group in rows)) + GAP
    strip = layers + STRIP + GAP
    experts = strip + STRIP + GAP
    words = experts + _width(*(experts_of(group) for group in rows))
    bar = max(words, MARGIN + _width(*(_stage(plan, group) for group in rows))) + GAP
    totals = bar + BAR + GAP
    right = max(totals + _width(*(_total(plan, group) for group in rows)), MARGIN + _width(*lines)) + MARGIN
    return _Columns(MARGIN, layers, strip, experts, bar, totals, ceil(right))


def _heading(svg: Element, plan: Plan, columns: _Columns, lines: list[str], edge: float) -> int:
    """Title, colours and the columns' names; the line below them."""
    y, x = MARGIN + LINE, columns.ranks
    for number, line in enumerate(lines):
        _text(svg, columns.ranks, y + number * LINE, line, strong=number == 0)
    y += len(lines) * LINE
    for part, name in _names(plan).items():
        _rect(svg, part, x, y - FONT + 1, FONT, FONT)
        _text(svg, x + FONT + 6, y, name)
        x += FONT + 6 + _width(name) + GAP
    y += 2 * LINE
    for at, name in ((columns.ranks, "ranks"), (columns.layers, "layers"), (columns.strip, "experts")):
        _text(svg, at, y, name)
    limit = f"memory {gigabytes(plan.memory)}"
    _text(svg, max(columns.bar, edge - _width(limit)), y, limit)
    return y + LINE


def _row(svg: Element, plan: Plan, group: RankGroup, columns: _Columns, y: int) -> None:
    row, x = SubElement(svg, "g", {"class": "row"}), columns.bar
    SubElement(row, "title").text = _details(plan, group)
    _text(row, columns.ranks, y, _ranks(group))
    _strip(row, columns.layers, y, group.layers, plan.config.num_hidden_layers)
    _strip(row, columns.strip, y, group.experts, plan.config.num_local_experts)
    _text(row, columns.experts, y, experts_of(group))
    for part, nbytes in _parts(plan, group).items():
        width = BAR * nbytes / max(plan.memory, plan.largest)
        _rect(row, part, x, y - FONT + 1, width, FONT + 2)
        x += width
    _text(row, columns.totals, y, _total(plan, group))


def _stage(plan: Plan, group: RankGroup) -> str:
    return f"pipeline rank {group.stage}: {holds(plan, group)}"


def _parts(plan: Plan, group: RankGroup) -> dict[str, int]:
    """Bytes of each part that a bar has; they add up to the group's total."""
    chosen = plan.chosen(group)
    expert = 2 * group.holding.expert
    parts = (chosen.weights - expert, expert, chosen.gradients, chosen.optimizer, chosen.activations)
    return dict(zip(_names(plan), parts, strict=False))


def _names(plan: Plan) -> dict[str, str]:
    """The parts of a bar, and what they are called."""
    return PARTS if plan.workload is None else PARTS | ACTIVATIONS


def _ranks(group: RankGroup) -> str:
    return compact(runs(group.ranks))


def _total(plan: Plan, group: RankGroup) -> str:
    """The bytes in words too: what lies beyond the line is not left to the eye."""
    total = plan.chosen(group).total
    return gigabytes(total) + (f", {gigabytes(total - plan.memory)} over" if total > plan.memory else "")


def _details(plan: Plan, group: RankGroup) -> str:
    chosen = plan.chosen(group)
    return "\n".join(
        [
            f"ranks {_ranks(group)}, pipeline rank {group.stage}",
            f"{holds(plan, group)}; experts {experts_of(group)}",
            f"{group.holding.total - group.holding.expert:,} dense and {group.holding.expert:,} expert parameters",
            f"weights {gigabytes(chosen.weights)}, gradients {gigabytes(chosen.gradients)}, "
            f"optimizer {gigabytes(chosen.optimizer)}"
            + (f", activations {gigabytes(chosen.activations)}" if plan.workload else ""),
            f"total {gigabytes(group.distributed.total)} with the distributed optimizer, "
            f"{gigabytes(group.replicated.total)} without",
        ]
    )


def _width(*texts: str) -> float:
    return CHARACTER * max(map(len, texts))


def _text(parent: Element, x: float, y: float, text: str, *, strong: bool = False) -> None:
    SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}"} | ({"class": "strong"} if strong else {})).text = text


def _rect(parent: Element, kind: str, x: float, y: float, width: float, height: float) -> None:
    sizes = {"x": x, "y": y, "width": width, "height": height}
    SubElement(parent, "rect", {"class": kind, **{name: f"{size:.2f}" for name, size in sizes.items()}})


def _strip(parent: Element, x: float, y: float, held: tuple[range, ...], count: int) -> None:
    """All `count` things as a bar, with those that are held filled."""
    _rect(parent, "all", x, y - FONT + 3, STRIP, FONT - 2)
    for run in held:
        _rect(parent, "held", x + STRIP * run.start / count, y - FONT + 3, STRIP * len(run) / count, FONT - 2)
