"""What can befall a training run, on one of its ranks: killed, its writer killed, a full disk, numbers not finite."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import distributed

from support.training_runs import run_job

SECONDS = 60.0


def failure_of(work: Callable[..., Any], *arguments: Any) -> tuple[str, str]:
    """The type and the words of what a call raises on this rank."""
    try:
        work(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError(f"{work.__name__} raised nothing")


def failed_run(values: dict[str, Any]) -> tuple[str, str]:
    """A run that must raise."""
    return failure_of(run_job, values)


# ------------------------------------------------------------------------------------------------ while it is saved


@contextmanager
def before_files_of(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called by the process that writes a step's checkpoint, before it writes."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    real = FileSystemWriterAsync.write_preloaded_data

    def act_and_write(transforms: Any, number: int, bucket: Any, *others: Any) -> Any:
        if f"iter_{step:07d}" in str(bucket[0]):
            act()
        return real(transforms, number, bucket, *others)

    with patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(act_and_write)):
        yield


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


MOMENTS = ("while its files are written", "before .metadata", "before the tracker file")


def die_in_save(values: dict[str, Any], step: int, moment: str) -> None:
    """A run that is killed with SIGKILL while it saves a step.

    A process that writes then is an orphan. One that is there after a second makes a file `orphan` beside the run.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from bridge.training import saver

    pid = os.getpid()

    def die_and_go_on() -> None:
        kill(pid)
        time.sleep(1)
        Path(values["out"]).with_name("orphan").touch()

    if moment == MOMENTS[0]:
        with before_files_of(step, die_and_go_on):
            run_job(values)
    owner, name = {MOMENTS[1]: (FileSystemWriterAsync, "finish"), MOMENTS[2]: (saver, "write_bytes")}[moment]
    real = getattr(owner, name)

    def die(*arguments: Any) -> Any:
        if not (Path(values["out"]) / "checkpoints" / f"iter_{step:07d}").exists():
            return real(*arguments)
        return kill(pid)

    with patch.object(owner, name, die):
        run_job(values)


def writer_dies(values: dict[str, Any], step: int, rank: int) -> tuple[str, str]:
    """A run of which one rank's writing process is killed at a step; what it raises."""
    trainer = os.getpid()

    def die() -> None:
        assert os.getpid() != trainer
        if distributed.get_rank() == rank:
            kill(os.getpid())

    with before_files_of(step, die):
        return failed_run(values)


def writer_has_no_room(values: dict[str, Any], step: int, rank: int) -> tuple[str, str]:
    """A run of which one rank's writing process may write no file beyond 8 kB at a step; what it raises."""

    def limit() -> None:
        if distributed.get_rank() == rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    with before_files_of(step, limit):
        return failed_run(values)


def write_after_step(values: dict[str, Any], saved: int, later: int, seen: Path) -> dict[str, Any]:
    """A run whose checkpoint of one step is written after a later one; `seen` gets what was complete until then."""
    out = Path(values["out"])

    def wait() -> None:
        until = time.monotonic() + SECONDS
        while f'"step": {later},' not in (out / "metrics.jsonl").read_text():
            assert time.monotonic() < until
            time.sleep(0.01)
        folder = out / "checkpoints"
        complete = [*folder.glob("*/.metadata"), *folder.glob("*/metadata.json"), *folder.glob("latest_*")]
        seen.write_text(" ".join(map(str, complete)) or "nothing complete")

    with before_files_of(saved, wait):
        return run_job(values)


# ---------------------------------------------------------------------------------------------------- not finite


@contextmanager
def planted(plant: Callable[[Any], None]) -> Iterator[list[Any]]:
    """Inside, `plant` is given each model that a run has built, on each rank; they are in the list."""
    from bridge.training import train as training

    real, built = training.build, []

    def build(*arguments: Any, **options: Any) -> Any:
        built.append(real(*arguments, **options))
        plant(built[-1])
        return built[-1]

    with patch.object(training, "build", build):
        yield built


def layer_of(trained: Any, number: int) -> Any:
    """A layer counted over the model from 0, where this rank has it."""
    layers = [layer for chunk in trained.chunks for layer in chunk.decoder.layers]
    return next((layer for layer in layers if layer.layer_number == number + 1), None)


def infinite_gradient(trained: Any, layer: int, value: float = torch.inf) -> Any:
    """From now on the gradient of a layer's attention is not finite, on one tensor-parallel rank."""
    from megatron.core import parallel_state

    if (found := layer_of(trained, layer)) is None or parallel_state.get_tensor_model_parallel_rank():
        return None

    def plant(_module: Any, _inputs: Any, outputs: Any) -> None:
        if outputs[0].requires_grad:
            outputs[0].register_hook(lambda gradient: torch.full_like(gradient, value))

    return found.self_attention.linear_proj.register_forward_hook(plant)


def nan_weight(trained: Any, layer: int) -> None:
    """One entry of a layer's output projection of attention, on one tensor-parallel rank."""
    from megatron.core import parallel_state

    if (found := layer_of(trained, layer)) is not None and not parallel_state.get_tensor_model_parallel_rank():
        with torch.no_grad():
            found.self_attention.linear_proj.weight[0, 0] = torch.nan


PLANTS: dict[str, Callable[..., Any]] = {"gradient": infinite_gradient, "weight": nan_weight}


def state_of(trained: Any) -> dict[str, torch.Tensor]:
    """Copies of weights, router biases, float32 weights and moments."""
    found = {f"{n}.{name}": value for n, chunk in enumerate(trained.chunks)
             for name, value in chunk.state_dict().items() if isinstance(value, torch.Tensor)}  # fmt: skip
    for number, optimizer in enumerate(trained.optimizer.chained_optimizers):
        for index, state in enumerate(optimizer.optimizer.state.values()):
            found |= {f"{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return {name: value.detach().clone() for name, value in found.items()}


def run_with_planted(values: dict[str, Any], what: str, layer: int) -> tuple[str, str, list[str]]:
    """What a run raises in whose layer something is planted, and what of this rank its first step has changed."""
    before: dict[str, torch.Tensor] = {}

    def plant(trained: Any) -> None:
        PLANTS[what](trained, layer)
        before.update(state_of(trained))

    with planted(plant) as built:
        kind, words = failed_run(values)
    after = state_of(built[0])
    changed = [name for name, value in before.items() if not torch.equal(value.nan_to_num(), after[name].nan_to_num())]
    return kind, words, changed


def fail_while_it_is_written(values: dict[str, Any], what: str) -> tuple[str, str]:
    """What a run raises whose third step fails while the checkpoint of the second waits to be written."""

    def plant(trained: Any) -> None:
        steps = iter(range(1, 100))

        def before(_module: Any, _inputs: Any) -> None:
            if next(steps) != 3 * len_of_step:
                return
            if what == "gradient":
                infinite_gradient(trained, 1)
            elif what == "error" or distributed.get_rank() == 1:
                raise ZeroDivisionError("planted")

        len_of_step = values["global_batch_size"] // distributed.get_world_size()
        trained.chunks[0].register_forward_pre_hook(before)

    with planted(plant), before_files_of(2, lambda: time.sleep(1)):
        found = failed_run(values)
    if what == "error on rank 1" and distributed.get_rank() == 1:
        os._exit(7)
    return found
