"""Adam's step over the weights of two layers and their experts, gradients clipped and weights rounded to bfloat16.

    python tests/benchmarks/bench_adam.py OUT.json             `compiled.adam`, and what megatron-core does
    python tests/benchmarks/bench_adam.py OUT.json --sweep     other sizes of our kernel's programs as well

A billion float32 weights in tensors of MiniMax-M2's sizes, 32 experts a layer. Byte model, of an element: the gradient,
the weight and two averages read, the last three written in float32, and the weight in bfloat16: 30. In three passes, as
megatron-core has it, 42. Baselines: these passes, Transformer Engine's Adam alone (28), torch's fused one (28), and a
copy. Milliseconds between CUDA events, medians of 20 steps after 5.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from compiled import adam

sys.path.insert(0, str(Path(__file__).parent))
from record import asked_on_a_gpu, environment, median_ms

EXPERTS, LAYERS = 32, 2
LAYER = [(3072, 8192), (6144, 3072), (3072,), (EXPERTS, 3072), *[(3072, 3072), (3072, 1536)] * EXPERTS]
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SWEPT = ("BLOCK", "BLOCKS", "WARPS")
SIZES = [*itertools.product((1024, 2048, 4096), (1, 4, 16), (4, 8))]
WARM_UP, RUNS = 5, 20
CLIPPED = 0.5


def ours(rows: list[adam.AdamTensors]) -> Callable[[], object]:
    scale = torch.full((), CLIPPED, device="cuda")
    return lambda: adam.adam_step(rows, scale, step=10, **SETTINGS)


def optimizer_step(rows: list[adam.AdamTensors], made: Any) -> Callable[[], object]:
    """Of an optimizer of `rows`' weights, gradients and averages."""
    for weight, row in zip(made.param_groups[0]["params"], rows, strict=True):
        weight.grad = row.grad
        made.state[weight] = {"exp_avg": row.exp_avg, "exp_avg_sq": row.exp_avg_sq}
    return made.step


def torch_fused(rows: list[adam.AdamTensors]) -> Callable[[], object]:
    made = torch.optim.AdamW([row.weight for row in rows], fused=True, **SETTINGS)
    step = optimizer_step(rows, made)
    for state in made.state.values():
        state["step"] = torch.full((), 10.0, device="cuda")
    return step


def their_adam(rows: list[adam.AdamTensors]) -> Callable[[], object]:
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    return optimizer_step(rows, FusedAdam([row.weight for row in rows], **SETTINGS))


def megatron_core(rows: list[adam.AdamTensors]) -> Callable[[], object]:
    """As `megatron.core.optimizer` does it: scaled in place, moved, and copied one by one."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    step, norm = their_adam(rows), torch.full((), 1 / CLIPPED, device="cuda")
    weights = [row.weight for row in rows]

    def run() -> None:
        clip_grad_by_total_norm_fp32(weights, max_norm=1.0, total_norm=norm)  # pyright: ignore[reportArgumentType]
        step()
        for row in rows:
            assert row.rounded is not None
            row.rounded.copy_(row.weight)

    return run


IMPLEMENTATIONS: dict[str, tuple[Callable[[list[adam.AdamTensors]], Callable[[], object]], int]] = {
    "compiled.adam": (ours, 30),
    "megatron-core: scaled, moved, rounded": (megatron_core, 42),
    "Transformer Engine's Adam alone": (their_adam, 28),
    "torch's fused AdamW alone": (torch_fused, 28),
}


def made_rows() -> list[adam.AdamTensors]:
    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device="cuda")

    shapes = LAYER * LAYERS
    return [
        adam.AdamTensors(drawn(one), drawn(one), drawn(one), drawn(one).square(), drawn(one).bfloat16())
        for one in shapes
    ]


def main() -> None:
    asked = asked_on_a_gpu(__doc__, "--sweep")
    rows = made_rows()
    elements = sum(row.weight.numel() for row in rows)
    own = tuple(getattr(adam, name) for name in SWEPT)
    candidates = {name: (*one, own) for name, one in IMPLEMENTATIONS.items()}
    if asked.sweep:
        candidates |= {f"programs of {dict(zip(SWEPT, size, strict=True))}": (ours, 30, size) for size in SIZES}
    source = torch.empty(2**29, device="cuda").normal_()
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / median_ms(lambda: target.copy_(source), warm_up=WARM_UP, runs=RUNS) * 1e3
    found: dict[str, Any] = {"what": "Adam's step", **environment()}
    found["config"] = {"weights": elements, "tensors": len(rows), "program": dict(zip(SWEPT, own, strict=True))}
    found |= {"copy GB/s": round(copied / 1e9, 1), "rows": {}}
    for name, (implementation, count, size) in candidates.items():
        with patch.multiple(adam, **dict(zip(SWEPT, size, strict=True))):
            ms = median_ms(implementation(rows), warm_up=WARM_UP, runs=RUNS)
        speed = count * elements / ms * 1e3
        figures = {"ms": round(ms, 3), "bytes an element": count, "GB/s": round(speed / 1e9, 1)}
        found["rows"][name] = figures | {"of the copy's": round(speed / copied, 3)}
        print(name, found["rows"][name], flush=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
