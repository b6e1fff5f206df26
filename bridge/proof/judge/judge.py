"""The judge: a target's ranks at each layout, what they saw against the reference, and why it differs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch

from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.rank_pool import RankError, RankPool
from bridge.proof.judge.compare import absent, bookkeeping, first_step, later_steps, one_head_for_all, strangers
from bridge.proof.judge.failure import failure_of
from bridge.proof.judge.gather import gather
from bridge.proof.judge.layouts import RunLayout
from bridge.proof.judge.problem import STEPS, Problem, problem
from bridge.proof.judge.report import kinds
from bridge.proof.judge.target import Kind, Target, TargetError
from bridge.proof.judge.truth import Truth, rounding_bound, truth
from bridge.proof.judge.verdict import Judgement, LayoutVerdict, faults_of

# bfloat16 weights that move soon send tokens to other experts, and then there is nothing to compare.
STEPS_OF = {torch.float32: STEPS, torch.bfloat16: 1}
FLOAT32_ON_GPUS = {"NVIDIA_TF32_OVERRIDE": "0"}  # Transformer Engine's float32 products are TensorFloat-32 otherwise
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


class JudgesRanks:
    """Ranks for runs of any number of ranks, which stay while a `with` block lasts: NCCL where there are as many GPUs.

    `make` is a class of rank pools; what their ranks print is dropped.
    """

    def __init__(self, make: type[RankPool] = RankPool):
        self._make, self._stack = make, ExitStack()
        self._pools: dict[int, RankPool] = {}

    def __getitem__(self, world: int) -> RankPool:
        if world not in self._pools:
            on_gpus = torch.cuda.device_count() >= world
            backend, environment = ("nccl", FLOAT32_ON_GPUS) if on_gpus else ("gloo", NO_GPU)
            pool = self._make(world, backend, quiet=True, environment=environment)
            self._pools[world] = self._stack.enter_context(pool)
        return self._pools[world]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def judge(
    target: Target,
    layouts: Sequence[RunLayout],
    *,
    dtype: torch.dtype = torch.float32,
    ranks: JudgesRanks | None = None,
    progress: Progress = no_progress,
) -> Judgement:
    """Run a target at each layout and compare it with the reference.

    Args:
        target: what is judged.
        layouts: at least one.
        dtype: the model's, float32 or bfloat16.
        ranks: those of other judgements, for they take seconds to start; None starts some and ends them.

    Raises:
        TargetError: the target cannot be found, called, or told.
    """
    with ExitStack() as stack:
        ranks = ranks if ranks is not None else stack.enter_context(JudgesRanks())
        for world in sorted({layout.sizes.world_size for layout in layouts}):
            ranks[world].start()
        stack.enter_context(_one_thread())
        posed, steps = problem(dtype), STEPS_OF[dtype]
        kind = _described(ranks[min(layout.sizes.world_size for layout in layouts)], target, posed, dtype)
        exact, bound = truth(posed, steps), rounding_bound(posed, dtype)
        verdicts, notes = [], []
        for layout in progress(layouts, "judge", len(layouts)):
            verdict, remarks = _at(layout, ranks, target, posed, exact, dtype=dtype, bound=bound)
            verdicts.append(verdict)
            notes += remarks
        return Judgement(
            target.name, kind, str(dtype).removeprefix("torch."), tuple(verdicts), tuple(dict.fromkeys(notes))
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors here are small, and the ranks share the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _described(pool: RankPool, target: Target, posed: Problem, dtype: torch.dtype) -> Kind:
    from bridge.proof.judge.observe import describe

    try:
        return pool.call(describe, target, posed, dtype)[0]
    except RankError as error:
        found = failure_of(error)
        raised = TargetError(f"{target.name}: {found.reason}")
        for line in found.traceback:
            raised.add_note(line)
        raise raised from error


def _at(
    layout: RunLayout,
    ranks: JudgesRanks,
    target: Target,
    posed: Problem,
    exact: Truth,
    *,
    dtype: torch.dtype,
    bound: float,
) -> tuple[LayoutVerdict, list[str]]:
    from bridge.proof.judge.observe import observe

    try:
        seen = ranks[layout.sizes.world_size].call(observe, target, posed, layout, dtype, len(exact.outcomes))
    except RankError as error:
        return LayoutVerdict(layout.name, bound, {}, failure=failure_of(error)), []
    together = gather(seen, posed.config, layout.sizes)
    errors, diagnosis = first_step(together, posed, layout.sizes, bound)
    faults = [] if diagnosis is None else faults_of(diagnosis)
    strange = _named(seen, lambda rank: rank.bindings.strange)
    faults += strangers(strange) + absent(_named(seen, lambda rank: rank.bindings.missing))
    if not strange:  # whose gradients are in megatron-core's norm too
        more, found = bookkeeping(together, _named(seen, lambda rank: rank.unmarked), bound)
        errors, faults = errors | more, faults + found
    if diagnosis is None:
        faults += one_head_for_all(together)
    if not faults:
        later, faults = later_steps(together, exact, bound)
        errors |= later
    notes = kinds(_named(seen, lambda rank: rank.bindings.guessed))
    return LayoutVerdict(layout.name, bound, errors, tuple(faults), diagnosis), notes


def _named(seen: Sequence[Any], names: Callable[[Any], Iterable[str]]) -> list[str]:
    """What any rank has."""
    return sorted({name for rank in seen for name in names(rank)})
