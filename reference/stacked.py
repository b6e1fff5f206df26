"""Checkpoints that store weights as transformers keeps them in memory: the experts of a layer stacked in one tensor.

`gate_up_proj` [experts, 2 width, hidden] has w1 over w3, `down_proj` [experts, hidden, width] is w2. Rows of a stack
are one after another in the file, so that each on-disk weight is a run of its elements: a view, which costs nothing.
Scales of a float8 stack are stacked likewise, if w1 ends where a block ends.

Source: `transformers` conversion_mapping (minimax_m2), finegrained_fp8: FP8Experts.
"""

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import torch

from reference.config import ModelConfig
from reference.findings import Findings
from reference.fp8 import scale_grid
from reference.names import SCALE_SUFFIX, WeightKey, find
from reference.weights import Dialect, Row, Scope

Header = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class View(NamedTuple):
    """A tensor that lies inside another: its shape, in order, from element `start` of `source` on."""

    source: str
    start: int
    shape: tuple[int, ...]


class Unstacked(NamedTuple):
    """On-disk names as views of stored tensors, the stored ones' names, and the rows whose stacks cannot be viewed."""

    views: dict[str, View]
    stored: set[str]
    wrong: set[Row]


def unstack(found: Header, config: ModelConfig, findings: Findings) -> Unstacked:
    """Where the weights lie that have `transformers`' in-memory names; what is wrong with them goes into `findings`."""
    unstacked = Unstacked({}, set(), set())
    for name in found:
        if ".mlp." not in name:  # looking a name up takes ten times as long
            continue
        weight = name.removesuffix(SCALE_SUFFIX)
        key = find(weight, Dialect.HF_MEMORY)
        if key is None or key.layer >= config.num_hidden_layers or find(weight, Dialect.HF_DISK):
            continue
        unstacked.stored.add(name)
        if complaint := _complaint(name, found, key, config):
            findings.add((key.row, complaint), name, complaint)
            unstacked.wrong.add(key.row)
        else:
            unstacked.views.update(_views(name, key, config))
    for name, view in unstacked.views.items():
        if name in found:
            findings.add("twice", name, f"is there, and in {view.source} too; remove one of them")
    return unstacked


def resolve(found: Header, unstacked: Unstacked) -> Header:
    """The header under on-disk names."""
    if not unstacked.stored:
        return found
    seen = {name: (found[view.source][0], view.shape) for name, view in unstacked.views.items()}
    return seen | {name: entry for name, entry in found.items() if name not in unstacked.stored}


def _shapes(row: Row, config: ModelConfig, *, of_scales: bool) -> list[tuple[int, ...]]:
    """Of the on-disk weights that a tensor in memory holds for one expert, or of their scales."""
    shapes = row.shapes(config)
    return [scale_grid(shape, config.block_size) if of_scales else shape for shape in shapes]


def _complaint(name: str, found: Header, key: WeightKey, config: ModelConfig) -> str | None:
    of_scales = name.endswith(SCALE_SUFFIX)
    if of_scales and any(len(shape) != 2 for shape in key.row.shapes(config)):
        return "scales of a tensor that is no matrix; remove them, or fetch the checkpoint again"
    if of_scales and any(shape[0] % config.block_size for shape in key.row.shapes(config)[:-1]):
        return (
            f"scales of a stack in which w1 ends at row {config.intermediate_size}, inside a block of "
            f"{config.block_size}, so that a scale is of w1 and w3 both; save the experts unstacked (save_pretrained)"
        )
    first, *others = _shapes(key.row, config, of_scales=of_scales)
    expected = (first[0] + sum(shape[0] for shape in others), *first[1:])
    if key.row.scope is Scope.EXPERT:
        expected = (config.num_local_experts, *expected)
    stored = tuple(found[name][1])
    if stored != expected:
        return (
            f"found shape {list(stored)}, expected {list(expected)} from config.json's sizes; file and config do not "
            "belong together"
        )
    return None


def _views(name: str, key: WeightKey, config: ModelConfig) -> dict[str, View]:
    suffix = SCALE_SUFFIX if name.endswith(SCALE_SUFFIX) else ""
    shapes = _shapes(key.row, config, of_scales=bool(suffix))
    starts = [0, *accumulate(map(math.prod, shapes))]
    experts = config.num_local_experts if key.row.scope is Scope.EXPERT else 1
    return {
        disk_name + suffix: View(name, expert * starts[-1] + start, shape)
        for expert in range(experts)
        for disk_name, start, shape in zip(
            key.row.format(Dialect.HF_DISK, key.layer, expert), starts, shapes, strict=False
        )
    }
