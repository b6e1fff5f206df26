"""Time MiniMax-M2's query and key norms, forward and with backward, on NVIDIA GPUs, beside what else there is.

    python tests/benchmarks/bench_norm.py OUT.json
    torchrun --nproc-per-node 2 tests/benchmarks/bench_norm.py OUT.json      heads spread over two GPUs

Byte model: a norm must read x and write y once, and backward read x and dL/dy and write dx; of a fused qkv the same,
with the value read and written too each way (it is copied), but not read again backward. Weights, sums and tables are
thousands of times smaller. The floor is these bytes at the bandwidth of a large copy, measured in the same run. Times
are medians of single runs between CUDA events, in turns; in a CUDA graph, of replays of a graph of several runs,
divided. The backward pass is `torch.autograd.grad`, so that nothing is accumulated. "kept" is the memory that the
forward pass leaves allocated beyond its inputs and outputs. Peers that are not installed are left out.

First calls, with what they compile, are timed on one GPU in fresh processes: with empty caches, then with filled ones.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from compiled import FullDimQKNorm, RMSNorm
from reference.rope import rotary_tables

sys.path.insert(0, str(Path(__file__).parent))
from record import environment

HIDDEN, HEADS, KV_HEADS, DIM, ROTARY, EPS, DTYPE = 3072, 48, 8, 128, 64, 1e-6, torch.bfloat16
TOKENS = (4096, 32768)
GRAPH_RUNS, ROUNDS, ROUND_RUNS = 10, 7, 20
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
OURS, WITHOUT = "FullDimQKNorm", "no norm"  # the other rows are peers
FIRST_CALLS = "--first-calls"
warnings.filterwarnings("ignore")


class Candidate(NamedTuple):
    """Something that maps `inputs` to outputs; gradients go to inputs and parameters."""

    name: str
    call: Callable[[], tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    forward_bytes: int
    backward_bytes: int


# ------------------------------------------------------------------------------------------------------------ measuring


def median_us(run: Callable[[], object], runs: int = 100) -> float:
    """Of single runs, after some to warm up."""
    for _ in range(20):
        run()
    times = []
    for _ in range(runs):
        if WORLD > 1:
            dist.barrier()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def graph_us(run: Callable[[], object]) -> float | None:
    """The same, launches excluded; None for what cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_RUNS):
                run()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return median_us(graph.replay, 20) / GRAPH_RUNS


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(2**30, dtype=DTYPE, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_us(lambda: target.copy_(source)) * 1e-6)


def kept_bytes(candidate: Candidate) -> int:
    candidate.call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outputs = candidate.call()
    return torch.cuda.memory_allocated() - before - sum(x.untyped_storage().nbytes() for x in outputs)


