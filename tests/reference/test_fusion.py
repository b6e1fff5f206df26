"""Layouts move rows and nothing else: against explicit loops over rows, for arbitrary bit patterns of every dtype."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.fusion import merge_gate_up, merge_qkv, split_gate_up, split_qkv, stack_experts, unstack_experts

DTYPES = st.sampled_from(
    [torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64]
)
COLUMNS = st.sampled_from([(), (1,), (5,)])  # a vector, matrices
SIZES = st.integers(1, 4)


def tensor(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Arbitrary bits: NaN payloads, infinities, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(x: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return x.dtype, tuple(x.shape), x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits_of_rows(rows: list[Tensor]) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What `bits` would say of these rows one below the other."""
    dtype, shape = rows[0].dtype, (len(rows), *rows[0].shape)
    return dtype, shape, b"".join(bits(row.reshape(-1))[2] for row in rows)


def check(function, inverse, parts: tuple[Tensor, ...], merged_rows: list[Tensor]) -> None:
    """`function` gives these rows, `inverse` the parts again, and neither writes to what it was given."""
    before = [bits(part) for part in parts]
    merged = function(*parts)
    assert bits(merged) == bits_of_rows(merged_rows)
    whole = bits(merged)
    again = inverse(merged)
    assert [bits(part) for part in again] == before
    assert bits(merged) == whole
    assert [bits(part) for part in parts] == before


@settings(max_examples=25, deadline=None)
@given(groups=SIZES, heads_per_group=SIZES, head_dim=SIZES, cols=COLUMNS, dtype=DTYPES)
def test_qkv_is_group_by_group_query_heads_key_head_value_head(groups, heads_per_group, head_dim, cols, dtype):
    q = tensor(groups * heads_per_group * head_dim, *cols, dtype=dtype, seed=0)
    k = tensor(groups * head_dim, *cols, dtype=dtype, seed=1)
    v = tensor(groups * head_dim, *cols, dtype=dtype, seed=2)
    rows = []
    for group in range(groups):
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            rows += [q[head * head_dim + channel] for channel in range(head_dim)]
        rows += [k[group * head_dim + channel] for channel in range(head_dim)]
        rows += [v[group * head_dim + channel] for channel in range(head_dim)]
    check(
        lambda q, k, v: merge_qkv(q, k, v, num_query_groups=groups),
        lambda qkv: split_qkv(qkv, num_query_groups=groups, heads_per_group=heads_per_group),
        (q, k, v),
        rows,
    )


@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 6), cols=COLUMNS, dtype=DTYPES)
def test_gate_up_is_w1_over_w3(width, cols, dtype):
    w1, w3 = (tensor(width, *cols, dtype=dtype, seed=seed) for seed in (0, 1))
    check(merge_gate_up, split_gate_up, (w1, w3), [*w1, *w3])


@settings(max_examples=15, deadline=None)
@given(experts=st.integers(1, 12), shape=st.sampled_from([(3,), (2, 3), (1, 1)]), dtype=DTYPES)
def test_expert_e_is_at_index_e_of_the_stack(experts, shape, dtype):
    weights = tuple(tensor(*shape, dtype=dtype, seed=expert) for expert in range(experts))
    check(lambda *weights: stack_experts(list(weights)), unstack_experts, weights, list(weights))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_transposed_and_sliced_parts_are_read_as_they_look(dtype):
    q, k, v = (tensor(3, 2 * rows, dtype=dtype, seed=rows).T[::2] for rows in (8, 4, 4))
    merged = merge_qkv(q, k, v, num_query_groups=2)
    assert bits(merged) == bits_of_rows([*q[:4], *k[:2], *v[:2], *q[4:], *k[2:], *v[2:]])


# ------------------------------------------------------------------------------------------------- errors


def zeros(rows: int) -> Tensor:
    return torch.zeros(rows, 2)


ERRORS = {
    "q": (
        lambda: merge_qkv(zeros(7), zeros(4), zeros(4), num_query_groups=2),
        "q: 7 rows do not divide into 2 query groups",
    ),
    "k": (
        lambda: merge_qkv(zeros(6), zeros(4), zeros(4), num_query_groups=3),
        "k: 4 rows do not divide into 3 query groups",
    ),
    "qkv": (
        lambda: split_qkv(zeros(25), num_query_groups=2, heads_per_group=4),
        "linear_qkv: 25 rows do not divide into 2 groups of 4 query heads, a key head and a value head",
    ),
    "qkv of one group": (
        lambda: split_qkv(zeros(13), num_query_groups=1, heads_per_group=4),
        "linear_qkv: 13 rows do not divide into 1 groups of 4 query heads, a key head and a value head",
    ),
    "fc1": (lambda: split_gate_up(zeros(5)), "linear_fc1: 5 rows, expected an even number"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_a_wrong_number_of_rows_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()
