"""`norm_plain` with the Triton kernels of `norm_kernels`, as operators that `torch.compile` calls as they are.

Same functions, arguments and results; `norm_plain` says what each computes. No operator writes to its arguments: a
fused qkv's gradient is one new buffer, which the backward kernel fills head by head. The first call imports Triton.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from compiled.norm_plain import Setting, parts_of


class Launch(NamedTuple):
    """How a kernel runs: programs that stay resident and walk over the tokens."""

    elements_a_warp: int
    """Of a token's tile; 32 times what a thread holds."""
    warps_a_multiprocessor: int
    """Resident, over all programs."""
    stages: int
    """Tokens that a program has loaded or is loading."""


# The fastest on one H200 of those tried (tests/benchmarks/results).
SQUARE_SUMS = Launch(1024, 32, 3)
FORWARD = Launch(1024, 16, 3)
BACKWARD = Launch(512, 16, 3)
APPLY = Launch(1024, 16, 3)


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
    dtype, dim = torch.promote_types(inputs[0].dtype, weights[0].dtype), setting.head_dim
    shapes = [(*x.shape[:2], prod(x.shape[2:]) // dim, dim) for x in parts_of(inputs, setting)]
    return [*(inputs[0].new_empty(shape, dtype=dtype) for shape in shapes), _sums(inputs, setting)]


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
        programs, sizes = _sizes(SQUARE_SUMS, tokens, parts, None, setting)
        square_sums_kernel[(programs,)](_views(parts), sums, tokens, batch, **sizes)
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
        programs, sizes = _sizes(FORWARD, tokens, parts, cos, setting)
        forward_kernel[(programs,)](
            _views(parts), _views(ys), tuple(weights), sums, rstd, _table(cos, sin), tokens, batch,
            setting.terms[0], setting.terms[-1], setting.eps, **sizes,
        )  # fmt: skip
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
    programs, sizes = _sizes(APPLY if dw is None else BACKWARD, tokens, parts, cos, setting)
    partials = None if dw is None else dw.new_empty(programs, dw.numel(), dtype=torch.float32)
    backward_kernel[(programs,)](
        _views(grads), _views(parts), None if dxs is None else _views(parts_of(dxs, setting)), tuple(weights),
        partials, rstd, coupling, _table(cos, sin), tokens, batch, setting.terms[0], setting.terms[-1], **sizes,
    )  # fmt: skip
    if dw is not None:
        add_partials_kernel[(-(-dw.numel() // 32),)](partials, dw, programs, WIDTH=dw.numel(), ROWS=64, COLUMNS=32)


def _views(parts: list[Tensor]) -> tuple[tuple[Tensor, int, int, int], ...]:
    """Each tensor with its strides over seq, batch, and groups (or heads); its last axis must be dense."""
    dense = (x if x.stride(-1) == 1 else x.contiguous() for x in parts)
    return tuple((x, *x.stride()[:3]) for x in dense)


def _table(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor, int, int] | None:
    """cos and sin with their strides over seq and batch."""
    if cos is None:
        return None
    cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin, cos.stride(0), cos.stride(1) if cos.dim() == 3 else 0


def _tokens(sums: Tensor) -> tuple[int, int]:
    """seq * batch, and batch."""
    return sums[0].numel(), sums.shape[2]


def _sizes(
    launch: Launch, tokens: int, parts: list[Tensor], cos: Tensor | None, setting: Setting
) -> tuple[int, dict[str, int]]:
    """How many programs, and the kernels' compile-time constants as `norm_kernels` names them."""
    dim, half = setting.head_dim, 0 if cos is None else cos.shape[-1]
    heads = [prod(x.shape[2:]) // dim for x in parts] + [0, 0]
    block = _power_of_two(sum(heads))
    warps = min(16, max(1, block * _power_of_two(dim) // launch.elements_a_warp))
    resident = _multiprocessors(parts[0].device) * max(1, launch.warps_a_multiprocessor // warps)
    return min(tokens, resident), {
        "Q": heads[0], "PER_GROUP": parts[0].shape[-1] // dim, "K": heads[1], "V": heads[2],
        "DIM": dim, "HALF": half, "BLOCK": block, "HALF_BLOCK": _power_of_two(max(1, half)),
        "REST_BLOCK": _power_of_two(max(1, dim - 2 * half)), "STAGES": launch.stages, "num_warps": warps,
    }  # fmt: skip


def _power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
