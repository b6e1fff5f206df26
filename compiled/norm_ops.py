"""`norm_plain` with the Triton kernels of `norm_kernels`, as operators that `torch.compile` calls as they are.

Same functions, arguments and results; `norm_plain` says what each computes. No operator writes to its arguments: a
fused qkv's gradient is one new buffer, which the backward kernel fills head by head. The first call imports Triton.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from compiled.norm_plain import Setting, parts_of


class Tuning(NamedTuple):
    """How many of a tile's elements each warp of a kernel holds, 32 times what a thread does.

    Of the backward kernel, whose programs stay resident: how many warps a multiprocessor has, and how many tokens each
    program has loaded or is loading.
    """

    square_sums: int
    forward: int
    apply: int
    backward: int
    warps_a_multiprocessor: int
    stages: int


# The fastest on one H200 of those tried (tests/benchmarks/results).
PLAIN = Tuning(square_sums=1024, forward=1024, apply=512, backward=512, warps_a_multiprocessor=16, stages=4)
TURNING = Tuning(square_sums=1024, forward=2048, apply=512, backward=1024, warps_a_multiprocessor=8, stages=4)


def _operator(arguments: str, returns: str, fake: Callable) -> Callable[[Callable], Callable]:
    """An operator where it is traced; in eager mode the function itself, which is cheaper to call.

    `arguments` is the schema of those before the setting, whose fields the operator takes one by one.
    """
    size = len(Setting._fields)

    def decorate(launch: Callable) -> Callable:
        operator = custom_op(
            f"minimax_m2::norm_{launch.__name__}",
            lambda *args: launch(*args[:-size], Setting(*args[-size:])),
            mutates_args=(),
            schema=f"({arguments}, int[] terms, float eps, int head_dim, int[] split) -> {returns}",
        )
        operator.register_fake(lambda *args: fake(*args[:-size], Setting(*args[-size:])))
        return lambda *args: operator(*args[:-1], *args[-1]) if torch.compiler.is_compiling() else launch(*args)

    return decorate


# ------------------------------------------------------------------------------------------- what the operators return


def _outputs(inputs: list[Tensor], weights: list[Tensor], setting: Setting) -> list[Tensor]:
    x, dim = inputs[0], setting.head_dim
    seq, batch, groups, _ = x.shape
    heads = [part.shape[2] for part in inputs]
    if setting.split:
        heads = [groups * setting.split[1], groups, groups]
    dtype = torch.promote_types(x.dtype, weights[0].dtype)
    return [*[x.new_empty(seq, batch, n, dim, dtype=dtype) for n in heads], _sums(inputs, setting)]


def _sums(inputs: list[Tensor], setting: Setting) -> Tensor:
    return inputs[0].new_empty(len(setting.terms), *inputs[0].shape[:2], dtype=torch.float32)


def _weight_gradient(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    return weights[0].new_empty(sum(w.numel() for w in weights), dtype=dtype)


def _input_gradients(inputs: list[Tensor], setting: Setting) -> list[Tensor]:
    """To be filled; zero from the start where other ranks own some of a group's query heads."""
    owns_all = not setting.split or (setting.split[1] + 2) * setting.head_dim == inputs[0].shape[-1]
    return [x.new_empty(x.shape) if owns_all else x.new_zeros(x.shape) for x in inputs]


# ------------------------------------------------------------------------------------------------------- the operators


@_operator("Tensor[] inputs", "Tensor", _sums)
def square_sums(inputs: list[Tensor], setting: Setting) -> Tensor:
    from compiled.norm_kernels import square_sums_kernel

    parts, sums = parts_of(inputs, setting)[: len(setting.terms)], _sums(inputs, setting)
    tokens, batch = _tokens(sums)
    if tokens:
        sizes = _sizes(parts, None, setting)
        warps = sizes.warps(PLAIN.square_sums)
        square_sums_kernel((tokens, 1, 1), (_views(parts), sums, batch), sizes, free=(tokens,), warps=warps)
    return sums


@_operator(
    "Tensor[] inputs, Tensor[] weights, Tensor? sums, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda inputs, weights, sums, cos, sin, setting: _outputs(inputs, weights, setting),
)
def forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    sums: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    from compiled.norm_kernels import forward_kernel

    parts = parts_of(inputs, setting)
    *ys, rstd = _outputs(inputs, weights, setting)
    tokens, batch = _tokens(rstd)
    if tokens:
        sizes = _sizes(parts, cos, setting)
        arguments = (
            _views(parts), _views(ys), tuple(weights), sums, rstd, _table(cos, sin), batch,
            setting.terms[0], setting.terms[-1], setting.eps,
        )  # fmt: skip
        warps = sizes.warps(_tuning(cos).forward)
        forward_kernel((tokens, 1, 1), arguments, sizes, free=(tokens,), warps=warps)
    return [*ys, rstd]


_BACKWARD = "Tensor[] grads, Tensor[] inputs, Tensor[] weights, Tensor rstd"


