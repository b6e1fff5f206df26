"""Products of 32 experts: of their outputs, of their inputs' gradients, of their weights' gradients.

    python tests/benchmarks/bench_experts.py OUT.json             what training runs, and Transformer Engine
    python tests/benchmarks/bench_experts.py OUT.json --sweep     other tiles of our kernel as well

MiniMax-M2's experts of one layer, 4096 tokens of 8 experts each, routed at random in balance, another routing each
time. FLOP model: 2 * rows * out * in. Byte model of the weights' gradients: 8 bytes an element of the float32 sums, and
inputs once; in bfloat16 with an addition of its own 12. "gpu" is the time between CUDA events behind a wait that is
longer than the launches take, so that the processor does not count; "host" the processor's time of a call, behind the
same wait.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from bridge.model.fusions import FUSIONS
from compiled.experts import weight_gradients

sys.path.insert(0, str(Path(__file__).parent))
from record import asked_on_a_gpu, environment

EXPERTS, ROWS = 32, 4096 * 8
SHAPES = {"fc1": (3072, 3072), "fc2": (3072, 1536)}
CALLS, ROUNDS = 5, 7
WAIT = 200_000_000  # cycles
TILE = ("OUT_BLOCK", "IN_BLOCK", "ROW_BLOCK", "WARPS", "STAGES")
TILES = [(128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (256, 128, 64, 8, 3)]


class Case(NamedTuple):
    """A layer's tensors, of all experts and of each, as Transformer Engine has them.

    An expert's tokens are known to the processor as `rows`, to the GPU as `ends`.
    """

    x: Tensor
    grad: Tensor
    weights: Tensor
    sums: Tensor
    each_weight: list[Tensor]
    each_sum: list[Tensor]
    rows: list[int]
    ends: Tensor


Product = Callable[[Case], object]


def routings() -> list[list[int]]:
    """Rows of each expert, others each time."""
    chosen = torch.randint(0, EXPERTS, (CALLS * (ROUNDS + 1), ROWS), generator=torch.Generator().manual_seed(0))
    return [torch.bincount(one, minlength=EXPERTS).tolist() for one in chosen]


def output(case: Case) -> Tensor:
    return grouped_mm(case.x, case.weights.transpose(1, 2), offs=case.ends)


def input_gradient(case: Case) -> Tensor:
    return grouped_mm(case.grad, case.weights, offs=case.ends)


def weights_gradients(case: Case) -> None:
    weight_gradients.add_weight_gradients(case.x, case.grad, case.sums, case.ends)


def their_product(case: Case, *, backward: bool) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    x, layout = (case.grad, "NN") if backward else (case.x, "TN")
    out = x.new_empty(len(x), case.weights.shape[2 if backward else 1])
    parts, none = (case.each_weight, x.split(case.rows)), [None] * EXPERTS
    general_grouped_gemm(
        *parts, [out], none, x.dtype, layout=layout, m_splits=case.rows, single_output=True, grad=backward
    )


def their_weights(case: Case, *, accumulate: bool) -> None:
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

    none = [None] * EXPERTS
    out = case.each_sum if accumulate else list(torch.empty_like(case.weights))
    parts = case.x.split(case.rows), case.grad.split(case.rows)
    general_grouped_gemm(
        *parts, out, none, case.x.dtype, layout="NT", grad=True, m_splits=case.rows, accumulate=accumulate
    )
    if not accumulate:
        for one, made in zip(case.each_sum, out, strict=True):
            one.add_(made)


OUTPUT, INPUT, WEIGHTS = "output", "gradient of the input", "weights' gradients"
EACH, ONE = "Transformer Engine, one expert after another", "Transformer Engine, one kernel"
PRODUCTS: dict[str, dict[str, Product]] = {
    OUTPUT: {
        "torch, one kernel": output,
        ONE: partial(their_product, backward=False),
        EACH: partial(their_product, backward=False),
    },
    INPUT: {
        "torch, one kernel": input_gradient,
        ONE: partial(their_product, backward=True),
        EACH: partial(their_product, backward=True),
    },
    WEIGHTS: {
        "compiled.experts": weights_gradients,
        EACH: partial(their_weights, accumulate=True),
        "the same in bfloat16, and torch adds them": partial(their_weights, accumulate=False),
    },
}


ENVIRONMENT = {ONE: FUSIONS["grouped_gemm"].environment}


def measured(product: Product, out_features: int, in_features: int) -> dict[str, float]:
    """Medians of a call, in milliseconds."""
    weights = torch.randn(EXPERTS, out_features, in_features, device="cuda").bfloat16()
    x, grad = (torch.randn(ROWS, width, device="cuda").bfloat16() for width in (in_features, out_features))
    sums = torch.zeros_like(weights, dtype=torch.float32)
    ends = [torch.tensor(rows).cumsum(0, dtype=torch.int32).cuda() for rows in routings()]
    cases = (
        Case(x, grad, weights, sums, list(weights), list(sums), *one) for one in zip(routings(), ends, strict=True)
    )
    gpu, host = [], []
    for number in range(ROUNDS + 1):
        some = list(itertools.islice(cases, CALLS))  # made before anything is timed
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT)
        start.record()
        began = time.perf_counter()
        for case in some:
            product(case)
        seconds = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        if number:  # the first compiles
            gpu.append(start.elapsed_time(end) / CALLS)
            host.append(1e3 * seconds / CALLS)
    flops = 2 * ROWS * out_features * in_features
    found = {"gpu ms": round(statistics.median(gpu), 4), "host ms": round(statistics.median(host), 4)}
    return found | {"TFLOP/s": round(flops / found["gpu ms"] / 1e9, 1)}


def main() -> None:
    asked = asked_on_a_gpu(__doc__, "--sweep")
    products, own = {what: dict(rows) for what, rows in PRODUCTS.items()}, [getattr(weight_gradients, x) for x in TILE]
    tiles = {f"tile {tile}": tile for tile in TILES} if asked.sweep else {}
    products[WEIGHTS] |= dict.fromkeys(tiles, weights_gradients)
    found: dict[str, Any] = {"what": "products of 32 experts", **environment()}
    found["config"] = {"experts": EXPERTS, "rows": ROWS, "shapes": SHAPES, "calls": CALLS, "rounds": ROUNDS}
    found["rows"] = {what: {} for what in products}
    for what, rows in products.items():
        for name, product in rows.items():
            tile = dict(zip(TILE, tiles.get(name, own), strict=True))
            try:
                with patch.dict("os.environ", ENVIRONMENT.get(name, {})), patch.multiple(weight_gradients, **tile):
                    figures: dict[str, Any] = {key: measured(product, *shape) for key, shape in SHAPES.items()}
            except Exception as error:  # a tile that a card has no room for
                figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
            found["rows"][what][name] = figures
            print(what, "|", name, figures, flush=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
