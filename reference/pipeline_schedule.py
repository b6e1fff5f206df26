"""Which microbatches a pipeline rank has run forward and not yet backward: their activations are in memory together.

Without virtual stages (1F1B) a rank runs `pp - stage - 1` forward passes to warm up, then one forward and one backward
pass in turn. With virtual stages it takes groups of `pp` microbatches through chunk after chunk, and its backward
passes go through the chunks in reverse; it warms up with `2 (pp - stage - 1) + (vpp - 1) pp` forward passes of a chunk.

Source: megatron-core pipeline_parallel.schedules: get_pp_rank_microbatches, get_schedule_table, with groups of `pp`
(`microbatch_group_size_per_vp_stage`) and without overlap of the experts' communication, which adds one forward pass.
"""

# Groups of pp microbatches after which a step only repeats itself: the warm-up is shorter than two.
SETTLED = 4


def in_flight(*, pp: int, vpp: int, stage: int, microbatches: int) -> set[tuple[int, ...]]:
    """How many microbatches each of the rank's `vpp` chunks holds, after each forward pass of a step.

    `stage` is the pipeline rank. Each entry of the set is one moment of the step or more.
    """
    few = min(microbatches, SETTLED * pp + microbatches % pp)
    order = chunks_forward(pp=pp, vpp=vpp, microbatches=few)
    ahead = min(warm_up(pp=pp, vpp=vpp, stage=stage), len(order))
    held, seen = [0] * vpp, set()
    for step, chunk in enumerate(order):
        held[chunk] += 1
        seen.add(tuple(held))
        if step >= ahead:
            held[vpp - 1 - order[step - ahead]] -= 1
    return seen


def warm_up(*, pp: int, vpp: int, stage: int) -> int:
    """Forward passes of a chunk before the first backward pass, where the step has that many and more."""
    after = pp - stage - 1
    return after if vpp == 1 else 2 * after + (vpp - 1) * pp


def chunks_forward(*, pp: int, vpp: int, microbatches: int) -> list[int]:
    """The chunk of each of a rank's forward passes, in order."""
    groups = range(0, microbatches, pp)
    return [chunk for first in groups for chunk in range(vpp) for _ in range(first, min(first + pp, microbatches))]
