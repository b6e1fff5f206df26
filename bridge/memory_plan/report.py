"""A plan in words and numbers: `summary`, `table` and `advice_rows` for people, `to_json` for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from bridge.memory_plan.plan import Plan, RankGroup, advice, rank_groups
from reference.activations import Workload
from reference.advice import Advice, Fit
from reference.checkpoint import parameter_count
from reference.parallelism import hybrid_layer_pattern, spread_layers

NOT_COUNTED = "activations, communication buffers and CUDA's own memory are not counted"
NOT_COUNTED_BESIDE_ACTIVATIONS = (
    "routing is assumed to be balanced; communication buffers, CUDA's own memory and fragmentation are not counted"
)
NOT_COUNTED_IN_FLOAT32 = NOT_COUNTED_BESIDE_ACTIVATIONS + ", nor is the memory of float32 attention's probabilities"


def gigabytes(nbytes: int) -> str:
    """In units of 10**9."""
    return f"{nbytes / 1e9:.2f} GB"


def compact(runs: Sequence[range]) -> str:
    """Runs of numbers as "0-7, 32-39"; of more than four the first two and the last."""
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if run]
    return ", ".join(texts if len(texts) < 5 else [*texts[:2], "\N{HORIZONTAL ELLIPSIS}", texts[-1]]) or "none"


def runs(ranks: Sequence[int]) -> list[range]:
    """Increasing numbers as runs of consecutive ones."""
    groups = groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0])
    return [range(run[0][1], run[-1][1] + 1) for run in (list(group) for _, group in groups)]


def holds(plan: Plan, group: RankGroup) -> str:
    """The layers of a group, and embedding and head where they are."""
    first, last = group.stage == 0, group.stage == plan.parallelism.pp - 1
    return ", ".join(["embedding"] * first + [f"layers {compact(group.layers)}"] + ["norm and head"] * last)


def experts_of(group: RankGroup) -> str:
    """The experts of each layer on the ranks of a group, and how many each has where they differ."""
    each = f" ({len(group.experts[0])} a rank)" if len(group.experts) > 1 else ""
    return compact(group.experts) + each


def flags(fit: Fit) -> str:
    """The options of `minimax-m2 plan` that ask for a layout."""
    p, layers, work = fit.parallelism, fit.parallelism.layers_per_stage, fit.workload
    sizes = {name: getattr(p, name) for name in ("tp", "pp", "vpp", "ep", "cp")}
    options = [*(f"--{name} {size}" for name, size in sizes.items() if size > 1), f"--etp {p.expert_tp}"]
    if layers and layers != spread_layers(sum(layers), len(layers)):
        options.append(f"--layers-per-stage {','.join(map(str, layers))}")
    if work is not None:
        names = ("seq_length", "micro_batch_size", "global_batch_size")
        sizes = {name.replace("_", "-"): getattr(work, name) for name in names}
        options += [f"--{name} {size}" for name, size in sizes.items() if size is not None]
        options += [f"--recompute {work.recompute}"] * (work.recompute != "none")
    return " ".join(options + ["--no-distributed-optimizer"] * (not fit.distributed_optimizer))


def table(plan: Plan, most: int = 16) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row of text for each group."""
    names = ["without distributed optimizer", "with distributed optimizer"]
    here = plan.distributed_optimizer
    rows = []
    for group in rank_groups(plan, most):
        chosen, other = plan.chosen(group), group.replicated if here else group.distributed
        expert = group.holding.expert
        parameters = f"{(group.holding.total - expert) / 1e9:.3f} + {expert / 1e9:.3f} B"
        parts = chosen if plan.workload else chosen[:-1]
        sizes = [gigabytes(size) for size in (*parts, chosen.total, other.total)]
        rows.append([compact(runs(group.ranks)), holds(plan, group), experts_of(group), parameters, *sizes])
    headings = ["ranks", "holds", "experts", "dense + expert parameters", "weights", "gradients", "optimizer"]
    headings += ["activations"] * (plan.workload is not None)
    return [*headings, f"total, {names[here]}", names[not here]], rows


