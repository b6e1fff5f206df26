"""The checkpoint on disk: which tensors it holds, of which shapes and dtypes, and what is wrong with one that differs.

Everything here works on names, shapes and dtypes (a file's header), so that a checkpoint is judged before any of it is
read. The files decide how a weight is stored: a float8 matrix with its block scales beside it, as `<name>_scale_inv`,
is quantised; a bfloat16, float16 or float32 one without scales is plain; anything else is an error, whatever
config.json says. `expected_tensors` is what a checkpoint holds whose files were written by config.json's rule, as the
released ones were.

Source: the released files' headers (96,103 tensors for M2.7).
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from reference.config import ModelConfig
from reference.extras import find_extras
from reference.findings import Findings
from reference.fp8 import FP8, SCALE_DTYPES, scale_grid
from reference.names import SCALE_SUFFIX
from reference.quantization import is_quantized
from reference.stacked import View, resolve, unstack
from reference.unexpected import describe
from reference.weights import TABLE, Dialect, Row, Scope, instances

PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TensorSpec(NamedTuple):
    """What a tensor on disk must be: one of some dtypes, and a shape."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint on disk, scales included, in model order."""
    return dict(_expected(config))


def _expected(config: ModelConfig) -> Iterator[tuple[str, TensorSpec]]:
    for row, layer, expert in instances(config):
        names = row.format(Dialect.HF_DISK, layer, expert)
        for name, shape in zip(names, row.shapes(config), strict=True):
            if is_quantized(name, config):
                assert config.quantization is not None
                grid = scale_grid(shape, config.quantization.block_size)
                yield name, TensorSpec((FP8,), shape)
                yield name + SCALE_SUFFIX, TensorSpec(SCALE_DTYPES, grid)
            else:
                yield name, TensorSpec(PLAIN_DTYPES, shape)


def parameter_count(config: ModelConfig) -> int:
    """Number of weights, scales not counted."""
    layers = config.num_hidden_layers
    experts = layers * config.num_local_experts
    per_row = {Scope.MODEL: 1, Scope.ATTENTION: layers, Scope.MOE: layers, Scope.EXPERT: experts}
    return sum(per_row[row.scope] * sum(math.prod(shape) for shape in row.shapes(config)) for row in TABLE)


Stored = tuple[torch.dtype, tuple[int, ...]]
Header = Mapping[str, Stored]


class Contents(NamedTuple):
    """What a checkpoint's header holds, and what is wrong with it.

    `quantized` are the weights that are stored as float8; `mtp` and `unneeded` are the tensors that are not the model's
    (`reference.extras`); `views` are weights that lie inside stacked tensors (`reference.stacked`); each of the
    `problems` names a tensor and a remedy.
    """

    quantized: frozenset[str]
    mtp: list[str]
    unneeded: list[str]
    views: dict[str, View]
    problems: list[str]


def contents(found: Header, config: ModelConfig) -> Contents:
    """Judge a checkpoint by its header: (dtype, shape) by name, of the released names or of those in memory."""
    unexpected = Findings()
    stacked = unstack(found, config, unexpected)
    found = resolve(found, stacked)
    weights = _Weights(set(), set(), Findings(), Findings())
    for row in TABLE:
        for part in range(len(row.axes)):
            _judge(row, part, found, config, weights if row not in stacked.wrong else weights.without_findings())
    extras = find_extras((name for name in found if name not in weights.known), config)
    renamed = describe(extras, found, config, unexpected)
    lines = [*unexpected.lines, *([] if renamed else weights.missing.lines), *weights.damaged.lines]
    return Contents(frozenset(weights.quantized), extras.mtp, extras.unneeded, stacked.views, lines)


def problems(found: Header, config: ModelConfig) -> list[str]:
    """What is wrong with a checkpoint's header: a line for each kind of problem, with the first tensor and a remedy."""
    return contents(found, config).problems


def check_tensors(found: Header, config: ModelConfig) -> Contents:
    """The contents of a checkpoint that holds exactly the model's tensors, and at most extra ones besides.

    Raises:
        ValueError: it does not; lists the first kinds of problems and their number.
    """
    held = contents(found, config)
    if held.problems:
        more = f"\n... and {len(held.problems) - 8} more" if len(held.problems) > 8 else ""
        raise ValueError("\n".join(held.problems[:8]) + more)
    return held


_MISSING = "missing from the checkpoint; fetch it again, or correct the sizes in config.json"
_MANY = 1000


class _Weights(NamedTuple):
    """What is found out about the model's own weights; `known` are their names and their scales'."""

    known: set[str]
    quantized: set[str]
    missing: Findings
    damaged: Findings

    def without_findings(self) -> "_Weights":
        """The same names, and findings of which nothing is said."""
        return self._replace(missing=Findings(), damaged=Findings())