def in_turns_us(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Launches included: medians over rounds in which all take turns, for the processor's speed drifts."""
    rounds = [{name: median_us(run, ROUND_RUNS) for name, run in runs.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(times[name] for times in rounds) for name in runs}


def step_of(candidate: Candidate) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward."""
    grads = [torch.randn_like(x) for x in candidate.call()]
    leaves = (*candidate.inputs, *candidate.parameters)
    return lambda: torch.autograd.grad(candidate.call(), leaves, grads)


def measure(all_candidates: list[Candidate], tokens: int, bandwidth: float) -> list[dict]:
    rows = []
    for candidate in all_candidates:
        torch.cuda.empty_cache()
        row = {"implementation": candidate.name, "tokens": tokens, "kept_bytes_a_token": kept_bytes(candidate) / tokens}
        rows.append(row)
    kinds = {
        "forward": {c.name: (c.call, c.forward_bytes) for c in all_candidates},
        "forward+backward": {c.name: (step_of(c), c.forward_bytes + c.backward_bytes) for c in all_candidates},
    }
    for kind, runs in kinds.items():
        eager = in_turns_us({name: run for name, (run, _) in runs.items()})
        for row in rows:
            run, count = runs[row["implementation"]]
            floor = count / bandwidth * 1e6
            for mode, us in (("eager", eager[row["implementation"]]), ("graph", graph_us(run))):
                row[f"{kind}, {mode}"] = us and {
                    "us": round(us, 1),
                    "gb_a_second": round(count / us / 1e3),
                    "share_of_copy": round(floor / us, 3),
                    "times_floor": round(us / floor, 2),
                }
    return rows


# ----------------------------------------------------------------------------------------------------------- candidates


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if WORLD > 1 else None


def plain(x: Tensor, w: Tensor) -> Tensor:
    """The norm in one line, for torch.compile."""
    wide = x.flatten(-2).float()
    return ((wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * w).view(x.shape)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE, requires_grad=True)


def candidates(tokens: int) -> list[Candidate]:
    heads, kv_heads = HEADS // WORLD, KV_HEADS // WORLD
    query, key = normal(tokens, 1, heads, DIM), normal(tokens, 1, kv_heads, DIM)
    mixed = normal(tokens, 1, kv_heads, (heads // kv_heads + 2) * DIM)
    tables = [x.cuda() for x in rotary_tables(torch.arange(tokens), ROTARY, 5e6, dtype=DTYPE)]
    two_parts = ((query, key), 2 * (query.nbytes + key.nbytes), 3 * (query.nbytes + key.nbytes))
    fused = ((mixed,), 2 * mixed.nbytes, 3 * mixed.nbytes - key.nbytes)

    def of(name: str, call: Callable, parameters: tuple[Tensor, ...], of_what: tuple = two_parts) -> Candidate:
        inputs, forward_bytes, backward_bytes = of_what
        return Candidate(name, call, inputs, parameters, forward_bytes, backward_bytes)

    ours = FullDimQKNorm(HEADS, KV_HEADS, DIM, group, EPS, DTYPE).cuda()
    weights = (ours.q_weight, ours.k_weight)
    made = [
        of(OURS, lambda: ours(query, key), weights),
        of(f"{OURS}, fused qkv", lambda: ours.forward_fused(mixed), weights, fused),
        of(f"{OURS}, fused qkv + RoPE", lambda: ours.forward_fused(mixed, *tables), weights, fused),
    ]
    if WORLD == 1:
        compiled = torch.compile(plain, dynamic=False)
        made.append(
            of(
                "torch.compile(plain formula) x2",
                lambda: (compiled(query, weights[0]), compiled(key, weights[1])),
                weights,
            )
        )
        made += transformer_engine(query, key, mixed, tokens, of, fused) + liger(query, key, weights, of)
    return made + megatron_bridge(query, key, of)


def transformer_engine(
    query: Tensor, key: Tensor, mixed: Tensor, tokens: int, of: Callable, fused: tuple
) -> list[Candidate]:
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
    except ImportError:
        return []
    q_norm, k_norm = (te.RMSNorm(x.shape[2] * DIM, eps=EPS, params_dtype=DTYPE) for x in (query, key))
    angles = torch.arange(tokens)[:, None] * 5e6 ** -(torch.arange(0, ROTARY, 2) / ROTARY)
    angles = torch.cat([angles, angles], -1)[:, None, None].cuda()

    def norms() -> tuple[Tensor, Tensor]:
        return tuple(norm(x.flatten(-2)).view(x.shape) for norm, x in ((q_norm, query), (k_norm, key)))

    def split_and_turn() -> tuple[Tensor, Tensor, Tensor]:
        """What a layer without norms does between the qkv projection and attention, which wants a dense value."""
        q, k, v = mixed.split([mixed.shape[-1] - 2 * DIM, DIM, DIM], -1)
        q = q.reshape(tokens, 1, -1, DIM)
        return *(apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True) for x in (q, k)), v.contiguous()

    return [
        of("Transformer Engine RMSNorm x2", norms, (q_norm.weight, k_norm.weight)),
        of(f"{WITHOUT}: split + Transformer Engine RoPE", split_and_turn, (), fused),
    ]


def liger(query: Tensor, key: Tensor, weights: tuple[Tensor, Tensor], of: Callable) -> list[Candidate]:
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        return []

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x.view(-1, len(w)), w, EPS, 0.0, "llama", False).view(x.shape)

    return [of("Liger RMSNorm x2", lambda: (norm(query, weights[0]), norm(key, weights[1])), weights)]


def megatron_bridge(query: Tensor, key: Tensor, of: Callable) -> list[Candidate]:
    try:
        from megatron.bridge.models.minimax_m2.minimax_m2_provider import _FullDimRMSNorm
    except ImportError:
        return []
    q_norm, k_norm = (
        _FullDimRMSNorm(x.shape[2] * DIM, heads * DIM, WORLD, group, EPS, DTYPE).cuda()
        for x, heads in ((query, HEADS), (key, KV_HEADS))
    )
    return [of("megatron-bridge", lambda: (q_norm(query), k_norm(key)), (q_norm.weight, k_norm.weight))]


# ---------------------------------------------------------------------------------------------------------- first calls


def first_calls() -> dict[str, float]:
    """Seconds of the first forward and backward pass of a layer's norms in this process, eager and compiled."""
    qk_norm = FullDimQKNorm(HEADS, KV_HEADS, DIM, group, EPS, DTYPE).cuda()
    hidden_norm = RMSNorm(HIDDEN, EPS, DTYPE).cuda()
    tokens = TOKENS[0]
    tables = [x.cuda() for x in rotary_tables(torch.arange(tokens), ROTARY, 5e6, dtype=DTYPE)]
    mixed, x = normal(tokens, 1, KV_HEADS, (HEADS // KV_HEADS + 2) * DIM), normal(tokens, 1, HIDDEN)
    modules = {
        f"{OURS}, fused qkv + RoPE": lambda: qk_norm.forward_fused(mixed, *tables),
        "RMSNorm": lambda: (hidden_norm(x),),
    }
    seconds = {}
    for mode in ("eager", "torch.compile"):
        for name, call in modules.items():
            run = torch.compile(call, fullgraph=True) if mode == "torch.compile" else call
            torch.cuda.synchronize()
            start = time.perf_counter()
            outputs = run()
            torch.autograd.backward(outputs, outputs)
            torch.cuda.synchronize()
            seconds[f"{name}, {mode}"] = round(time.perf_counter() - start, 3)
    return seconds | {"together": round(sum(seconds.values()), 3)}


def first_call_seconds() -> dict[str, dict[str, float]]:
    """In two fresh processes, of which the first fills the caches on disk."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
        caches = {name: f"{folder}/{name}" for name in names}
        command = [sys.executable, __file__, FIRST_CALLS]
        runs = {}
        for state in ("cold", "warm"):
            done = subprocess.run(command, env=os.environ | caches, stdout=subprocess.PIPE, text=True, check=True)
            runs[state] = json.loads(done.stdout.splitlines()[-1])
    return runs


# --------------------------------------------------------------------------------------------------------------- report


def all_reduce_us(tokens: int) -> dict:
    """A bare all-reduce of the sums of one way, [2, tokens] in float32."""
    sums = torch.randn(2, tokens, device="cuda")
    return {
        "tokens": tokens,
        "eager_us": median_us(lambda: dist.all_reduce(sums)),
        "graph_us": graph_us(lambda: dist.all_reduce(sums)),
    }


def show(row: dict) -> None:
    def cell(name: str) -> str:
        value = row[name]
        return (
            f"{value['us']:7.0f} us {value['gb_a_second']:5d} GB/s {value['share_of_copy']:4.0%}" if value else " " * 27
        )

    columns = (f"{name}, {mode}" for name in ("forward", "forward+backward") for mode in ("eager", "graph"))
    print(
        f"{row['tokens']:6d} {row['implementation']:40s}",
        *map(cell, columns),
        f"{row['kept_bytes_a_token']:8.0f}",
        flush=True,
    )


def against_peers(rows: list[dict]) -> list[dict]:
    """Ours with launches, forward and backward, as a share of the fastest peer's time in this run."""
    what = "forward+backward, eager"
    compared = []
    for tokens in TOKENS:
        us = {row["implementation"]: row[what]["us"] for row in rows if row["tokens"] == tokens}
        peers = [name for name in us if not name.startswith((OURS, WITHOUT))]
        if peers:
            best = min(peers, key=us.get)
            shares = {name: round(us[name] / us[best], 3) for name in us if name.startswith(OURS)}
            compared.append({"tokens": tokens, "best_peer": best, "us": us[best], "share_of_its_time": shares})
    return compared


def main(path: str) -> None:
    torch.cuda.set_device(RANK)
    if WORLD > 1:
        dist.init_process_group("nccl")
    torch.manual_seed(RANK)
    bandwidth = copy_bandwidth()
    record = {
        "what": "MiniMax-M2 query and key norms",
        **environment(),
        "config": {
            "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "rotary_dim": ROTARY, "dtype": str(DTYPE),
            "tensor_parallel": WORLD, "graph_runs": GRAPH_RUNS, "eager_rounds": ROUNDS,
        },
        "copy_bandwidth_gb_a_second": round(bandwidth / 1e9),
        "rows": [],
    }  # fmt: skip
    if RANK == 0:
        print(f"{record['hardware']}, TP {WORLD}, copy {record['copy_bandwidth_gb_a_second']} GB/s")
        print(" " * 47, "forward: eager, graph; forward + backward: eager, graph; bytes a token kept")
    for tokens in TOKENS:
        rows = measure(candidates(tokens), tokens, bandwidth)
        record["rows"] += rows
        if RANK == 0:
            for row in rows:
                show(row)
        if WORLD > 1:
            record.setdefault("all_reduce", []).append(all_reduce_us(tokens))
            if RANK == 0:
                print(record["all_reduce"][-1])
    record["eager forward+backward, against the best peer"] = against_peers(record["rows"])
    if WORLD == 1:
        record["first_call_seconds"] = first_call_seconds()
    if RANK == 0:
        for name in ("eager forward+backward, against the best peer", "first_call_seconds"):
            print(name, record.get(name))
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == FIRST_CALLS:
        print(json.dumps(first_calls()))
    else:
        main(sys.argv[1])