def summary(plan: Plan, found: Advice | None = None) -> list[str]:
    """The run, whether it fits, and what the advice comes to, a line each."""
    p, room = plan.parallelism, gigabytes(abs(plan.headroom))
    sizes = {name: getattr(p, name) for name in ("tp", "cp", "dp", "pp", "vpp", "ep")} | {"etp": p.expert_tp}
    lines = [
        f"{parameter_count(plan.config) / 1e9:.1f} B parameters on {p.world_size} GPUs: "
        + ", ".join(f"{name} {size}" for name, size in sizes.items()),
        f"fullest rank: {gigabytes(plan.largest)} of {gigabytes(plan.memory)}; "
        + (f"fits, {room} left" if plan.headroom >= 0 else f"DOES NOT FIT, {room} too much"),
        not_counted(plan),
    ]
    if plan.workload is not None:
        lines.insert(1, _workload(plan, plan.workload))
    if found and (found.gpus > p.world_size or not found.fits):
        least = f"{gigabytes(found.least.largest)} with {flags(found.least)}"
        more = f"{found.gpus} would do" if found.fits else f"nor do {found.gpus}"
        lines.append(f"no layout of these {p.world_size} GPUs fits: the least is {least}; {more}")
    return lines


def not_counted(plan: Plan) -> str:
    """What a plan leaves out."""
    if plan.workload is None:
        return NOT_COUNTED
    return NOT_COUNTED_BESIDE_ACTIVATIONS if plan.workload.dtype == "bf16" else NOT_COUNTED_IN_FLOAT32


def _workload(plan: Plan, workload: Workload) -> str:
    return (
        f"activations: {workload.microbatches(plan.parallelism)} microbatches of {workload.micro_batch_size} x "
        f"{workload.seq_length} tokens a step, recompute {workload.recompute}"
    )


def pattern(plan: Plan) -> str:
    """The layers of a `HybridModel` in this layout, as megatron-core's `--hybrid-layer-pattern`."""
    return hybrid_layer_pattern(plan.config, plan.parallelism)


def advice_rows(found: Advice) -> tuple[list[str], list[list[str]]]:
    """Headings, and for each layout its options, what is different, and the bytes of its largest rank."""
    rows = [[flags(fit), ", ".join(fit.changes) or "more GPUs", gigabytes(fit.largest)] for fit in found.fits]
    return [f"layouts of {found.gpus} GPUs that fit", "different", "fullest rank"], rows


def to_json(plan: Plan) -> dict[str, Any]:
    """All of it as JSON has it: every rank, bytes as whole numbers, half-open ranges as [start, stop]."""
    found = advice(plan)
    return {
        "parameters": parameter_count(plan.config),
        "gpus": plan.parallelism.world_size,
        "sizes": asdict(plan.parallelism) | {"etp": plan.parallelism.expert_tp},
        "hybrid_layer_pattern": pattern(plan),
        "memory": plan.memory,
        "distributed_optimizer": plan.distributed_optimizer,
        "largest": plan.largest,
        "headroom": plan.headroom,
        "workload": plan.workload
        and asdict(plan.workload) | {"microbatches": plan.workload.microbatches(plan.parallelism)},
        "not_counted": not_counted(plan),
        "ranks": [
            {
                "rank": group.ranks[0],
                "pipeline_rank": group.stage,
                "layers": [[layers.start, layers.stop] for layers in group.layers],
                "experts": [group.experts[0].start, group.experts[0].stop],
                "parameters": group.holding._asdict(),
                "without_distributed_optimizer": group.replicated._asdict(),
                "with_distributed_optimizer": group.distributed._asdict(),
            }
            for group in plan.ranks
        ],
        "advice": found
        and {
            "gpus": found.gpus,
            "fits": [{"options": flags(fit), "changes": fit.changes, "largest": fit.largest} for fit in found.fits],
            "least_on_these_gpus": {"options": flags(found.least), "largest": found.least.largest},
        },
    }