@_operator(
    f"{_BACKWARD}, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda grads, inputs, weights, rstd, cos, sin, setting: [
        *_input_gradients(inputs, setting),
        _weight_gradient(weights, weights[0].dtype),
    ],
)
def backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    dxs, dw = _input_gradients(inputs, setting), _weight_gradient(weights, weights[0].dtype)
    _launch_backward(grads, inputs, weights, rstd, cos, sin, setting, dxs=dxs, dw=dw, coupling=None)
    return [*dxs, dw]


@_operator(
    f"{_BACKWARD}, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda grads, inputs, weights, rstd, cos, sin, setting: [
        _sums(inputs, setting),
        _weight_gradient(weights, torch.float32),
    ],
)
def backward_sums(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    coupling, dw = _sums(inputs, setting), _weight_gradient(weights, torch.float32)
    _launch_backward(grads, inputs, weights, rstd, cos, sin, setting, dxs=None, dw=dw, coupling=coupling)
    return [coupling, dw]


@_operator(
    f"{_BACKWARD}, Tensor coupling, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda grads, inputs, weights, rstd, coupling, cos, sin, setting: _input_gradients(inputs, setting),
)
def backward_apply(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    coupling: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
) -> list[Tensor]:
    dxs = _input_gradients(inputs, setting)
    _launch_backward(grads, inputs, weights, rstd, cos, sin, setting, dxs=dxs, dw=None, coupling=coupling)
    return dxs


# --------------------------------------------------------------------------------------------------------- the launches


def _launch_backward(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    setting: Setting,
    *,
    dxs: list[Tensor] | None,
    dw: Tensor | None,
    coupling: Tensor | None,
) -> None:
    """Fill `dxs` and `dw`, as far as they are asked for; without `dxs` fill `coupling`, and without `dw` read it."""
    from compiled.norm_kernels import add_partials_kernel, backward_kernel

    tokens, batch = _tokens(rstd)
    if not tokens:
        if dw is not None:
            dw.zero_()
        return
    parts = parts_of(inputs, setting)
    if dxs is None:
        parts, grads = parts[: len(setting.terms)], grads[: len(setting.terms)]
    sizes, tuning = _sizes(parts, cos, setting), _tuning(cos)
    programs, stages, partials = tokens, 1, None
    warps = sizes.warps(tuning.apply if dw is None else tuning.backward)
    if dw is not None:
        resident = max(1, tuning.warps_a_multiprocessor // warps) * _multiprocessors(rstd.device)
        programs, stages = min(tokens, resident), tuning.stages
        partials = dw.new_empty(programs, dw.numel(), dtype=torch.float32)
    arguments = (
        _views(grads), _views(parts), None if dxs is None else _views(parts_of(dxs, setting)), tuple(weights),
        partials, rstd, coupling, _table(cos, sin), batch, setting.terms[0], setting.terms[-1],
    )  # fmt: skip
    backward_kernel((programs, 1, 1), arguments, (*sizes, stages), free=(tokens,), warps=warps)
    if dw is not None:
        width, rows, columns = dw.numel(), 64, 32
        add_partials_kernel((-(-width // columns), 1, 1), (partials, dw), (width, rows, columns), free=(programs,))


def _views(parts: list[Tensor]) -> tuple[tuple[Tensor, int, int, int], ...]:
    """Each tensor with its strides over seq, batch, and groups (or heads); its last axis must be dense."""
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in parts]
    return tuple([(x, *x.stride()[:3]) for x in dense])


def _table(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, int, int] | None:
    """cos and sin with their strides over seq and batch."""
    if cos is None:
        return None
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0), cos.stride(1) if cos.dim() == 3 else 0


def _tokens(sums: Tensor) -> tuple[int, int]:
    """seq * batch, and batch."""
    _, seq, batch = sums.shape
    return seq * batch, batch


class Sizes(NamedTuple):
    """The kernels' compile-time constants, as `norm_kernels` names them, in that order."""

    Q: int
    PER_GROUP: int
    K: int
    V: int
    DIM: int
    HALF: int
    BLOCK: int
    HALF_BLOCK: int
    REST_BLOCK: int

    def warps(self, elements_a_warp: int) -> int:
        return min(16, max(1, self.BLOCK * _power_of_two(self.DIM) // elements_a_warp))


def _sizes(parts: list[Tensor], cos: Tensor | None, setting: Setting) -> Sizes:
    dim, half = setting.head_dim, 0 if cos is None else cos.shape[-1]
    _, _, groups, width = parts[0].shape
    query, key, value = [groups * (width // dim), *[x.shape[2] for x in parts[1:]], 0, 0][:3]
    blocks = [_power_of_two(n) for n in (query + key + value, max(1, half), max(1, dim - 2 * half))]
    return Sizes(query, width // dim, key, value, dim, half, *blocks)


def _tuning(cos: Tensor | None) -> Tuning:
    return PLAIN if cos is None else TURNING


def _power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
