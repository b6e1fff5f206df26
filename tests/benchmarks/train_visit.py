"""The ranks' part of `bench_train.py`: visits of rows, one after another, each from the same weights.

A visit builds the model and its optimizer as `minimax-m2 train` does, with a row's overrides, and makes steps by the
driver's own `train_step`. What is timed is the whole step, from zeroing gradients to the optimizer's update, host time
between two waits for the GPU; routing is forced to be balanced, at random. A visit that checks makes other steps, with
the router's own choice and on the same tokens again and again, and keeps losses and gradient norms.

Weights are drawn on the device by name, rounded to bfloat16 in every row. Every visit is a line of JSON in a file, and
an error ends the process: after a failed capture a GPU's state is nobody's guarantee. `bench_train.py` starts another.
"""

import gc
import hashlib
import json
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from bridge.jobs.ranks import all_gather_objects, is_rank_zero
from bridge.memory_plan.plan import layout
from bridge.model import build as build_models
from bridge.model.fusions import fusion_environment
from bridge.model.process_groups import groups_of
from bridge.model.safe_settings import REFUSALS
from bridge.training import optimizer
from bridge.training.cuda_graphs import CudaGraphs
from bridge.training.garbage import short_collections
from bridge.training.metrics import flops_per_token, memory_gb, peak_flops
from bridge.training.settings import TrainJob
from bridge.training.step import StepResult, train_step
from bridge.training.train import build

sys.path.insert(0, str(Path(__file__).parent))
from idle import profiled
from record import environment
from train_rows import LAYERS, PEER, ROWS, Row, Shape

SEED = 1234
Purpose = Literal["check", "time", "profile"]
LEFT_OVER = 2 << 30  # bytes that a visit may leave behind
BALANCED = {"moe_router_force_load_balancing": True}


