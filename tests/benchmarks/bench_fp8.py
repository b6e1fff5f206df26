"""Time decoding and encoding of FP8 blocks, on the GPU where there is one, else on the CPU, beside what else there is.

    python tests/benchmarks/bench_fp8.py OUT.json
    CUDA_VISIBLE_DEVICES= python tests/benchmarks/bench_fp8.py OUT.json          the CPU of a machine with a GPU

Byte model: of n elements, decoding reads n bytes and writes 2 n (bfloat16), encoding reads 2 n and writes n, fresh
scales included; the scales are thousands of times smaller. The share is that of a copy which moves as many bytes, timed
in the same run (on the GPU, of the faster of its two ways: large copies are slow in a graph). Matrices are 1536 x 3072,
MiniMax-M2's experts; rows 192 to 384 are a shard of 8, which starts in the middle of a block.

On the GPU "eager" is the median of single calls between CUDA events, with Python and launch, and "graph" one of ten
runs in a CUDA graph, without them, for what does not wait for the GPU. On the CPU each implementation takes turns with
the copy and nothing else, and its share is that of this copy: both find the cores awake (one that slept costs a virtual
machine milliseconds) and in the caches what the other left, not what they want, as in a conversion: "turns", the
median, and "minimum". "looped" is the median of each by itself, over and over, with all of it in the caches. Ours, the
copy and the compiled formula write to memory that is there; the reference and megatron-bridge have no such argument.

"First call" is the first in a new process, with empty compilation caches (cold) and with those it leaves (warm). Peers
that are not installed are left out.
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from compiled import fp8
from reference import fp8 as reference

sys.path.insert(0, str(Path(__file__).parent))
from record import environment, median_ms

EXPERTS, ROWS, COLS, BLOCK = 256, 1536, 3072, 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPH_RUNS, CPU_ROUNDS = 10, 51
OURS, PLAIN = "compiled.fp8", "torch.compile(plain formula)"
warnings.filterwarnings("ignore")

Step = Callable[[], object]


class Candidate(NamedTuple):
    name: str
    step: Step
    waits: bool = False
    """For the GPU: then no CUDA graph can hold it."""


class Case(NamedTuple):
    """A weight, or the same rows of each of a stack of them."""

    name: str
    experts: int | None
    rows: slice

    def codes(self) -> tuple[Tensor, dict]:
        """Normal values in the range that their block's amax leaves them; their scales and where they start.

        Subnormal codes are rare then, as in trained weights. A CPU multiplies them slowly: where all codes are as
        likely, and one in 18 is subnormal, decoding takes 1.6 times as long.
        """
        stack = () if self.experts is None else (self.experts,)
        codes = (100 * torch.randn(*stack, ROWS, COLS, device=DEVICE)).clamp(-448, 448).to(reference.FP8)
        scales = torch.rand(reference.scale_grid(codes.shape), device=DEVICE) + 0.5
        first, last = self.rows.start // BLOCK, -(-self.rows.stop // BLOCK)
        where = {"scale_inv": scales[..., first:last, :].contiguous(), "row_offset": self.rows.start % BLOCK}
        return codes[..., self.rows, :], where


WHOLE, SHARD = slice(0, ROWS), slice(192, 384)
ONE_MATRIX = [Case("one matrix", None, WHOLE), Case("192 rows of it", None, SHARD)]
MANY = [Case("256 experts", EXPERTS, WHOLE), Case("192 rows of each", EXPERTS, SHARD)]


# ------------------------------------------------------------------------------------------------------ plain formulas


def spread(scales: Tensor, rows: int, row_offset: int) -> Tensor:
    row = (torch.arange(rows, device=scales.device) + row_offset) // BLOCK
    return scales[..., row, :].repeat_interleave(BLOCK, -1)


def blocks(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def plain_decode(codes: Tensor, scales: Tensor, out: Tensor, row_offset: int) -> None:
    if row_offset:
        out.copy_(codes.float() * spread(scales, codes.shape[-2], row_offset))
    else:
        blocks(out).copy_(blocks(codes).float() * scales[..., :, None, :, None])


def plain_encode(values: Tensor, scales: Tensor, out: Tensor) -> None:
    blocks(out).copy_((blocks(values).float() / scales[..., :, None, :, None]).clamp(-448, 448).to(reference.FP8))


def plain_encode_afresh(values: Tensor, out: Tensor) -> Tensor:
    amax = blocks(values).abs().amax((-3, -1)).float()
    scales = torch.where(amax > 0, amax / 448, 1.0)
    plain_encode(values, scales, out)
    return scales


def compiled(function: Callable, **options: bool) -> Callable:
    torch._dynamo.reset()  # else what another case compiled counts as a recompilation
    return torch.compile(function, fullgraph=True, **options)


# ----------------------------------------------------------------------------------------------------------- candidates


def copy(count: int) -> Candidate:
    """A copy that reads and writes `count` bytes together."""
    source = torch.zeros(count // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.ones_like(source)
    return Candidate("copy", lambda: target.copy_(source))


def decoders(case: Case) -> list[Candidate]:
    codes, where = case.codes()
    scales, row_offset = where.values()
    out = torch.zeros(codes.shape, dtype=torch.bfloat16, device=DEVICE)
    plain, free = compiled(plain_decode, dynamic=False), compiled(plain_decode, dynamic=True)
    unchecked = {"out": out, "check_values": False}
    made = [
        copy(3 * codes.numel()),
        Candidate(OURS, lambda: fp8.dequantize_blockwise(codes, **where, out=out), waits=True),
        Candidate(f"{OURS}, unchecked", lambda: fp8.dequantize_blockwise(codes, **where, **unchecked)),
        Candidate(PLAIN, lambda: plain(codes, scales, out, row_offset)),
        Candidate(f"{PLAIN}, free sizes", lambda: free(codes, scales, out, row_offset)),
    ]
    if not row_offset:  # the others know no offsets
        made.append(Candidate("reference.fp8", lambda: reference.dequantize_blockwise(codes, scales), waits=True))
        made += megatron_bridge(codes, scales) if case.experts is None else []
    return made


def megatron_bridge(codes: Tensor, scales: Tensor) -> list[Candidate]:
    try:
        from megatron.bridge.models.conversion.quantization_utils import dequantize_fp8_blockwise
    except ImportError:
        return []
    return [Candidate("megatron-bridge", lambda: dequantize_fp8_blockwise(codes, scales))]


def encoders(case: Case) -> list[Candidate]:
    codes, where = case.codes()
    scales = where["scale_inv"]
    values = fp8.dequantize_blockwise(codes, **where)
    plain = compiled(plain_encode, dynamic=False)
    unchecked = {"out": codes, "check_values": False}
    return [
        copy(3 * codes.numel()),
        Candidate(OURS, lambda: fp8.quantize_blockwise(values, **where, out=codes), waits=True),
        Candidate(f"{OURS}, unchecked", lambda: fp8.quantize_blockwise(values, **where, **unchecked)),
        Candidate(PLAIN, lambda: plain(values, scales, codes)),
        Candidate("reference.fp8", lambda: reference.quantize_blockwise(values, scale_inv=scales), waits=True),
    ]


def encoders_afresh(case: Case) -> list[Candidate]:
    codes, where = case.codes()
    values = fp8.dequantize_blockwise(codes, **where)
    plain = compiled(plain_encode_afresh, dynamic=False)
    unchecked = {"out": codes, "check_values": False}
    return [
        copy(3 * codes.numel()),
        Candidate(OURS, lambda: fp8.quantize_blockwise(values, out=codes), waits=True),
        Candidate(f"{OURS}, unchecked", lambda: fp8.quantize_blockwise(values, **unchecked)),
        Candidate(PLAIN, lambda: plain(values, codes)),
        Candidate("reference.fp8", lambda: reference.quantize_blockwise(values), waits=True),
    ]


# ------------------------------------------------------------------------------------------------------------ measuring


class Times(NamedTuple):
    """Milliseconds, and those of the copy that they are compared with, by mode."""

    own: dict[str, float]
    copy: dict[str, float]


def gpu_times(candidates: list[Candidate]) -> list[Times]:
    times = []
    for candidate in candidates:
        once = median_ms(candidate.step, warm_up=1, runs=1)
        runs = int(min(100, max(5, 400 / once)))
        times.append({"eager": median_ms(candidate.step, warm_up=min(5, runs), runs=runs)})
        if not candidate.waits:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(GRAPH_RUNS):
                    candidate.step()
            times[-1]["graph"] = median_ms(graph.replay, warm_up=1, runs=max(5, runs // GRAPH_RUNS)) / GRAPH_RUNS
    fastest = min(times[0].values())
    return [Times(own, dict.fromkeys(own, fastest)) for own in times]


def cpu_times(candidates: list[Candidate]) -> list[Times]:
    times = []
    for candidate in candidates:
        pair = candidate, candidates[0]
        rounds = [[cpu_ms(one.step) for one in pair] for _ in range(CPU_ROUNDS + 1)][1:]  # the first compiles
        looped = [[cpu_ms(one.step) for _ in range(CPU_ROUNDS)] for one in pair]
        median = statistics.median
        spent = zip(zip(*rounds, strict=True), looped, strict=True)
        times.append(Times(*({"turns": median(a), "minimum": min(a), "looped": median(b)} for a, b in spent)))
    return times


def cpu_ms(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def measure(operation: str, case: Case, make: Callable[[Case], list[Candidate]]) -> list[dict]:
    candidates = make(case)
    count = 3 * (case.experts or 1) * (case.rows.stop - case.rows.start) * COLS
    times = gpu_times(candidates) if DEVICE == "cuda" else cpu_times(candidates)
    rows = []
    for candidate, (own, copies) in zip(candidates, times, strict=True):
        row = {"operation": operation, "case": case.name, "implementation": candidate.name}
        for mode, ms in own.items():
            row[mode] = {
                "ms": round(ms, 5),
                "gb_a_second": round(count / ms / 1e6, 1),
                "share_of_copy": round(copies[mode] / ms, 3),
            }
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    cells = [
        f"{mode} {cell['ms']:9.4f} ms {cell['gb_a_second']:7.1f} GB/s {cell['share_of_copy']:6.1%}"
        for mode, cell in row.items()
        if isinstance(cell, dict)
    ]
    print(f"{row['operation']:15s} {row['case']:17s} {row['implementation']:40s}", *cells, flush=True)


FIRST_CALLS = {
    f"{OURS}, decode": lambda c, w, out: fp8.dequantize_blockwise(c, **w, out=out),
    f"{OURS}, encode": lambda c, w, out: fp8.quantize_blockwise(out, **w, out=c),
}


def first_call(name: str) -> float:
    """Seconds, in this process."""
    codes, where = ONE_MATRIX[0].codes()
    out = codes.to(torch.bfloat16)
    start = time.perf_counter()
    FIRST_CALLS[name](codes, where, out)
    out[0, 0].item()
    return time.perf_counter() - start


def first_calls() -> dict[str, dict[str, float]]:
    seconds = {}
    for name in FIRST_CALLS:
        with tempfile.TemporaryDirectory() as caches:
            folders = dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"), caches)
            for state in ("cold", "warm"):
                command = [sys.executable, __file__, "--first-call", name]
                printed = subprocess.check_output(command, env=os.environ | folders, text=True)
                seconds.setdefault(name, {})[state] = round(float(printed.split()[-1]), 2)
    return seconds


# --------------------------------------------------------------------------------------------------------------- report


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def main(path: str) -> None:
    torch.manual_seed(0)
    record = {"what": "FP8 blocks: decoding and encoding", **environment()}
    record["config"] = {
        "device": DEVICE, "devices": 1, "cpu": cpu_model(), "cpu_threads": torch.get_num_threads(),
        "matrix": [ROWS, COLS], "experts": EXPERTS, "block": BLOCK, "graph_runs": GRAPH_RUNS, "cpu_rounds": CPU_ROUNDS,
    }  # fmt: skip
    whole = [case for case in (*MANY, *ONE_MATRIX) if case.rows == WHOLE and (DEVICE == "cuda" or case not in MANY)]
    work = [("decode", case, decoders) for case in (*(MANY if DEVICE == "cuda" else ()), *ONE_MATRIX)]
    work += [("encode", case, encoders) for case in whole]
    work += [("encode afresh", case, encoders_afresh) for case in whole]
    record["first_call_s"] = first_calls()
    print(record["first_call_s"])
    record["rows"] = [row for item in work for row in measure(*item)]
    Path(path).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--first-call":
        print(first_call(sys.argv[2]))
    else:
        main(sys.argv[1])
