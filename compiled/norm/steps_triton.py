"""The steps of `HeadNorm` as Triton kernels, each an operator that `torch.compile` calls without looking inside.

The functions, arguments and results are those of `steps_torch`, which says what each computes. No operator writes to
its arguments: a fused qkv's gradient is one new buffer, which the backward kernel fills head by head.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from compiled.norm.launches import Saved, Targets, fill_gradients, fill_outputs, fill_sums
from compiled.norm.spec import NormSpec
from compiled.tracing import is_traced


def _operator(arguments: str, returns: str, fake: Callable) -> Callable[[Callable], Callable]:
    """A decorator: an operator where torch traces; in eager mode the function itself, which is cheaper to call.

    `arguments` is the schema of all arguments but the last, the NormSpec, whose fields the operator takes one by one.
    `fake` returns empty tensors like the function's results.
    """
    size = len(NormSpec._fields)

    def decorate(function: Callable) -> Callable:
        def launch(*args: Any) -> Any:
            with torch.cuda.device_of(args[0][0]):  # Triton launches on the current device
                return function(*args)

        operator = custom_op(
            f"minimax_m2::norm_{function.__name__}",
            lambda *args: launch(*args[:-size], NormSpec(*args[-size:])),
            mutates_args=(),
            schema=f"({arguments}, int[] terms, float eps, int head_dim, int[] split) -> {returns}",
        )
        operator.register_fake(lambda *args: fake(*args[:-size], NormSpec(*args[-size:])))
        return lambda *args: operator(*args[:-1], *args[-1]) if is_traced(args[0][0]) else launch(*args)

    return decorate


# ------------------------------------------------------------------------------------------- what the operators return


def _outputs(inputs: list[Tensor], weights: list[Tensor], spec: NormSpec) -> list[Tensor]:
    x, dim = inputs[0], spec.head_dim
    seq, batch, groups, _ = x.shape
    heads = [part.shape[2] for part in inputs]
    if spec.split:
        heads = [groups * spec.split[1], groups, groups]
    dtype = torch.promote_types(x.dtype, weights[0].dtype)
    return [*[x.new_empty(seq, batch, n, dim, dtype=dtype) for n in heads], _sums(inputs, spec)]


def _sums(inputs: list[Tensor], spec: NormSpec) -> Tensor:
    return inputs[0].new_empty(len(spec.terms), *inputs[0].shape[:2], dtype=torch.float32)


def _weight_gradient(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    return weights[0].new_empty(sum(w.numel() for w in weights), dtype=dtype)


def _input_gradients(inputs: list[Tensor], spec: NormSpec) -> list[Tensor]:
    """Empty; zeros where other ranks own some of a group's query heads, whose gradients no kernel writes here."""
    owns_all = not spec.split or (spec.split[1] + 2) * spec.head_dim == inputs[0].shape[-1]
    return [x.new_empty(x.shape) if owns_all else x.new_zeros(x.shape) for x in inputs]


# ------------------------------------------------------------------------------------------------------- the operators


@_operator("Tensor[] inputs", "Tensor", _sums)
def square_sums(inputs: list[Tensor], spec: NormSpec) -> Tensor:
    sums = _sums(inputs, spec)
    fill_sums(inputs, spec, sums)
    return sums


@_operator(
    "Tensor[] inputs, Tensor[] weights, Tensor? sums, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda inputs, weights, sums, cos, sin, spec: _outputs(inputs, weights, spec),
)
def forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    sums: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    spec: NormSpec,
) -> list[Tensor]:
    *ys, rstd = outputs = _outputs(inputs, weights, spec)
    fill_outputs(inputs, weights, sums, cos, sin, spec, ys, rstd)
    return outputs


_BACKWARD = "Tensor[] grads, Tensor[] inputs, Tensor[] weights, Tensor rstd"


@_operator(
    f"{_BACKWARD}, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda grads, inputs, weights, rstd, cos, sin, spec: [
        *_input_gradients(inputs, spec),
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
    spec: NormSpec,
) -> list[Tensor]:
    dxs, dw = _input_gradients(inputs, spec), _weight_gradient(weights, weights[0].dtype)
    fill_gradients(grads, Saved(inputs, weights, rstd, cos, sin), spec, Targets(dxs, dw, None))
    return [*dxs, dw]


@_operator(
    f"{_BACKWARD}, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda grads, inputs, weights, rstd, cos, sin, spec: [
        _sums(inputs, spec),
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
    spec: NormSpec,
) -> list[Tensor]:
    coupling, dw = _sums(inputs, spec), _weight_gradient(weights, torch.float32)
    fill_gradients(grads, Saved(inputs, weights, rstd, cos, sin), spec, Targets(None, dw, coupling))
    return [coupling, dw]


@_operator(
    f"{_BACKWARD}, Tensor coupling, Tensor? cos, Tensor? sin",
    "Tensor[]",
    lambda grads, inputs, weights, rstd, coupling, cos, sin, spec: _input_gradients(inputs, spec),
)
def backward_apply(
    grads: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    rstd: Tensor,
    coupling: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    spec: NormSpec,
) -> list[Tensor]:
    dxs = _input_gradients(inputs, spec)
    fill_gradients(grads, Saved(inputs, weights, rstd, cos, sin), spec, Targets(dxs, None, coupling))
    return dxs
