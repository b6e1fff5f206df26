"""The norms on two GPUs (NCCL): each rank's outputs and gradients are those of one process with all heads.

Query heads are spread over the ranks; key heads are too, or both ranks hold the one there is. Eager, compiled, and as a
CUDA graph of forward and backward, replayed on inputs that it was not captured with. Every rank reports its results and
what `reference.norm`, autograd and one process make of the same numbers in the same dtype and in float64; the tests
here judge the reports.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.checks import assert_calibrated
from torch import Tensor
from torch.multiprocessing import start_processes

from compiled import FullDimQKNorm
from reference.norm import full_dim_rms_norm
from reference.rope import apply_rotary, rotary_tables

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks of NCCL need two NVIDIA GPUs"),
]

SIZE, HEADS, DIM, ROTARY, SEQ, BATCH, EPS = 2, 12, 128, 64, 300, 2, 1e-6
# Key heads and form; fused: forward_fused with RoPE.
LAYOUTS, MODES = ((4, "two parts"), (1, "fused")), ("eager", "compiled", "graph")
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("query", "key", "dmixed", "dwq", "dwk")


class Case:
    """A layer's tensors, of which a rank has a part. `load` fills them anew, in place: a CUDA graph reads them."""

    def __init__(self, kv_heads: int, form: str, dtype: torch.dtype) -> None:
        self.rank, self.form, self.dtype = dist.get_rank(), form, dtype
        replicas, groups, heads = max(1, SIZE // kv_heads), max(1, kv_heads // SIZE), HEADS // SIZE
        self.norm = FullDimQKNorm(HEADS, kv_heads, DIM, lambda: dist.group.WORLD, EPS, dtype).cuda()
        self.weights = [self.norm.q_weight, self.norm.k_weight]
        self.per_group, self.replicas, self.replica = HEADS // kv_heads, replicas, self.rank % replicas
        self.heads = slice(self.rank * heads, (self.rank + 1) * heads)
        self.groups = slice(self.rank // replicas * groups, (self.rank // replicas + 1) * groups)
        self.own = slice(self.replica * heads, (self.replica + 1) * heads) if replicas > 1 else slice(None)
        tables = rotary_tables(torch.arange(SEQ), ROTARY, 1e4, dtype=dtype)
        self.tables = [table.cuda() for table in tables] if form == "fused" else []
        self.mixed = self.empty(groups, (self.per_group + 2) * DIM).requires_grad_()
        self.grads = [self.empty(heads, DIM), self.empty(groups, DIM)]
        self.kv_heads = kv_heads

    def empty(self, *last: int) -> Tensor:
        return torch.empty(SEQ, BATCH, *last, dtype=self.dtype, device="cuda")

    def load(self, seed: int) -> None:
        """The same numbers on every rank, of which each takes its part."""
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda").to(self.dtype)

        self.all_mixed = normal(SEQ, BATCH, self.kv_heads, (self.per_group + 2) * DIM)
        self.all_mixed[1, 1] = 0
        self.all_weights = [1 + 0.3 * normal(heads * DIM) for heads in (HEADS, self.kv_heads)]
        self.all_gq = normal(SEQ, BATCH, HEADS, DIM)
        # What reaches the keys from each replica's query heads.
        self.all_gk = normal(self.replicas, SEQ, BATCH, self.kv_heads, DIM)
        with torch.no_grad():
            self.mixed.copy_(self.all_mixed[:, :, self.groups])
            self.grads[0].copy_(self.all_gq[:, :, self.heads])
            self.grads[1].copy_(self.all_gk[self.replica][:, :, self.groups])
            for weight, whole, heads in zip(self.weights, self.all_weights, (self.heads, self.groups), strict=True):
                weight.copy_(channels(whole, heads))

    def split(self, mixed: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        query, key, _ = mixed.split([self.per_group * DIM, DIM, DIM], -1)
        return query.reshape(SEQ, BATCH, -1, DIM)[:, :, own], key

    def forward(self, mixed: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "fused":
            return self.norm.forward_fused(mixed, *self.tables)[:2]
        return self.norm(*self.split(mixed, self.own))

    def step(self, forward) -> list[Tensor]:
        outputs = forward(self.mixed)
        return [*outputs, *torch.autograd.grad(outputs, [self.mixed, *self.weights], self.grads)]

    def captured(self) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(self.forward)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, self.step(self.forward)

    def whole(self, results: list[Tensor]) -> dict[str, Tensor]:
        """By name; the ranks' shares of the fused qkv's gradient, each in its place, together are the whole."""
        named = dict(zip(NAMES, (x.detach().double() for x in results), strict=True))
        dmixed = torch.zeros_like(self.all_mixed, dtype=torch.float64)
        dmixed[:, :, self.groups] = named["dmixed"]
        dist.all_reduce(dmixed)
        return {name: x.cpu() for name, x in (named | {"dmixed": dmixed}).items()}

    def unsharded(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What one process with all heads makes of the same numbers, in `dtype`: this rank's part."""
        mixed, wq, wk = (x.to(dtype, copy=True).requires_grad_() for x in (self.all_mixed, *self.all_weights))
        query, key = self.split(mixed, slice(None))
        query, key = full_dim_rms_norm(query, wq, eps=EPS), full_dim_rms_norm(key, wk, eps=EPS)
        if self.tables:
            query, key = (apply_rotary(x, *(table.to(dtype) for table in self.tables)) for x in (query, key))
        torch.autograd.backward([query, key], [self.all_gq.to(dtype), self.all_gk.to(dtype).sum(0)])
        parts = (
            query[:, :, self.heads], key[:, :, self.groups], mixed.grad,
            channels(wq.grad, self.heads), channels(wk.grad, self.groups),
        )  # fmt: skip
        return {name: x.detach().double().cpu() for name, x in zip(NAMES, parts, strict=True)}


def channels(weight: Tensor, heads: slice) -> Tensor:
    return weight[heads.start * DIM : heads.stop * DIM]


def results_of(case: Case) -> dict[str, tuple[dict[str, Tensor], ...]]:
    """For each mode: ours, what one process makes of it, and the truth.

    The graph goes when this returns: NCCL waits for the graphs that use a communicator before it destroys it.
    """
    case.load(seed=0)
    graph, captured = case.captured()
    compiled = case.whole(case.step(torch.compile(case.forward, fullgraph=True)))
    results = {"compiled": (compiled, case.unsharded(case.dtype), case.unsharded(torch.float64))}
    case.load(seed=1)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    replayed, eager = case.whole(captured), case.whole(case.step(case.forward))
    expected = case.unsharded(case.dtype), case.unsharded(torch.float64)
    return results | {"graph": (replayed, *expected), "eager": (eager, *expected)}


def run_rank(rank: int, folder: Path) -> None:
    """One rank's work, in its own process; the report goes to a file."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=SIZE, device_id=device
    )
    report = {}
    for (kv_heads, form), dtype in product(LAYOUTS, DTYPES):
        torch._dynamo.reset()
        for mode, results in results_of(Case(kv_heads, form, dtype)).items():
            report[kv_heads, form, dtype, mode] = results
    torch.save(report, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list[dict]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp("nccl")
    start_processes(run_rank, (folder,), nprocs=SIZE, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(SIZE)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "form"), LAYOUTS)
def test_ranks_equal_one_process(reports, kv_heads, form, dtype, mode):
    for rank, report in enumerate(reports):
        ours, theirs, truth = report[kv_heads, form, dtype, mode]
        for name in NAMES:
            assert torch.isfinite(ours[name]).all()
            assert_calibrated(ours[name], theirs[name], truth[name], f"rank {rank} {name}")


def test_a_graph_replayed_equals_eager(reports):
    """On the same inputs, bit for bit."""
    for report in reports:
        for (kv_heads, form), dtype in product(LAYOUTS, DTYPES):
            graph, eager = (report[kv_heads, form, dtype, mode][0] for mode in ("graph", "eager"))
            assert all(torch.equal(graph[name], eager[name]) for name in NAMES), f"{kv_heads}, {form}, {dtype}"
