"""A plan says what megatron-core then builds; its words, JSON and picture say the same as its numbers."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch
from xml.etree import ElementTree

import jaxtyping
import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from bridge import plan_report, planning
from bridge.plan_picture import CHARACTER, FONT, PARTS, picture, write_picture
from bridge.plan_report import NOT_COUNTED, advice_rows, compact, flags, runs, summary, table, to_json
from bridge.planning import Plan, advice, layout, parse_layers, parse_memory, plan, read_config, tiles
from bridge.provider import build_gpt_model
from bridge.single_process import model_parallel
from reference.config import ModelConfig

FULL = ModelConfig(rotary_dim=64)
SMALL = ModelConfig(
    num_hidden_layers=4,
    hidden_size=64,
    vocab_size=96,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    rotary_dim=8,
    intermediate_size=32,
    num_local_experts=8,
    num_experts_per_tok=2,
)


@pytest.fixture(scope="module", autouse=True)
def types_unchecked() -> Iterator[None]:
    """Searching layouts is thousands of calls."""
    with patch.object(jaxtyping.config, "jaxtyping_disable", True):
        yield


def full_plan(gpus: int, memory: str = "80GB", distributed_optimizer: bool = True, **sizes: int) -> Plan:
    parallelism = layout(FULL, gpus=gpus, **sizes)
    return plan(FULL, parallelism, memory=parse_memory(memory), distributed_optimizer=distributed_optimizer)


def large() -> Plan:
    return full_plan(512, tp=8, pp=8, ep=8, etp=1)


def too_large() -> Plan:
    return full_plan(8, tp=2, pp=2, ep=2, etp=1)


# ------------------------------------------------------------------------------------ what megatron-core then builds


class Built(NamedTuple):
    """Bytes of a rank's weights; layers; and (bytes of gradients, of optimizer state on this rank) of its buffers."""

    weights: int
    layers: int
    replicas: list[tuple[torch.dtype, int, int]]


def build(parallelism, rank: int) -> Built:
    """The rank's model and gradient buffers. Its process groups say who its peers are and never speak to them."""
    sizes = {
        "tensor_model_parallel_size": parallelism.tp,
        "pipeline_model_parallel_size": parallelism.pp,
        "expert_model_parallel_size": parallelism.ep,
        "expert_tensor_parallel_size": parallelism.expert_tp,
    }
    # The local attention refuses a config with context parallelism, which changes the groups but no weight.
    groups = {**sizes, "context_parallel_size": parallelism.cp, "create_gloo_process_groups": False}
    stage = parallelism.coordinates(rank).pp
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallelism.world_size)
    try:
        with model_parallel(**groups):
            model = build_gpt_model(
                SMALL,
                backend="local",
                pre_process=stage == 0,
                post_process=stage == parallelism.pp - 1,
                sequence_parallel=parallelism.tp > 1,
                perform_initialization=False,
                **sizes,
            )
            held = [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("expert_bias"))]
            weights, layers = sum(tensor.nbytes for tensor in held), len(model.decoder.layers)
            ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            ddp = DistributedDataParallel(model.config, ddp_config, model)
            buffers = [
                (buffer.param_dtype, sum(p.main_grad.nbytes for p in buffer.params), buffer.data_parallel_world_size)
                for buffer in ddp.buffers + ddp.expert_parallel_buffers
            ]
            return Built(weights, layers, buffers)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.is_available(), reason="process groups that never speak are the CPU's")