def _judge(row: Row, part: int, found: Header, config: ModelConfig, weights: _Weights) -> None:
    """Compare one part of a row, in all layers and experts, with what is there."""
    shape = row.shapes(config)[part]
    spec = _Spec(shape, scale_grid(shape, config.block_size) if len(shape) == 2 else None)
    present = absent = 0
    for name in _names(row, part, config):
        scale_name = name + SCALE_SUFFIX
        weights.known.add(name)
        weights.known.add(scale_name)
        stored = found.get(name)
        if stored is None:
            absent += 1
            weights.missing.add((row, part), name, _MISSING)
            if absent > len(found) + _MANY:  # a wrong config.json may ask for any number of layers
                weights.missing.count((row, part), _instances(row, config) - present - absent)
                return
            continue
        present += 1
        if stored[0] == FP8:
            weights.quantized.add(name)
        if complaint := _complaint(name, stored, found.get(scale_name), spec):
            weights.damaged.add((row, part, complaint.what), complaint.name, complaint.text)


class _Spec(NamedTuple):
    """The shape of a weight, and of its scales if it can have some."""

    shape: tuple[int, ...]
    grid: tuple[int, ...] | None


class _Complaint(NamedTuple):
    what: str
    name: str
    text: str


def _instances(row: Row, config: ModelConfig) -> int:
    """How often a row occurs in the model."""
    layers = 1 if row.scope is Scope.MODEL else config.num_hidden_layers
    return layers * (config.num_local_experts if row.scope is Scope.EXPERT else 1)


def _names(row: Row, part: int, config: ModelConfig) -> Iterator[str]:
    """The on-disk names of one part of a row, of all layers and experts."""
    template = row.names[Dialect.HF_DISK][part]
    for layer in range(1 if row.scope is Scope.MODEL else config.num_hidden_layers):
        for expert in range(config.num_local_experts if row.scope is Scope.EXPERT else 1):
            yield template.format(layer=layer, expert=expert)


def _complaint(name: str, stored: Stored, scale: Stored | None, spec: _Spec) -> _Complaint | None:
    """What is wrong with a weight that is there, and its scales."""
    dtype, shape = stored
    if dtype == FP8 and spec.grid is not None:
        if tuple(shape) == spec.shape and scale is not None and scale[0] in SCALE_DTYPES and scale[1] == spec.grid:
            return None
    elif dtype not in PLAIN_DTYPES:
        return _Complaint("dtype", name, _wrong_dtype(dtype, spec))
    elif scale is not None:
        return _Complaint("scales", name, _left_over(name, dtype))
    if tuple(shape) != spec.shape:
        return _Complaint("shape", name, _wrong_shape("shape", shape, spec.shape, "config.json's sizes"))
    if dtype != FP8:
        return None
    if scale is None:
        return _Complaint("no scales", name + SCALE_SUFFIX, _no_scales(name))
    if scale[0] not in SCALE_DTYPES:
        text = f"found dtype {_said(scale[0])}, expected {_one_of(SCALE_DTYPES)}; store the scales as float32"
        return _Complaint("scale dtype", name + SCALE_SUFFIX, text)
    assert spec.grid is not None
    origin = "config.json's sizes and weight_block_size"
    return _Complaint("grid", name + SCALE_SUFFIX, _wrong_shape("a grid of scales", scale[1], spec.grid, origin))


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(_said, dtypes))


def _wrong_dtype(dtype: torch.dtype, spec: _Spec) -> str:
    quantized = "float8_e4m3fn with block scales, or " if spec.grid is not None else ""
    why = "" if spec.grid is not None or dtype != FP8 else ": only matrices have block scales"
    return f"found dtype {_said(dtype)}, expected {quantized}{_one_of(PLAIN_DTYPES)}{why}; convert the tensor"


def _wrong_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...], origin: str) -> str:
    return (
        f"found {what} {list(found)}, expected {list(expected)} from {origin}; file and config do not belong together"
    )


def _no_scales(name: str) -> str:
    return (
        f"missing, expected the block scales of {name}, which is float8_e4m3fn and has no value without them; fetch "
        "the checkpoint again with all its files, or store the weight as bfloat16"
    )


def _left_over(name: str, dtype: torch.dtype) -> str:
    return (
        f"found dtype {_said(dtype)} and scales {name}{SCALE_SUFFIX}, expected float8_e4m3fn with scales, or no "
        "scales; remove the scales if the weight was dequantised, else fetch the checkpoint again"
    )