class RandomOnDevice(NamedTuple):
    """A `bridge.training.start.Start` whose weights are drawn where they stay: 1/sqrt(fan-in), norms 1."""

    config: Any
    model: str
    folder: Path = Path()
    what: str = "random weights"

    def fill(self, chunks: Sequence[nn.Module], progress: object = None) -> None:
        with torch.no_grad():
            for number, chunk in enumerate(chunks):
                for name, parameter in chunk.named_parameters():
                    parameter.copy_(self._drawn(f"{number} {name}", parameter))

    def _drawn(self, name: str, parameter: Tensor) -> Tensor:
        if parameter.dim() == 1:
            return torch.ones_like(parameter)
        if self.model == "hybrid":  # the attention of layer 3 is its layer 6, the experts its layer 7
            name = re.sub(r"(?<=layers\.)\d+", lambda found: str(int(found[0]) // 2), name)
        where = [SEED, name, parallel_state.get_pipeline_model_parallel_rank()]
        if not getattr(parameter, "allreduce", True):  # megatron-core's mark of an expert
            where += [parallel_state.get_expert_model_parallel_rank()]
            where += [parallel_state.get_expert_tensor_parallel_rank()]
        elif getattr(parameter, "tensor_model_parallel", False):
            where += [parallel_state.get_tensor_model_parallel_rank()]
        digest = hashlib.sha256(str(where).encode()).digest()[:8]
        generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(digest) >> 1)
        drawn = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        std = self.config.initializer_range if "embedding" in name else 1 / math.sqrt(parameter.shape[-1])
        return (drawn * std).bfloat16()


def job_of(row: Row, shape: Shape, sizes: dict[str, Any], dp: int) -> TrainJob:
    """The driver's settings of a visit; nothing is read or written by it."""
    return TrainJob(
        model="random",
        data=("random",),
        out="nowhere",
        model_class=row.model,
        steps=1000,
        seq_length=shape.seq,
        global_batch_size=shape.microbatches * dp,
        lr=1e-4,
        schedule="constant",
        dtype=row.dtype,
        recompute=row.recompute,
        cuda_graphs=row.graphs,
        fusions=row.fusions,
        **sizes,
    )  # fmt: skip


def microbatches(shape: Shape, *, seed: int) -> list[dict[str, Tensor]]:
    """Random tokens, all of them trained on; each data-parallel rank has its own."""
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = torch.randint(0, shape.vocab, (shape.microbatches, 1, shape.seq + 1), generator=generator)
    mask = torch.ones(1, shape.seq)
    return [{"tokens": one[:, :-1], "labels": one[:, 1:], "loss_mask": mask} for one in tokens]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def visit(name: str, shape: Shape, sizes: dict[str, Any], purpose: Purpose) -> dict[str, Any]:
    """One row's steps, on all ranks: their seconds and the peak of memory, or their losses, or what one is made of.

    Or what was refused.
    """
    row, dp, arrived = ROWS[name], parallel_state.get_data_parallel_world_size(), time.perf_counter()
    job, start = job_of(row, shape, sizes, dp), RandomOnDevice(shape.config(sizes["ep"]), row.model)
    model_parallel_cuda_manual_seed(SEED, te_rng_tracker=row.graphs, force_reset_rng=True)
    torch.manual_seed(SEED)  # the routing, on a processor
    with ExitStack() as stack:
        if row.lifts:
            kept = {key: refusal for key, refusal in REFUSALS.items() if key not in row.lifts}
            stack.enter_context(patch.dict(REFUSALS, kept, clear=True))
        try:
            overrides = dict(row.settings) | ({} if purpose == "check" else BALANCED)
            trained = build(job, start, spec=LAYERS[row.layers], **overrides)
        except ValueError as error:
            return {"refused": str(error)}
    graphs = CudaGraphs(trained) if row.graphs else None
    if graphs is not None:
        graphs.capture()
    data = microbatches(shape, seed=0)

    def steps(first: int, count: int) -> Iterator[tuple[float, Any]]:
        for number in range(first, first + count):
            synchronize()
            began = time.perf_counter()
            result = train_step(trained, [iter(data) for _ in trained.chunks])
            synchronize()
            assert isinstance(result, StepResult), f"step {number}: the {result.what} is not finite"
            yield time.perf_counter() - began, result

    if purpose == "check":
        made = [result for _, result in steps(1, shape.checked)]
        found: dict[str, Any] = {"losses": [one.loss for one in made], "norms": [one.grad_norm for one in made]}
    else:
        built = time.perf_counter() - arrived
        warm_up = [seconds for seconds, _ in steps(1, shape.warm_up)]
        if purpose == "profile":
            found = {"profiled": profiled(lambda: list(steps(shape.warm_up + 1, 1)))}
        else:
            found = timed(steps, shape)
        found["before"] = {"to build": round(built, 2), "first steps": [round(one, 2) for one in warm_up]}
    if graphs is not None:
        graphs.delete()
    return found


def timed(steps: Callable[[int, int], Iterator[tuple[float, Any]]], shape: Shape) -> dict[str, Any]:
    """Seconds of the measured steps, of the slowest rank each, and the most memory that any rank had."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    measured = [seconds for seconds, _ in steps(shape.warm_up + 1, shape.timed)]
    seconds = [max(of_ranks) for of_ranks in zip(*all_gather_objects(measured), strict=True)]
    found: dict[str, Any] = {"seconds": seconds, "peak GB": max(all_gather_objects(memory_gb()))}
    if torch.cuda.is_available():  # what graphs keep for themselves is in this alone
        found["reserved GB"] = max(all_gather_objects(torch.cuda.max_memory_reserved() / 1e9))
    return found


def main(plan: dict[str, Any]) -> None:
    """`plan`: the `visits` ([round, row]), the rounds' `purposes`, `shape`, `sizes`, `out`, and until when."""
    warnings.simplefilter("ignore")
    shape, sizes, out = Shape(**plan["shape"]), plan["sizes"], Path(plan["out"])

    def write(line: dict[str, Any]) -> None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")

    config = shape.config(sizes["ep"])
    parallelism = layout(config, gpus=int(os.environ.get("WORLD_SIZE", "1")), **sizes)
    with groups_of(parallelism, seed=SEED):
        if is_rank_zero():
            flops = flops_per_token(config, shape.seq)
            about = {"flops a token": flops, "peak FLOP/s": peak_flops(), "dp": parallelism.dp}
            write({**about, "environment": environment()})
        for number, name in plan["visits"]:
            if all_gather_objects(time.time() > plan["until"])[0]:
                break
            key = {"round": number, "row": name}
            if is_rank_zero():
                write({**key, "began": time.time()})
            try:
                with ExitStack() as stack:
                    stack.enter_context(patch.dict(os.environ, fusion_environment(ROWS[name].fusions)))
                    if ROWS[name].layers == PEER:  # megatron-core's dispatcher as it is
                        stack.enter_context(patch.object(build_models, "leave_sorted", lambda _: None))
                    if ROWS[name].their_experts:
                        stack.enter_context(patch.object(optimizer, "prepare_experts", lambda _: False))
                    if ROWS[name].their_optimizer:
                        stack.enter_context(patch.object(optimizer, "with_fused_step", lambda chained: chained))
                    stack.enter_context(short_collections())  # as `bridge.training.loop` does around its steps
                    found = visit(name, shape, sizes, plan["purposes"][number])
            except BaseException as error:
                where = traceback.format_exc().strip().splitlines()[-8:]
                write({**key, "failed": f"{type(error).__name__}: {str(error)[:2000]}", "where": where})
                os._exit(1)  # the other ranks may wait for this one for good
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if is_rank_zero():
                write({**key, **found, "ended": time.time()})
            if any(all_gather_objects(torch.cuda.is_available() and torch.cuda.memory_allocated() > LEFT_OVER)):
                break  # another process has all of the memory
        all_gather_objects(None)
        os._exit(0)  # NCCL's end may wait for graphs that are gone


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
