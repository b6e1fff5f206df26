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

from bridge.convert.training_arguments import common_state
from bridge.training.settings import TrainJob
from bridge.training.step import Trained
from reference.config import ModelConfig
from reference.model_class import ModelClass

TRACKER = "latest_checkpointed_iteration.txt"
# To be copied: megatron-core lays process groups into what it is given.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def iteration_name(step: int) -> str:
    """As Megatron-LM names the folder of a step."""
    return f"iter_{step:07d}"


def latest_step(folder: Path) -> int | None:
    """The step of the newest complete checkpoint of a run; None if there is none.

    Raises:
        ValueError: the tracker file does not name a checkpoint that is there.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if not text.isdecimal() or not (folder / iteration_name(int(text)) / ".metadata").is_file():
        raise ValueError(
            f"{tracker}: says {text!r}, and no such checkpoint is beside it; write the number of one that is there"
        )
    return int(text)


def load_checkpoint(trained: Trained, folder: Path, step: int) -> None:
    """Put the model, the optimizer and the schedule where they were after a step; all ranks must call it."""
    model, optimizers = model_state(trained.chunks), trained.optimizer.chained_optimizers
    for optimizer in optimizers:
        optimizer.load_state_dict(_groups_at(optimizer, step))  # makes room for the state
    asked = {
        str(number): optimizer.sharded_param_state_fully_reshardable(model, is_loading=True, metadata=dict(METADATA))
        for number, optimizer in enumerate(optimizers)
    }
    loaded: Any = dist_checkpointing.load({**model, "optimizers": asked}, str(folder / iteration_name(step)))
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


def complete_steps(folder: Path) -> list[int]:
    """Steps of the run's complete checkpoints, in order."""
    numbers = {path: path.name.removeprefix("iter_") for path in folder.glob("iter_*")}
    return sorted(
        int(number) for path, number in numbers.items() if number.isdecimal() and (path / "metadata.json").is_file()
    )
