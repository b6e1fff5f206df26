"""A program for `test_modules`: the operators of `steps_triton` in Triton's interpreter against those of `steps_torch`.

And `host` against `HeadNorm`: the same kernels, called from C++ or from Python, give the same bits.

The interpreter must be chosen before Triton is imported, hence a process of its own. bfloat16 is left out, which the
interpreter rounds toward zero. A rank's sums over ranks are stood in for by twice its own: both sides do the same.
"""

from math import prod

import torch
from torch import Tensor

from compiled.norm import function, host, launches, steps_torch, steps_triton
from compiled.norm.collectives import process_group_info
from compiled.norm.spec import NormSpec

# Two programs, so that each walks over several tokens.
launches._multiprocessors = lambda device: 2
for tuning in ("PLAIN", "ROTATING"):
    setattr(launches, tuning, getattr(launches, tuning)._replace(warps_a_multiprocessor=1))
function._steps = lambda x: steps_triton  # on the CPU too
DIM, SEQ, BATCH = 8, 2, 2


def steps(module, inputs: list[Tensor], weights: list[Tensor], tables: tuple, spec: NormSpec) -> list[Tensor]:
    """Everything that forward and backward passes compute, on one rank and on one of several."""
    generator = torch.Generator().manual_seed(9)
    results = []
    for sums in (None, 2 * module.square_sums(inputs, spec)):
        *ys, rstd = module.forward(inputs, weights, sums, *tables, spec)
        grads = [torch.randn(y.transpose(0, 1).shape, generator=generator).to(y.dtype).transpose(0, 1) for y in ys]
        common = (grads, inputs, weights, rstd)
        coupling, dw = module.backward_sums(*common, *tables, spec)
        dxs = module.backward_apply(*common, 2 * coupling, *tables, spec)
        results += [*ys, rstd, coupling, dw, *dxs, *module.backward(*common, *tables, spec)]
    return results


def assert_cpp_equals_python(inputs: list[Tensor], weights: list[Tensor], tables: tuple, spec: NormSpec) -> None:
    """Outputs and gradients; twice, so that nothing of the first call is left in the second."""
    ranks, replicas = process_group_info(None), (1,) * len(weights)
    cpp = host.head_norm(spec, ranks, replicas)
    calls = (
        lambda ws, xs: cpp(*tables, ws, xs),
        lambda ws, xs: function.HeadNorm.apply(spec, ranks, replicas, *tables, *ws, *xs),
    )
    for seed in range(2):
        results = []
        for call in calls:
            generator = torch.Generator().manual_seed(seed)
            leaves = [x.clone().requires_grad_() for x in (*weights, *inputs)]
            ys = call(leaves[: len(weights)], leaves[len(weights) :])
            grads = [torch.randn(y.transpose(0, 1).shape, generator=generator).to(y.dtype).transpose(0, 1) for y in ys]
            results.append([*ys, *torch.autograd.grad(ys, leaves, grads)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    two_parts = [normal(SEQ, BATCH, 7, 2 * DIM)[:, :, 1:, :DIM], normal(BATCH, SEQ, 3, DIM).transpose(0, 1)]
    fused, empty = [normal(SEQ, BATCH, 2, 5 * DIM)], [normal(0, BATCH, 2, 5 * DIM)]
    cases = {
        # the inputs, how many heads the weights have, channels that rotate, and which query heads of a group are ours
        "one part": ([normal(SEQ, BATCH, 5, 12)], [5], 12, 0, ()),
        "two parts": (two_parts, [6, 3], DIM, 0, ()),
        "fused": (fused, [6, 2], DIM, 0, (0, 3)),
        "fused, RoPE": (fused, [6, 2], DIM, 4, (0, 3)),
        "fused, full RoPE": (fused, [6, 2], DIM, DIM, (0, 3)),
        "fused, odd RoPE": (fused, [6, 2], DIM, 6, (0, 3)),
        "fused, shared key": ([normal(SEQ, BATCH, 1, 6 * DIM)], [2, 1], DIM, 4, (2, 2)),
        "no tokens": (empty, [6, 2], DIM, 4, (0, 3)),
    }
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        for name, (inputs, heads, dim, rotary, split) in cases.items():
            if dtype == torch.float16 and name != "fused, RoPE":
                continue
            inputs = [x.to(dtype) for x in inputs]
            weights = [normal(n * dim).to(dtype) for n in heads]
            rows = inputs[0].shape[:2] if "odd" in name else inputs[0].shape[:1]
            tables = tuple(normal(*rows, rotary // 2).to(dtype) for _ in range(2)) if rotary else (None, None)
            spec = NormSpec(tuple(n * dim for n in heads), 1e-6, dim, split)
            assert_cpp_equals_python(inputs, weights, tables, spec)
            pairs = zip(
                *(steps(module, inputs, weights, tables, spec) for module in (steps_triton, steps_torch)),
                strict=True,
            )
            worst = 0.0
            for ours, plain in pairs:
                assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype), name
                if prod(ours.shape):
                    worst = max(worst, ((ours - plain).abs().max() / plain.abs().max()).item())
            print(f"{dtype}, {name}: {worst:.1e} of the largest value")
            assert worst <= bound, f"{dtype}, {name}: {worst}"


if __name__ == "__main__":
    main()
