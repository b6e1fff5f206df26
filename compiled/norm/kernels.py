"""Triton kernels of the query and key norms: the query, key and value heads of a token are one tile [heads, head_dim].

Inputs are views `[seq, batch, groups, heads per group * head_dim]`, whole tensors or parts of the fused qkv; the last
stride must be 1, the others may be any. The tile's rows are the query heads, then the key heads, then the value heads,
and the address of each is computed per head. Value heads are copied: w = 1, r = 1. With RoPE a head is three tiles, the
two halves that rotate and the channels that do not, so that both channels of a pair are in the same thread.

Forward, each program norms one token. Backward, a few programs on each multiprocessor loop over the tokens, with the
weights and their gradients in registers and the next tokens' loads in flight; each then writes its part of dw, and a
last kernel adds the parts. S, C, r and R are those of `reference.norm`; `terms` is N R.

Where two kernels read the same tokens, one goes from the last token to the first: the other finds in the cache what it
read last.
"""

# ruff: noqa: N803, N806  (upper case: compile-time constants)

import triton
import triton.language as tl

from compiled.triton_launch import Launcher


@triton.jit
def _heads(parts, row, batch, head, Q: tl.constexpr, PER_GROUP: tl.constexpr, K: tl.constexpr, DIM: tl.constexpr):
    """Pointers to channel 0 of each head of a token. A part is (pointer, seq stride, batch stride, group stride)."""
    seq, sample = (row // batch).to(tl.int64), (row % batch).to(tl.int64)
    pointer, seq_stride, batch_stride, group_stride = parts[0]
    token = pointer + seq * seq_stride + sample * batch_stride
    address = token + head // PER_GROUP * group_stride + head % PER_GROUP * DIM
    if len(parts) > 1:
        pointer, seq_stride, batch_stride, group_stride = parts[1]
        token = pointer + seq * seq_stride + sample * batch_stride
        address = tl.where(head < Q, address, token + (head - Q) * group_stride)
    if len(parts) > 2:
        pointer, seq_stride, batch_stride, group_stride = parts[2]
        token = pointer + seq * seq_stride + sample * batch_stride
        address = tl.where(head < Q + K, address, token + (head - Q - K) * group_stride)
    return address


@triton.jit
def _weight(weights, head, Q: tl.constexpr, DIM: tl.constexpr):
    """Pointers to the weight of channel 0 of each head."""
    address = weights[0] + head * DIM
    if len(weights) > 1:
        address = tl.where(head < Q, address, weights[1] + (head - Q) * DIM)
    return address


@triton.jit
def _by_head(query, key, value, head, Q: tl.constexpr, K: tl.constexpr):
    return tl.where(head < Q, query, tl.where(head < Q + K, key, value))


@triton.jit
def _load(address, mask, other):
    return tl.load(address, mask=mask, other=other).to(tl.float32)


@triton.jit
def _angles(table, row, batch, channel, HALF: tl.constexpr):
    """cos and sin of a token, for each channel of one of the halves that rotate."""
    cos, sin, seq_stride, batch_stride = table
    offset = (row // batch).to(tl.int64) * seq_stride + (row % batch) * batch_stride + channel
    return _load(cos + offset, channel < HALF, 0.0), _load(sin + offset, channel < HALF, 0.0)


@triton.jit
def _rotating(c, s, head, NORMED: tl.constexpr):
    """cos and sin for each head; 1 and 0 for value heads, which do not rotate."""
    return tl.where(head < NORMED, c, 1.0), tl.where(head < NORMED, s, 0.0)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums(by_head, head, Q: tl.constexpr, K: tl.constexpr):
    """The sum over the query heads and the sum over the key heads, in one reduction."""
    query = tl.where(head < Q, by_head, 0.0)
    if K:
        key = tl.where((head >= Q) & (head < Q + K), by_head, 0.0)
        query, key = tl.reduce((query, key), 0, _add_pairs, keep_dims=True)
        return tl.sum(query), tl.sum(key)
    return tl.sum(query), 0.0


@triton.jit
def _scale(x, w, r, X: tl.constexpr, Y: tl.constexpr):
    """round(w * round(x r)): Hugging Face rounds twice."""
    return (w * (x * r).to(X).to(tl.float32)).to(Y).to(tl.float32)


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def square_sums_kernel(
    tokens, inputs, sums, batch,
    Q: tl.constexpr, PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tokens - 1 - tl.program_id(0)
    head, channel = tl.arange(0, BLOCK)[:, None], tl.arange(0, REST_BLOCK)[None, :]
    source = _heads(inputs, row, batch, head, Q, PER_GROUP, K, DIM)
    x = _load(source + channel, (head < Q + K) & (channel < DIM), 0.0)
    query, key = _sums(tl.sum(x * x, 1, keep_dims=True), head, Q, K)
    tl.store(sums + row, query)
    if K:
        tl.store(sums + tokens + row, key)


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    tokens, inputs, outputs, weights, sums, rstd, table, batch, query_terms, key_terms, eps,
    Q: tl.constexpr, PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    X: tl.constexpr = inputs[0][0].dtype.element_ty
    Y: tl.constexpr = outputs[0][0].dtype.element_ty
    row, head = tl.program_id(0), tl.arange(0, BLOCK)[:, None]
    half, rest = tl.arange(0, HALF_BLOCK)[None, :], 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    in_half, in_rest = (head < Q + K + V) & (half < HALF), (head < Q + K + V) & (rest < DIM)
    norm_half, norm_rest = in_half & (head < Q + K), in_rest & (head < Q + K)
    source = _heads(inputs, row, batch, head, Q, PER_GROUP, K, DIM)
    target = _heads(outputs, row, batch, head, Q, 1, K, DIM)
    weight = _weight(weights, head, Q, DIM)

    squares = tl.zeros([BLOCK, 1], tl.float32)
    if HALF:
        xa, xb = _load(source + half, in_half, 0.0), _load(source + HALF + half, in_half, 0.0)
        c, s = _angles(table, row, batch, half, HALF)  # early, to hide this latency too
        squares += tl.sum(xa * xa + xb * xb, 1, keep_dims=True)
    if 2 * HALF < DIM:
        xr = _load(source + rest, in_rest, 0.0)
        squares += tl.sum(xr * xr, 1, keep_dims=True)
    if sums is None:
        query, key = _sums(squares, head, Q, K)
    else:
        query, key = tl.load(sums + row), 0.0
        if K:
            key = tl.load(sums + tokens + row)
    query, key = tl.rsqrt(query / query_terms + eps), tl.rsqrt(key / key_terms + eps)
    tl.store(rstd + row, query)
    if K:
        tl.store(rstd + tokens + row, key)

    r = _by_head(query, key, 1.0, head, Q, K)
    if HALF:
        ya = _scale(xa, _load(weight + half, norm_half, 1.0), r, X, Y)
        yb = _scale(xb, _load(weight + HALF + half, norm_half, 1.0), r, X, Y)
        c, s = _rotating(c, s, head, Q + K)
        tl.store(target + half, ya * c - yb * s, mask=in_half)
        tl.store(target + HALF + half, yb * c + ya * s, mask=in_half)
    if 2 * HALF < DIM:
        tl.store(target + rest, _scale(xr, _load(weight + rest, norm_rest, 1.0), r, X, Y), mask=in_rest)


@Launcher
@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    tokens, grads, inputs, outputs, weights, partials, rstd, coupling, table, batch, query_terms, key_terms,
    Q: tl.constexpr, PER_GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dw (if `coupling` is None), dw and this rank's C (if `outputs` is None), or dx (if `partials` is None)."""
    head = tl.arange(0, BLOCK)[:, None]
    half, rest = tl.arange(0, HALF_BLOCK)[None, :], 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
    in_half, in_rest = (head < Q + K + V) & (half < HALF), (head < Q + K + V) & (rest < DIM)
    norm_half, norm_rest = in_half & (head < Q + K), in_rest & (head < Q + K)
    weight = _weight(weights, head, Q, DIM)
    if HALF:
        wa, wb = _load(weight + half, norm_half, 1.0), _load(weight + HALF + half, norm_half, 1.0)
        dwa, dwb = tl.zeros([BLOCK, HALF_BLOCK], tl.float32), tl.zeros([BLOCK, HALF_BLOCK], tl.float32)
    if 2 * HALF < DIM:
        wr, dwr = _load(weight + rest, norm_rest, 1.0), tl.zeros([BLOCK, REST_BLOCK], tl.float32)

    for index in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = tokens - 1 - index if partials is None else index
        source = _heads(inputs, row, batch, head, Q, PER_GROUP, K, DIM)
        grad = _heads(grads, row, batch, head, Q, 1, K, DIM)
        query_r, key_r = tl.load(rstd + row), 0.0
        if K:
            key_r = tl.load(rstd + tokens + row)
        r = _by_head(query_r, key_r, 1.0, head, Q, K)
        products = tl.zeros([BLOCK, 1], tl.float32)  # sum of w g x
        if HALF:
            c, s = _angles(table, row, batch, half, HALF)
            c, s = _rotating(c, s, head, Q + K)
            ya, yb = _load(grad + half, in_half, 0.0), _load(grad + HALF + half, in_half, 0.0)
            ga, gb = ya * c + yb * s, yb * c - ya * s
            xa, xb = _load(source + half, norm_half, 0.0), _load(source + HALF + half, norm_half, 0.0)
            products += tl.sum(wa * ga * xa + wb * gb * xb, 1, keep_dims=True)
        if 2 * HALF < DIM:
            gr, xr = _load(grad + rest, in_rest, 0.0), _load(source + rest, norm_rest, 0.0)
            products += tl.sum(wr * gr * xr, 1, keep_dims=True)

        if partials is None:
            query_c, key_c = tl.load(coupling + row), 0.0
            if K:
                key_c = tl.load(coupling + tokens + row)
        else:
            query_c, key_c = _sums(products, head, Q, K)
            if HALF:
                dwa += ga * xa * r
                dwb += gb * xb * r
            if 2 * HALF < DIM:
                dwr += gr * xr * r
        if outputs is None:
            tl.store(coupling + row, query_c)
            if K:
                tl.store(coupling + tokens + row, key_c)
        else:
            target = _heads(outputs, row, batch, head, Q, PER_GROUP, K, DIM)
            share = query_r * query_r * query_c / query_terms, key_r * key_r * key_c / key_terms
            coefficient = _by_head(share[0], share[1], 0.0, head, Q, K)
            if HALF:
                tl.store(target + half, r * (wa * ga - coefficient * xa), mask=in_half)
                tl.store(target + HALF + half, r * (wb * gb - coefficient * xb), mask=in_half)
            if 2 * HALF < DIM:
                tl.store(target + rest, r * (wr * gr - coefficient * xr), mask=in_rest)

    if partials is not None:
        part = partials + (tl.program_id(0) * (Q + K) + head) * DIM
        if HALF:
            tl.store(part + half, dwa, mask=norm_half)
            tl.store(part + HALF + half, dwb, mask=norm_half)
        if 2 * HALF < DIM:
            tl.store(part + rest, dwr, mask=norm_rest)


@Launcher
@triton.jit(do_not_specialize=["count"])
def add_partials_kernel(count, partials, total, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    accumulator = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        accumulator += tl.load(partials + row * WIDTH + column, mask=(row < count) & (column < WIDTH), other=0.0)
    tl.store(total + column, tl.sum(accumulator, 0, keep_dims=True), mask=column < WIDTH)
