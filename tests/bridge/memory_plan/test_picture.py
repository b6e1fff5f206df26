"""A plan's picture shows its numbers to scale, can be read, and needs no other file."""

from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from support.plans import full_plan, large, too_large, working

from bridge.memory_plan.picture import ACTIVATIONS, CHARACTER, FONT, PARTS, picture, write_picture
from bridge.memory_plan.plan import rank_groups
from bridge.memory_plan.report import gigabytes

pytestmark = pytest.mark.usefixtures("types_unchecked")

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {
    "512 ranks": large,
    "512 ranks, activations": working,
    "8 ranks, too large": too_large,
    "one rank": lambda: full_plan(1),
    "62 stages": lambda: full_plan(62, pp=62),
    "1024 ranks, virtual stages": lambda: full_plan(1024, tp=4, pp=16, vpp=3, ep=64, etp=1),
    "memory hardly seen": lambda: full_plan(8, "1GB", ep=8),
    "memory never reached": lambda: full_plan(8, "100TB", ep=8),
}


class Box(NamedTuple):
    """A rectangle, and whose it is."""

    left: float
    top: float
    right: float
    bottom: float
    what: str


def boxes(svg: ElementTree.Element) -> tuple[list[Box], list[Box], list[Box]]:
    """Of texts, of rectangles but the ground, and of the memory line."""
    texts, rects, lines = [], [], []
    for element in svg.iter():
        if element.tag == f"{SVG}text":
            x, y, text = float(element.get("x")), float(element.get("y")), element.text
            texts.append(Box(x, y - 0.8 * FONT, x + 0.602 * FONT * len(text), y + 0.25 * FONT, text))
        elif element.tag == f"{SVG}rect" and element.get("class") != "ground":
            x, y, width, height = (float(element.get(name)) for name in ("x", "y", "width", "height"))
            rects.append(Box(x, y, x + width, y + height, element.get("class")))
        elif element.tag == f"{SVG}line":
            x1, x2, y1, y2 = (float(element.get(name)) for name in ("x1", "x2", "y1", "y2"))
            lines.append(Box(x1 - 1, y1, x2 + 1, y2, "memory"))
    return texts, rects, lines


def overlap(one: Box, other: Box) -> bool:
    return one.left < other.right and other.left < one.right and one.top < other.bottom and other.top < one.bottom


@pytest.mark.parametrize("planned", DRAWN.values(), ids=DRAWN)
def test_nothing_in_the_picture_overlaps_or_leaves_it(planned):
    svg = ElementTree.fromstring(picture(planned()))
    texts, rects, lines = boxes(svg)
    _, _, right, bottom = map(float, svg.get("viewBox").split())
    for box in texts + rects + lines:
        assert 0 <= box.left <= box.right <= right, box
        assert 0 <= box.top <= box.bottom <= bottom, box
    for one, other in combinations(texts, 2):
        assert not overlap(one, other), (one, other)
    for text in texts:
        assert not [box for box in rects + lines if overlap(text, box)], text
    ground = svg.find(f"{SVG}rect")
    assert (ground.get("class"), float(ground.get("width")), float(ground.get("height"))) == ("ground", right, bottom)
    assert CHARACTER >= 0.602 * FONT  # a character of the fonts named in the picture


@pytest.mark.parametrize("planned", [large, too_large, working])
def test_bars_are_the_bytes(planned):
    """Each bar's parts, measured against the distance from its start to the memory line."""
    found = planned()
    svg = ElementTree.fromstring(picture(found))
    line = float(svg.find(f"{SVG}line").get("x1"))
    rows = svg.findall(f"{SVG}g")
    expected = rank_groups(found, 64)
    assert len(rows) == len(expected)
    for row, group in zip(rows, expected, strict=True):
        named = PARTS if found.workload is None else PARTS | ACTIVATIONS
        classes = {rect.get("class"): rect for rect in row.iter(f"{SVG}rect")}
        parts = {name: rect for name, rect in classes.items() if name not in ("all", "held")}
        assert list(parts) == list(named)
        start = float(parts["dense"].get("x"))
        measured = [float(rect.get("width")) / (line - start) * found.memory for rect in parts.values()]
        experts = 2 * group.holding.expert
        chosen = group.distributed
        truth = [chosen.weights - experts, experts, chosen.gradients, chosen.optimizer]
        truth += [chosen.activations] * (found.workload is not None)
        pixel = found.memory / (line - start)
        assert measured == pytest.approx(truth, rel=0.01, abs=0.1 * pixel)
        ends = start + sum(float(rect.get("width")) for rect in parts.values())
        assert (ends > line) == (chosen.total > found.memory)
        held = [rect for rect in row.iter(f"{SVG}rect") if rect.get("class") == "held"]
        strips = [rect for rect in row.iter(f"{SVG}rect") if rect.get("class") == "all"]
        for rect, strip, run, count in zip(held, strips, [group.layers[0], group.experts[0]], [62, 256], strict=True):
            width = float(strip.get("width"))
            assert float(rect.get("x")) - float(strip.get("x")) == pytest.approx(width * run.start / count, abs=0.02)
            assert float(rect.get("width")) == pytest.approx(width * len(run) / count, abs=0.02)


def test_rows_say_more_in_their_titles():
    svg = ElementTree.fromstring(picture(too_large()))
    titles = [row.find(f"{SVG}title").text for row in svg.findall(f"{SVG}g")]
    assert len(titles) == 8
    for words in ("ranks 5,", "layers 31-61, norm and head", "experts 128-255", "1029.28 GB without", "686.22 GB with"):
        assert words in titles[5]
    row = ElementTree.fromstring(picture(working())).find(f"{SVG}g/{SVG}title").text
    assert f"activations {gigabytes(working().ranks[0].distributed.activations)}" in row
    assert "activations" not in titles[5]
    totals = [text.text for text in svg.iter(f"{SVG}text") if text.text.endswith(" over")]
    assert totals == ["686.22 GB, 606.22 GB over"] * 8


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_files_need_nothing_else(tmp_path: Path):
    for name in ("plan.svg", "plan.html"):
        write_picture(large(), tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        tags = Tags()
        tags.feed(text)
        assert not {"script", "img", "link", "image", "use"} & {tag for tag, _ in tags.found}
        assert not [attrs for _, attrs in tags.found if {"href", "src", "xlink:href", "onload"} & attrs.keys()]
        assert text.replace("http://www.w3.org/2000/svg", "").count("://") == 0
        assert "url(" not in text
        assert "@import" not in text
    svg, page = (tmp_path / "plan.svg").read_text(), (tmp_path / "plan.html").read_text()
    assert svg.strip() in page
    assert page.startswith("<!DOCTYPE html>")
    with pytest.raises(ValueError, match=r"must end in \.svg or \.html"):
        write_picture(large(), tmp_path / "plan.png")


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_on_both_grounds():
    """WCAG's 4.5 : 1 for text; the colours of a bar's neighbours differ in lightness, whatever the colour vision."""
    style = ElementTree.fromstring(picture(working())).find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for part in (light, dark):
        colors = dict.fromkeys(("text", ".ground"))
        for selector in colors:
            rule = next(r for r in part.split("}") if selector in r.split("{")[-2] and "fill" in r)
            colors[selector] = rule.split("fill: ")[1][:7]
        assert contrast(colors["text"], colors[".ground"]) > 4.5
    fills = [style.split(f".{part} {{ fill: ")[1][:7] for part in PARTS | ACTIVATIONS]
    for one, other in pairwise(fills):
        assert contrast(one, other) > 1.35