@pytest.mark.parametrize(
    ("gpus", "sizes"),
    [
        (1, {}),
        (16, {"tp": 4, "pp": 2, "ep": 2, "etp": 2}),
        (16, {"tp": 2, "pp": 2, "ep": 4, "etp": 1, "cp": 2}),
        (8, {"tp": 2}),
    ],
)
def test_every_rank_weighs_what_megatron_core_builds(gpus, sizes):
    """Weights, gradients and the number of ranks that share a buffer are megatron-core's; state is 12 or 8 B on top."""
    planned = plan(SMALL, layout(SMALL, gpus=gpus, **sizes), memory=10**9)
    for tile in planned.ranks[:: max(1, gpus // 4)]:
        built = build(planned.parallelism, tile.ranks[0])
        assert built.weights == tile.distributed.weights == tile.replicated.weights
        assert built.layers == sum(map(len, tile.layers))
        gradients = sum(nbytes for _, nbytes, _ in built.replicas)
        assert gradients == tile.distributed.gradients == tile.replicated.gradients
        state = {torch.bfloat16: 12, torch.float32: 8}
        shares = [(state[dtype], -(-nbytes // 4 // ranks)) for dtype, nbytes, ranks in built.replicas]
        assert tile.distributed.optimizer == sum(a_parameter * share for a_parameter, share in shares)
        assert tile.replicated.optimizer == sum(state[dtype] * nbytes // 4 for dtype, nbytes, _ in built.replicas)


def test_the_full_model_by_hand():
    """Stage 1 of tp 8, pp 8, ep 8 on 512 GPUs: 8 layers; dp 8, expert-dp 8."""
    planned = large()
    tile = planned.ranks[64]
    dense = 8 * (3072 * 8192 // 8 + 3072 * 6144 // 8 + 2 * 3072 + 768 + 128)
    expert, router = 8 * 32 * 3 * 1536 * 3072, 8 * 256 * 3072
    weights, gradients = 2 * (dense + expert) + 4 * (router + 8 * 256), 4 * (dense + expert + router)
    state = 12 * (dense + expert) + 8 * router
    assert tile.replicated.total == weights + gradients + state
    assert tile.distributed.total == weights + gradients + state // 8
    assert planned.largest == tile.distributed.total
    assert planned.headroom == 80 * 10**9 - planned.largest
    assert planned._replace(distributed_optimizer=False).largest == tile.replicated.total
    assert (tile.layers, tile.experts) == ((range(7, 15),), (range(32),))
    assert planned.ranks[69].experts == (range(5 * 32, 6 * 32),)


# --------------------------------------------------------------------------------------------- what a user writes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GB", 80 * 10**9), ("80GiB", 80 * 2**30), ("79.5 gb", 795 * 10**8), ("1TB", 10**12), ("512MiB", 2**29)],
)
def test_memory(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["80", "80G", "GB", "", "-80GB", "0GB", "1e3GB", "80 GB each", "nanGB", "٨GB", "80KB"])
def test_memory_that_is_none(text):
    with pytest.raises(ValueError, match=r"positive number with a unit: MB, GB, TB .* MiB, GiB, TiB"):
        parse_memory(text)


def test_layers_per_stage():
    assert parse_layers("15, 16,16,15") == (15, 16, 16, 15)
    for text in ("", "15,,16", "15;16", "a", "-1,2", "1.5,2"):
        with pytest.raises(ValueError, match="numbers with commas"):
            parse_layers(text)


def test_layout_finds_data_parallel_and_spreads_layers():
    found = layout(FULL, gpus=512, tp=8, pp=8, ep=8, etp=1, cp=2)
    assert (found.dp, found.world_size) == (4, 512)
    assert found.layers_per_stage == (7, 8, 8, 8, 8, 8, 8, 7)
    assert layout(FULL, gpus=2, pp=2).layers_per_stage is None
    assert layout(FULL, gpus=4, pp=4, layers_per_stage=(10, 20, 20, 12)).layers_per_stage == (10, 20, 20, 12)


@pytest.mark.parametrize(
    ("gpus", "sizes", "message"),
    [
        (12, {"tp": 8}, r"gpus \(12\) must be a positive multiple of tp x cp x pp = 8 x 1 x 1 = 8"),
        (0, {}, r"gpus \(0\)"),
        (-8, {"tp": 8}, r"gpus \(-8\)"),
        (8, {"tp": 0}, "tp must be a positive integer, found 0"),
        (8, {"pp": -1}, "pp must be a positive integer"),
        (8, {"ep": 0}, "ep must be a positive integer"),
        (8, {"etp": 0}, "etp must be a positive integer"),
        (8, {"ep": 16}, "raise dp or lower ep"),
        (7, {"tp": 7}, "num_attention_heads"),
        (3, {"ep": 3}, r"num_local_experts \(256\) must be divisible by ep \(3\)"),
        (4, {"vpp": 2}, "vpp .2. needs pp of at least 2"),
        (2, {"pp": 2, "layers_per_stage": (30, 30)}, "add up to 62"),
    ],
)
def test_sizes_that_do_not_go_together(gpus, sizes, message):
    with pytest.raises(ValueError, match=message):
        layout(FULL, gpus=gpus, **sizes)


def test_config_of_a_folder_without_weights_and_of_a_file(checkpoint: Path, tmp_path: Path):
    expected = read_config(checkpoint)
    assert expected.num_local_experts == 5
    alone = tmp_path / "config.json"
    alone.write_bytes((checkpoint / "config.json").read_bytes())
    assert read_config(tmp_path) == read_config(alone) == expected


def test_config_of_a_hub_id_fetches_config_json_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(checkpoint / name)

    monkeypatch.setattr(planning, "hf_hub_download", fetch)
    assert read_config("owner/name") == read_config(checkpoint)
    assert asked == [("owner/name", "config.json")]


def test_config_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="not there"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="not there"):
        read_config(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type"):
        read_config(tmp_path)

    def unreachable(*_: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr(planning, "hf_hub_download", unreachable)
    with pytest.raises(ValueError, match=r"owner/name: no such local folder, and the hub .*offline"):
        read_config("owner/name")


# ---------------------------------------------------------------------------------------------------- how it is said


def test_ranks_that_hold_the_same_stand_together():
    planned = large()
    assert [tile.ranks for tile in tiles(planned, 512)] == [(rank,) for rank in range(512)]
    for most, count in ((511, 64), (64, 64), (63, 8), (1, 8)):
        grouped = tiles(planned, most)
        assert len(grouped) == count
        assert sorted(rank for tile in grouped for rank in tile.ranks) == list(range(512))
        for tile in grouped:
            for rank in tile.ranks:
                alone = planned.ranks[rank]
                assert alone._replace(ranks=tile.ranks, experts=tile.experts) == tile
                assert alone.experts[0] in tile.experts
            assert len(tile.experts) == (1 if count == 64 else 8)


def test_numbers_in_words():
    assert runs([0, 1, 2, 8, 9, 12]) == [range(3), range(8, 10), range(12, 13)]
    assert compact(runs([0, 1, 2, 8, 9, 12])) == "0-2, 8-9, 12"
    assert compact(runs(range(0, 64, 8))) == "0, 8, …, 56"
    assert compact([range(3, 3)]) == "none"


def test_table_of_512_ranks():
    headings, rows = table(large())
    assert headings[-2:] == ["total, with distributed optimizer", "without distributed optimizer"]
    assert len(rows) == 8
    assert {len(row) for row in rows} == {len(headings)}
    assert rows[0][:3] == ["0-63", "embedding, layers 0-6", "0-31, 32-63, …, 224-255 (32 a rank)"]
    assert rows[1] == [
        "64-127", "layers 7-14", "0-31, 32-63, …, 224-255 (32 a rank)", "0.050 + 3.624 B",
        "7.36 GB", "14.70 GB", "5.51 GB", "27.57 GB", "66.12 GB",
    ]  # fmt: skip
    assert rows[-1][:2] == ["448-511", "layers 55-61, norm and head"]
    headings, rows = table(large()._replace(distributed_optimizer=False))
    assert headings[-2:] == ["total, without distributed optimizer", "with distributed optimizer"]
    assert rows[1][-2:] == ["66.12 GB", "27.57 GB"]


def test_table_of_8_ranks_names_each():
    _, rows = table(too_large())
    assert [row[:3] for row in rows[3:5]] == [
        ["3", "embedding, layers 0-30", "128-255"],
        ["4", "layers 31-61, norm and head", "0-127"],
    ]


def test_virtual_chunks():
    planned = full_plan(2, pp=2, vpp=2)
    assert planned.parallelism.layers_per_stage == (15, 16, 16, 15)
    assert [row[1] for row in table(planned)[1]] == [
        "embedding, layers 0-14, 31-46",
        "layers 15-30, 47-61, norm and head",
    ]


def test_a_plan_that_fits_needs_no_advice():
    planned = large()
    assert advice(planned) is None
    lines = summary(planned)
    assert lines[0] == "228.7 B parameters on 512 GPUs: tp 8, cp 1, dp 8, pp 8, vpp 1, ep 8, etp 1"
    assert lines[1:] == ["fullest rank: 27.57 GB of 80.00 GB; fits, 52.43 GB left", NOT_COUNTED]


def test_advice_can_be_followed():
    """The options that are printed, read as the command would, give the plan that was promised."""
    planned = full_plan(64, distributed_optimizer=False, tp=2, pp=2, ep=2, etp=1)
    found = advice(planned)
    assert found.gpus == 64
    assert summary(planned, found) == summary(planned)  # nothing to add: some layout of these GPUs fits
    assert "DOES NOT FIT" in summary(planned)[1]
    headings, rows = advice_rows(found)
    assert headings[0] == "layouts of 64 GPUs that fit"
    assert 2 <= len(rows) <= 5
    for (options, changes, largest), fit in zip(rows, found.fits, strict=True):
        assert changes
        words = options.split()
        on = "--no-distributed-optimizer" not in words
        sizes = {name[2:]: int(size) for name, size in zip(words[::2], words[1::2], strict=False)}
        again = full_plan(64, distributed_optimizer=on, **sizes)
        assert again.parallelism == fit.parallelism
        assert again.headroom >= 0
        assert plan_report.gigabytes(again.largest) == largest


def test_options_name_layers_that_are_not_the_default():
    planned = full_plan(64, "50GB", tp=2, pp=4, ep=2, layers_per_stage=(14, 17, 17, 14))
    found = advice(planned)
    for fit in found.fits:
        assert ("--layers-per-stage 14,17,17,14" in flags(fit)) == (fit.parallelism.pp == 4)
    assert any(fit.parallelism.pp == 4 for fit in found.fits)


def test_where_no_layout_of_these_gpus_fits():
    planned = too_large()
    found = advice(planned)
    assert found.gpus == 64  # 16 B of weights, gradients and state a parameter and more: 8 x 80 GB can not be enough
    assert 228.7 * 16 > 32 * 80
    assert summary(planned, found)[-1] == (
        "no layout of these 8 GPUs fits: the least is 514.83 GB with --tp 4 --pp 2 --ep 2 --etp 2; 64 would do"
    )
    hopeless = planned._replace(memory=10**9)
    assert summary(hopeless, advice(hopeless))[-1].endswith("nor do 128")


def test_json_has_every_rank():
    planned = too_large()
    said = json.loads(json.dumps(to_json(planned)))
    assert (said["gpus"], said["largest"], said["headroom"]) == (8, planned.largest, planned.headroom)
    assert said["sizes"]["dp"] == 2
    assert [rank["rank"] for rank in said["ranks"]] == list(range(8))
    assert said["ranks"][5] == {
        "rank": 5,
        "pipeline_rank": 1,
        "layers": [[31, 62]],
        "experts": [128, 256],
        "parameters": planned.ranks[5].holding._asdict(),
        "without_distributed_optimizer": planned.ranks[5].replicated._asdict(),
        "with_distributed_optimizer": planned.ranks[5].distributed._asdict(),
    }
    assert said["advice"]["gpus"] == 64
    assert said["advice"]["fits"][0]["largest"] <= said["memory"]
    assert to_json(large())["advice"] is None


def test_512_ranks_of_the_full_model_in_time():
    """The issue asks for 2 s a rank; this is all ranks, their table, JSON and picture, and no weights in the folder."""
    start = time.process_time()
    planned = large()
    table(planned)
    to_json(planned)
    picture(planned)
    assert time.process_time() - start < 2


def test_planning_does_not_load_megatron():
    code = "import sys, bridge.plan_picture; print('megatron' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


# -------------------------------------------------------------------------------------------------------- the picture

SVG = "{http://www.w3.org/2000/svg}"
DRAWN = {
    "512 ranks": large,
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


@pytest.mark.parametrize("planned", [large, too_large])
def test_bars_are_the_bytes(planned):
    """Each bar's parts, measured against the distance from its start to the memory line."""
    found = planned()
    svg = ElementTree.fromstring(picture(found))
    line = float(svg.find(f"{SVG}line").get("x1"))
    rows = svg.findall(f"{SVG}g")
    expected = tiles(found, 64)
    assert len(rows) == len(expected)
    for row, tile in zip(rows, expected, strict=True):
        parts = {rect.get("class"): rect for rect in row.iter(f"{SVG}rect") if rect.get("class") in PARTS}
        assert list(parts) == list(PARTS)
        start = float(parts["dense"].get("x"))
        measured = [float(rect.get("width")) / (line - start) * found.memory for rect in parts.values()]
        experts = 2 * tile.holding.expert
        chosen = tile.distributed
        truth = [chosen.weights - experts, experts, chosen.gradients, chosen.optimizer]
        pixel = found.memory / (line - start)
        assert measured == pytest.approx(truth, rel=0.01, abs=0.1 * pixel)
        ends = start + sum(float(rect.get("width")) for rect in parts.values())
        assert (ends > line) == (chosen.total > found.memory)
        held = [rect for rect in row.iter(f"{SVG}rect") if rect.get("class") == "held"]
        strips = [rect for rect in row.iter(f"{SVG}rect") if rect.get("class") == "all"]
        for rect, strip, run, count in zip(held, strips, [tile.layers[0], tile.experts[0]], [62, 256], strict=True):
            width = float(strip.get("width"))
            assert float(rect.get("x")) - float(strip.get("x")) == pytest.approx(width * run.start / count, abs=0.02)
            assert float(rect.get("width")) == pytest.approx(width * len(run) / count, abs=0.02)


def test_rows_say_more_in_their_titles():
    svg = ElementTree.fromstring(picture(too_large()))
    titles = [row.find(f"{SVG}title").text for row in svg.findall(f"{SVG}g")]
    assert len(titles) == 8
    for words in ("ranks 5,", "layers 31-61, norm and head", "experts 128-255", "1029.28 GB without", "686.22 GB with"):
        assert words in titles[5]
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
    style = ElementTree.fromstring(picture(large())).find(f"{SVG}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for part in (light, dark):
        colors = dict.fromkeys(("text", ".ground"))
        for selector in colors:
            rule = next(r for r in part.split("}") if selector in r.split("{")[-2] and "fill" in r)
            colors[selector] = rule.split("fill: ")[1][:7]
        assert contrast(colors["text"], colors[".ground"]) > 4.5
    fills = [light.split(f".{part} {{ fill: ")[1][:7] for part in PARTS]
    for one, other in pairwise(fills):
        assert contrast(one, other) > 1.35
