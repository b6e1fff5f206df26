"""A run's checkpoints: megatron-core's `torch_dist`, with the optimizer's state, loadable at any layout.

    checkpoints/latest_checkpointed_iteration.txt    the newest complete one; written last
    checkpoints/iter_0000010/                        weights, optimizer, schedule, training arguments
    checkpoints/hugging_face/                        config.json, tokenizer: for `minimax-m2 export` and `verify`

A save that was killed leaves a folder that the tracker file does not name: it is not read, and the next one replaces
it. The optimizer's state is stored like the weights, in whole tensors ("fully_reshardable"), and its groups are made
anew when it is loaded: they differ between layouts, and all that is in them is the step, which all have in common.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from bridge.convert.training_arguments import common_state
from bridge.formats import FORMAT_NAME
from bridge.torch_dist.checkpoint import open_folder
from bridge.torch_dist.metadata import METADATA_NAME
from bridge.training.settings import TrainJob
from bridge.training.step import Trained
from reference.config import ModelConfig
from reference.model_class import ModelClass

TRACKER = "latest_checkpointed_iteration.txt"
WRITTEN_LAST = (METADATA_NAME, FORMAT_NAME)  # in this order, when all else is there
# To be copied: megatron-core lays process groups into what it is given.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def iteration_name(step: int) -> str:
    """As Megatron-LM names the folder of a step."""
    return f"iter_{step:07d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the run's complete checkpoints, in order: those that have the two files that a save writes last."""
    numbers = {path: path.name.removeprefix("iter_") for path in folder.glob("iter_*")}
    steps = {path: int(number) for path, number in numbers.items() if number.isdecimal()}
    return sorted(
        step
        for path, step in steps.items()
        if path.name == iteration_name(step) and all((path / name).is_file() for name in WRITTEN_LAST)
    )


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint of a run, which the tracker file names; None if there is none.

    Without a tracker file it is the only complete one, which a run that is killed after its first checkpoint and before
    the tracker file leaves. Of several nobody knows which were meant to be kept, and a run that began anew would delete
    them.

    Raises:
        ValueError: the tracker file does not name a complete checkpoint, or is not there beside several.
    """
    tracker, complete = folder / TRACKER, complete_steps(folder)
    if not tracker.is_file():
        if len(complete) > 1:
            names = ", ".join(map(iteration_name, complete))
            raise ValueError(
                f"{tracker}: is not there, and {names} are beside it; write the number of the one to go on from into "
                f"it, {complete[-1]} for the newest"
            )
        return complete[0] if complete else None
    text = tracker.read_bytes().decode(errors="replace").strip()
    step = int(text) if text.isdecimal() else None
    if step not in complete:
        raise ValueError(f"{tracker}: says {text[:40]!r}, and {_what_is_missing(folder, step)}; {remedy(folder, step)}")
    return step


def whole_step(folder: Path) -> int | None:
    """`latest_step`, of which every file is there in its size; no tensor is read.

    Raises:
        ValueError: a file is missing or damaged; names it, and the newest older checkpoint that is whole.
    """
    step = latest_step(folder)
    if step is not None and (reason := _damage(folder, step)):
        raise ValueError(f"{reason}; {remedy(folder, step)}")
    return step


def remedy(folder: Path, step: int | None) -> str:
    """What to do where the checkpoint of a step cannot be read; None: whichever it should have been."""
    others = [one for one in complete_steps(folder) if step is None or one < step]
    whole = next((one for one in reversed(others) if not _damage(folder, one)), None)
    if whole is None:
        return "no older checkpoint is whole: start anew in another folder"
    return f"write {whole} into {folder / TRACKER}, and the same command goes on from that checkpoint, which is whole"


def _what_is_missing(folder: Path, step: int | None) -> str:
    if step is None:
        return "that is no step"
    target = folder / iteration_name(step)
    missing = [name for name in WRITTEN_LAST if not (target / name).is_file()]
    return f"{target / missing[0]} is missing" if target.is_dir() else f"{target} is not there"


def _damage(folder: Path, step: int) -> str | None:
    """What its reader says of a checkpoint's files; None if they are whole."""
    try:
        open_folder(folder / iteration_name(step))
    except ValueError as error:
        return str(error)
    return None


def load_checkpoint(trained: Trained, folder: Path, step: int) -> None:
    """Put the model, the optimizer and the schedule where they were after a step; all ranks must call it.

    Raises:
        ValueError: a file is damaged. All ranks raise the same.
    """
    model, optimizers = model_state(trained.chunks), trained.optimizer.chained_optimizers
    for optimizer in optimizers:
        optimizer.load_state_dict(_groups_at(optimizer, step))  # makes room for the state
    asked = {
        str(number): optimizer.sharded_param_state_fully_reshardable(model, is_loading=True, metadata=dict(METADATA))
        for number, optimizer in enumerate(optimizers)
    }
    target = folder / iteration_name(step)
    try:
        loaded: Any = dist_checkpointing.load({**model, "optimizers": asked}, str(target))
    except CheckpointException as error:  # no `Exception`: it would go past all that ends a run on all ranks
        reasons = [failure for failure, _ in error.failures.values()]
        raise ValueError(f"{target}: cannot be read ({reasons[0]}); {remedy(folder, step)}") from error
    for name, chunk in zip(model, trained.chunks, strict=True):
        chunk.load_state_dict(loaded[name])
    for number, optimizer in enumerate(optimizers):
        _load_state(optimizer, loaded["optimizers"][str(number)], step)
    trained.scheduler.load_state_dict(loaded["opt_param_scheduler"])


def _load_state(optimizer: Any, tensors: dict[int, Any], step: int) -> None:
    """Moments and float32 weights, and the step.

    torch's Adam counts steps for each parameter; megatron-core 0.19 would look for them among the tensors, and gives
    all parameters one counter, which then counts each of them.
    """
    own = [state for state in optimizer.optimizer.state.values() if "step" in state]
    for state in own:
        del state["step"]
    optimizer.load_parameter_state_from_fully_reshardable(tensors)
    for state in own:
        state["step"] = torch.tensor(float(step))


def _groups_at(optimizer: Any, step: int) -> dict[str, Any]:
    """The state of an optimizer after a step, but for its tensors: that of its own groups."""
    groups = optimizer.optimizer.state_dict()["param_groups"]
    own = [{name: value for name, value in group.items() if name != "params"} | {"step": step} for group in groups]
    return {"optimizer": {"param_groups": own}}


def model_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """The sharded state of each chunk, named as Megatron-LM names it."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: chunk.sharded_state_dict(metadata=dict(METADATA)) for name, chunk in zip(names, chunks, strict=True)}


def common_of(job: TrainJob, config: ModelConfig, step: int) -> dict[str, Any]:
    """What is not a tensor: the step, and training arguments as Megatron-LM names them."""
    dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    state = common_state(config, ModelClass(job.model_class), dtype, step)
    state["args"].consumed_train_samples = step * job.global_batch_size
    state["args"].__dict__ |= {
        "tensor_model_parallel_size": job.tp,
        "pipeline_model_parallel_size": job.pp,
        "expert_model_parallel_size": job.ep,
        "seq_length": job.seq_length,
        "micro_batch_size": job.micro_batch_size,
        "global_batch_size": job.global_batch_size,
        "train_iters": job.steps,
    }
    return state
