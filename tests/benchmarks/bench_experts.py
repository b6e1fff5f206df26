"""Weights' gradients of 32 experts, added to float32 sums: one launch, beside a product for each expert.

    python tests/benchmarks/bench_experts.py OUT.json             the tile that the kernel has
    python tests/benchmarks/bench_experts.py OUT.json --sweep     others as well

MiniMax-M2's experts of one layer, 4096 tokens of 8 experts each, routed at random in balance, another routing each
time. FLOP model: 2 * rows * out * in. Byte model: 8 bytes an element of the sums, and inputs once; in bfloat16 with an
addition of its own 12. "gpu" is the time between CUDA events behind a wait that is longer than the launches take, so
that the processor does not count; "host" the processor's time of a call, behind the same wait.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled.experts import weight_gradients

sys.path.insert(0, str(Path(__file__).parent))
from record import environment

EXPERTS, ROWS = 32, 4096 * 8
SHAPES = {"fc1": (3072, 3072), "fc2": (3072, 1536)}
CALLS, ROUNDS = 5, 7
WAIT = 200_000_000  # cycles
TILES = [(128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (256, 128, 64, 8, 3)]
OURS, THEIRS = "compiled.experts", "Transformer Engine, one expert after another"
ADDED = "the same in bfloat16, and torch adds them"
Add = Callable[[Tensor, Tensor, list[Tensor], list[int]], object]


def routings() -> list[list[int]]:
    """Rows of each expert, others each time."""
    chosen = torch.randint(0, EXPERTS, (CALLS * (ROUNDS + 1), ROWS), generator=torch.Generator().manual_seed(0))
    return [torch.bincount(one, minlength=EXPERTS).tolist() for one in chosen]


def theirs(x: Tensor, grad: Tensor, total: list[Tensor], rows: list[int], *, accumulate: bool = True) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    out = total if accumulate else list(torch.empty(len(total), *total[0].shape, dtype=x.dtype, device="cuda"))
    parts, none = (x.split(rows), grad.split(rows)), [None] * len(rows)
    general_grouped_gemm(*parts, out, none, x.dtype, layout="NT", grad=True, m_splits=rows, accumulate=accumulate)
    if not accumulate:
        for one, made in zip(total, out, strict=True):
            one.add_(made)


def measured(add: Add, out_features: int, in_features: int) -> dict[str, float]:
    """Medians of a call, in milliseconds."""
    total = list(torch.zeros(EXPERTS, out_features, in_features, device="cuda"))
    x, grad = (torch.randn(ROWS, width, device="cuda").bfloat16() for width in (in_features, out_features))
    calls = iter(routings())
    gpu, host = [], []
    for number in range(ROUNDS + 1):
        some = list(itertools.islice(calls, CALLS))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT)
        start.record()
        began = time.perf_counter()
        for rows in some:
            add(x, grad, total, rows)
        seconds = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        if number:  # the first compiles
            gpu.append(start.elapsed_time(end) / CALLS)
            host.append(1e3 * seconds / CALLS)
    flops = 2 * ROWS * out_features * in_features
    found = {"gpu ms": round(statistics.median(gpu), 4), "host ms": round(statistics.median(host), 4)}
    moved = 8 * EXPERTS * out_features * in_features + 2 * ROWS * (out_features + in_features)
    rates = {"TFLOP/s": flops / found["gpu ms"] / 1e9, "GB/s": moved / found["gpu ms"] / 1e6}
    return found | {name: round(rate, 1) for name, rate in rates.items()}


def with_tile(tile: tuple[int, ...]) -> Add:
    def add(x: Tensor, grad: Tensor, total: list[Tensor], rows: list[int]) -> None:
        names = ("OUT_BLOCK", "IN_BLOCK", "ROW_BLOCK", "WARPS", "STAGES")
        for name, value in zip(names, tile, strict=True):
            setattr(weight_gradients, name, value)
        weight_gradients.add_weight_gradients(x, grad, total, rows)

    return add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_experts needs an NVIDIA GPU: the kernel has no other form")
    rows: dict[str, Add] = {
        OURS: weight_gradients.add_weight_gradients,
        THEIRS: theirs,
        ADDED: partial(theirs, accumulate=False),
    }
    if asked.sweep:
        rows |= {f"tile {tile}": with_tile(tile) for tile in TILES}
    found: dict[str, Any] = {"what": "weights' gradients of 32 experts", **environment()}
    found["config"] = {"experts": EXPERTS, "rows": ROWS, "shapes": SHAPES, "calls": CALLS, "rounds": ROUNDS}
    found["rows"] = {}
    for name, add in rows.items():
        try:
            found["rows"][name] = {what: measured(add, *shape) for what, shape in SHAPES.items()}
        except Exception as error:  # a tile that a card has no room for
            found["rows"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(name, found["rows"][name], flush=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
