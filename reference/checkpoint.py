"""The checkpoint on disk: which tensors it holds, of which shapes and dtypes, and what is wrong with one that differs.

Everything here works on names, shapes and dtypes (a file's header), so that a checkpoint is judged before any of it is
read. Quantised are the linear layers that `modules_to_not_convert` does not name; each has its scales beside it, as
`<name>_scale_inv`. The router's weight and bias are float32 in the released files. Layers past `num_hidden_layers` are
multi-token-prediction (MTP) modules, as inference engines name them: the model itself does not use them, and their
tensors are not checked.

Source: the released files' headers (96,103 tensors for M2.7).
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from reference.config import ModelConfig
from reference.fp8 import FP8, SCALE_DTYPES, scale_grid
from reference.names import find
from reference.weights import TABLE, Dialect, Scope, Storage, instances

SCALE_SUFFIX = "_scale_inv"
PLAIN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_PROBLEMS = 10_000


class TensorSpec(NamedTuple):
    """What a tensor on disk must be: one of some dtypes, and a shape."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


def is_quantized(name: str, config: ModelConfig) -> bool:
    """Whether this on-disk weight is stored as float8 with scales beside it."""
    key = find(name, Dialect.HF_DISK)
    if config.quantization is None or key is None or key.row.storage is not Storage.QUANTIZABLE:
        return False
    return not any(_covers(module, name) for module in config.quantization.modules_to_not_convert)


def _covers(module: str, name: str) -> bool:
    """`module` is a whole component of the name ("lm_head"), or a path that the name begins with."""
    return module in name.split(".") or name.startswith(f"{module}.")


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
    per_row = {Scope.MODEL: 1, Scope.LAYER: config.num_hidden_layers}
    per_row[Scope.EXPERT] = config.num_hidden_layers * config.num_local_experts
    return sum(per_row[row.scope] * sum(math.prod(shape) for shape in row.shapes(config)) for row in TABLE)


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer: `model.layers.{i}` with i >= num_hidden_layers."""
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= config.num_hidden_layers


def problems(found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: ModelConfig) -> list[str]:
    """What is wrong with a checkpoint's (dtype, shape) by name; each entry names a tensor and a remedy.

    At most `MOST_PROBLEMS`: a config.json that is wrong may ask for any number of layers.
    """
    expected: set[str] = set()
    bad = []
    for name, spec in _expected(config):
        expected.add(name)
        if name not in found:
            bad.append(_missing(name))
        elif complaint := _mismatch(name, *found[name], spec):
            bad.append(complaint)
        if len(bad) == MOST_PROBLEMS:
            return bad
    bad += [_unexpected(name, found) for name in found if name not in expected and not is_mtp(name, config)]
    return bad[:MOST_PROBLEMS]


def check_tensors(found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: ModelConfig) -> None:
    """Check that a checkpoint holds exactly the model's tensors, and at most MTP layers besides.

    Raises:
        ValueError: it does not; lists the first problems and their number.
    """
    bad = problems(found, config)
    if bad:
        at_least = "at least " if len(bad) == MOST_PROBLEMS else ""
        more = f"\n... and {at_least}{len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError("\n".join(bad[:8]) + more)


def _missing(name: str) -> str:
    if name.endswith(SCALE_SUFFIX):
        weight = name.removesuffix(SCALE_SUFFIX)
        return (
            f"{name}: missing, expected the block scales of {weight}, which config.json says is quantised; fetch the "
            "checkpoint again, or name the module in quantization_config.modules_to_not_convert"
        )
    return f"{name}: missing from the checkpoint; fetch it again, or correct the sizes in config.json"


def _mismatch(name: str, dtype: torch.dtype, shape: tuple[int, ...], spec: TensorSpec) -> str | None:
    if dtype not in spec.dtypes:
        allowed = " or ".join(str(allowed).removeprefix("torch.") for allowed in spec.dtypes)
        is_scale = name.endswith(SCALE_SUFFIX)
        remedy = "correct quantization_config in config.json, or convert the tensor"
        return (
            f"{name}: found dtype {str(dtype).removeprefix('torch.')}, expected {allowed}; "
            f"{'store the scales as float32' if is_scale else remedy}"
        )
    if tuple(shape) != spec.shape:
        what = "a grid of scales" if name.endswith(SCALE_SUFFIX) else "shape"
        return (
            f"{name}: found {what} {list(shape)}, expected {list(spec.shape)} from config.json's sizes"
            f"{' and weight_block_size' if name.endswith(SCALE_SUFFIX) else ''}; file and config do not belong together"
        )
    return None


def _unexpected(name: str, found: Mapping[str, object]) -> str:
    weight = name.removesuffix(SCALE_SUFFIX)
    if weight != name and weight not in found:
        return f"{name}: scales without their tensor {weight}; fetch the checkpoint again"
    if weight != name:
        return f"{name}: scales of a tensor that config.json says is not quantised; correct quantization_config"
    if find(name, Dialect.HF_MEMORY):
        return f"{name}: a name of the model in memory, not of the file format; save it with save_pretrained"
    return f"{name}: unknown tensor, MiniMax-M2 has none of this name; remove it or correct config.json"
