"""`compiled.fp8`'s functions as torch operators with fake kernels, for where torch traces them (`compiled.tracing`).

A fake kernel knows shapes and dtypes only: what an eager call finds wrong with its arguments, a traced one finds when
it runs. Operators return new tensors, and an `out` is filled by a copy. They may wait for the GPU, and are tagged so
that torch.compile leaves them out of its CUDA graphs.

In eager mode the functions are called as they are, which is cheaper.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from compiled.tracing import is_traced
from reference.config import FP8_BLOCK
from reference.fp8 import FP8

# Keywords and defaults are those of the functions.
_BLOCK = f"int block_size={FP8_BLOCK}"
_SLICE = f"{_BLOCK}, int row_offset=0, int col_offset=0, bool check_values=True, str name='weight'"
_FORMAT = "str scale_fmt='float'"


def traceable_dequantize[F: Callable[..., Any]](function: F) -> F:
    """`compiled.fp8.dequantize_blockwise`, which where it is traced is an operator."""
    operator = _operator(
        "dequantize",
        f"(Tensor weight, Tensor scale_inv, *, ScalarType dtype, {_SLICE}) -> Tensor",
        function,
        lambda weight, scale_inv, *, dtype, **_: weight.new_empty(weight.shape, dtype=dtype),
    )

    @wraps(function)
    def call(
        weight: Tensor,
        scale_inv: Tensor,
        *,
        dtype: torch.dtype = torch.bfloat16,
        out: Tensor | Sequence[Tensor] | None = None,
        **options: Any,
    ) -> Tensor | Sequence[Tensor]:
        if not is_traced(weight):
            return function(weight, scale_inv, dtype=dtype, out=out, **options)
        values = operator(weight.detach(), scale_inv.detach(), dtype=dtype, **options)
        return values if out is None else _fill(out, values)

    return call  # pyright: ignore[reportReturnType]  # the same signature


def traceable_quantize[F: Callable[..., Any]](function: F) -> F:
    """`compiled.fp8.quantize_blockwise`, which where it is traced is an operator: on given scales, or on fresh ones."""
    on_given = _operator(
        "quantize",
        f"(Tensor weight, Tensor scale_inv, *, {_FORMAT}, {_SLICE}) -> Tensor",
        lambda weight, scale_inv, **options: function(weight, scale_inv=scale_inv, **options)[0],
        lambda weight, scale_inv, **_: _codes(weight),
    )
    on_fresh = _operator(
        "quantize_afresh",
        f"(Tensor weight, *, {_FORMAT}, {_SLICE}) -> (Tensor, Tensor)",
        function,
        lambda weight, *, block_size=FP8_BLOCK, **_: (_codes(weight), _scales(weight, block_size)),
    )

    @wraps(function)
    def call(
        weight: Tensor, *, scale_inv: Tensor | None = None, out: Tensor | None = None, **options: Any
    ) -> tuple[Tensor | Sequence[Tensor], Tensor]:
        if not is_traced(weight):
            return function(weight, scale_inv=scale_inv, out=out, **options)
        if scale_inv is None:
            codes, scales = on_fresh(weight.detach(), **options)
        else:
            codes, scales = on_given(weight.detach(), scale_inv.detach(), **options), scale_inv
        return codes if out is None else _fill(out, codes), scales

    return call  # pyright: ignore[reportReturnType]  # the same signature


def traceable_requantize[F: Callable[..., Any]](function: F) -> F:
    """`compiled.fp8.requantize_blockwise`, which where it is traced is an operator."""

    def run(weight: Tensor, scale_inv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        codes, scales = function(weight, scale_inv, **options)
        return codes, scales.clone() if scales is scale_inv else scales  # an operator's result is no argument

    operator = _operator(
        "requantize",
        f"(Tensor weight, Tensor scale_inv, *, {_BLOCK}, {_FORMAT}, str name='weight') -> (Tensor, Tensor)",
        run,
        lambda weight, scale_inv, **_: (_codes(weight), scale_inv.new_empty(scale_inv.shape)),
    )

    @wraps(function)
    def call(weight: Tensor, scale_inv: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if not is_traced(weight):
            return function(weight, scale_inv, **options)
        return operator(weight.detach(), scale_inv.detach(), **options)

    return call  # pyright: ignore[reportReturnType]  # the same signature


def _operator(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    tags = (torch.Tag.cudagraph_unsafe,)
    operator = custom_op(f"minimax_m2::fp8_{name}", run, mutates_args=(), schema=schema, tags=tags)
    operator.register_fake(fake)
    return operator


def _codes(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=FP8)


def _scales(weight: Tensor, block_size: int) -> Tensor:
    """As many as `reference.fp8.scale_grid` says; its sizes may be symbols here."""
    *experts, rows, cols = weight.shape
    return weight.new_empty((*experts, -(-rows // block_size), -(-cols // block_size)), dtype=torch.float32)


def _fill(out: Tensor | Sequence[Tensor], values: Tensor) -> Tensor | Sequence[Tensor]:
    """`out`, a tensor or one for each expert, with these values.

    Raises:
        ValueError: another shape or dtype.
    """
    pairs = [(out, values)] if isinstance(out, Tensor) else list(zip(out, values, strict=True))
    for one, value in pairs:
        if one.shape != value.shape or one.dtype != value.dtype:
            raise ValueError(
                f"found out of {list(one.shape)}, {one.dtype}, expected {list(value.shape)}, {value.dtype}"
            )
        one.detach().copy_(value)
    return out
