"""A step on paper: memory by part, traffic, FLOPs and time, for the table in bridge/memory_plan/README.md.

Time is that of the matrix products at a rate that was measured on one GPU, stretched by what a layout adds without any
traffic: recomputation repeats the forward pass, the pipeline waits for its slowest stage, and for its first microbatch
to come through. Traffic is in no part of it, as if all of it were hidden behind computation.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bridge.memory_plan.plan import Plan, layout, parse_memory, plan
from bridge.memory_plan.report import flags
from bridge.training.metrics import PEAKS, flops_per_token
from reference.activations import Recompute, Workload
from reference.advice import Fit, advise
from reference.config import ModelConfig
from reference.parallelism import Parallelism
from reference.step_traffic import Traffic, most_layers, traffic

# Model FLOP/s of a GPU in such layers, in bfloat16 with fusions and CUDA graphs, by `bench train`'s records: of two
# H200s at EP 2 (`train_speed_h200_ep2.json`), and of one H100 (`train_speed_h100.json`) with older and slower kernels,
# when the processor still waited for the GPU in each layer, as it does where ranks send each other tokens.
RATES = {"H100": 296e12, "H200": 345e12}
MEMORY = {"H100": "80GB", "H200": "141GB"}
ROOM = 0.9  # of a GPU's memory may be planned: the rest is what is not counted


class ExpectedStep(NamedTuple):
    """A step of a layout: FLOPs of all ranks, seconds at the given rate, and what a rank sends."""

    flops: float
    seconds: float
    traffic: Traffic

    def tokens_per_second(self, workload: Workload, parallelism: Parallelism) -> float:
        """Of each GPU."""
        sequences = workload.microbatches(parallelism) * workload.micro_batch_size * parallelism.dp
        return sequences * workload.seq_length / self.seconds / parallelism.world_size


class Choice(NamedTuple):
    """A layout that is recommended for so many GPUs of a kind; no sizes where none fits."""

    gpus: int
    kind: str
    recompute: Recompute
    sizes: dict[str, Any]


SEQUENCE, BATCH = 4096, 1024
CHOICES = (
    Choice(16, "H100", "full", {}),
    Choice(16, "H200", "full", {}),
    Choice(64, "H100", "full", {"tp": 2, "pp": 8, "vpp": 2, "ep": 8, "etp": 1}),
    Choice(64, "H200", "none", {"tp": 2, "pp": 8, "vpp": 2, "ep": 8, "etp": 1}),
    Choice(512, "H100", "none", {"tp": 4, "pp": 4, "vpp": 4, "ep": 8, "etp": 1}),
    Choice(512, "H200", "none", {"tp": 2, "pp": 4, "vpp": 4, "ep": 8, "etp": 1}),
)


def expected_step(config: ModelConfig, parallelism: Parallelism, workload: Workload, rate: float) -> ExpectedStep:
    """A step at `rate` model FLOP/s on each GPU.

    Raises:
        ValueError: the layout does not divide the model or the workload.
    """
    microbatches = workload.microbatches(parallelism)
    tokens = microbatches * workload.micro_batch_size * parallelism.dp * workload.seq_length
    flops = flops_per_token(config, workload.seq_length) * tokens
    again = 4 / 3 if workload.recompute == "full" else 1
    uneven = most_layers(config, parallelism) * parallelism.pp / config.num_hidden_layers
    waiting = 1 + (parallelism.pp - 1) / (parallelism.vpp * microbatches)
    seconds = flops / (rate * parallelism.world_size) * again * uneven * waiting
    return ExpectedStep(flops, seconds, traffic(config, parallelism, workload))


def table(config: ModelConfig, choices: Iterable[Choice] = CHOICES) -> list[str]:
    """The choices as a table in Markdown: GB of 10**9 bytes, of the rank that needs most, and GB that a rank sends."""
    head = ["GPUs", "layout", "weights", "gradients", "optimizer", "activations", "total", "data", "experts", "tensor",
            "pipeline", "s a step", "tokens/s a GPU", "MFU"]  # fmt: skip
    rows = [head, ["---"] * len(head), *(_row(config, choice, len(head)) for choice in choices)]
    return [f"| {' | '.join(row)} |" for row in rows]


def planned(config: ModelConfig, choice: Choice) -> Plan:
    """The plan of a choice."""
    workload = Workload(seq_length=SEQUENCE, global_batch_size=BATCH, recompute=choice.recompute)
    parallelism = layout(config, gpus=choice.gpus, **choice.sizes)
    return plan(config, parallelism, memory=parse_memory(MEMORY[choice.kind]), workload=workload)


def _row(config: ModelConfig, choice: Choice, width: int) -> list[str]:
    gpus = f"{choice.gpus} {choice.kind}"
    found = planned(config, choice)
    if not choice.sizes:
        least = _least(found)
        told = f"none fits: {_options(least.parallelism, choice)} needs least"
        return [gpus, told, *[""] * 4, f"{least.largest / 1e9:.1f}", *[""] * (width - 7)]
    workload, p = found.workload, found.parallelism
    assert workload is not None
    step = expected_step(config, p, workload, RATES[choice.kind])
    fullest = max((found.chosen(group) for group in found.ranks), key=lambda held: held.total)
    mfu = step.flops / step.seconds / choice.gpus / PEAKS[choice.kind]
    return [
        gpus,
        _options(p, choice),
        *_gigabytes([*fullest, fullest.total], 1),
        *_gigabytes(step.traffic, 0),
        f"{step.seconds:.1f}",
        f"{step.tokens_per_second(workload, p):.0f}",
        f"{100 * mfu:.0f} %",
    ]


def _least(found: Plan) -> Fit:
    """The layout of as many GPUs that needs least, which is too much."""
    return advise(
        found.config, found.parallelism, memory=found.memory, distributed_optimizer=True, workload=found.workload
    ).least


def _options(parallelism: Parallelism, choice: Choice) -> str:
    """The layout as the command's options."""
    recompute = f" --recompute {choice.recompute}" * (choice.recompute != "none")
    return f"`{flags(Fit(parallelism, True, 0, None, ()))}{recompute}`"


def _gigabytes(sizes: Sequence[int], digits: int) -> list[str]:
    return [f"{size / 1e9:.{digits}f}" for size in sizes]
