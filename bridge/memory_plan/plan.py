"""What every rank of a training run would hold, in parameters and bytes, from config.json alone: `minimax-m2 plan`.

`read_config`, `parse_memory`, `parse_layers` and `layout` read what a user writes; `plan` counts, with
`reference.memory`; `rank_groups` joins ranks that hold the same. `bridge.memory_plan.report` prints the plan and
`bridge.memory_plan.picture` draws it.
"""

import os
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from bridge.formats import A_DISTRIBUTED_FOLDER, check_folder, check_model
from bridge.huggingface.read_json import read_object
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from reference.activations import Workload, activations
from reference.advice import Advice, advise, default_layers
from reference.config import ModelConfig
from reference.memory import Bytes, Holding, holdings, training_bytes
from reference.parallelism import Parallelism

UNITS = {"MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "TB": 10**12, "TIB": 2**40}


class RankGroup(NamedTuple):
    """Ranks of one pipeline rank: their layers (a range for each virtual chunk), experts, parameters and bytes.

    `replicated` is without the distributed optimizer, `distributed` with it. Where the ranks hold different experts,
    `experts` has a range for each expert-parallel rank.
    """

    ranks: tuple[int, ...]
    stage: int
    layers: tuple[range, ...]
    experts: tuple[range, ...]
    holding: Holding
    replicated: Bytes
    distributed: Bytes


class Plan(NamedTuple):
    """A layout, the memory of a GPU in bytes, which optimizer is meant, and each rank's group.

    Activations are those of the workload, and 0 without one.
    """

    config: ModelConfig
    parallelism: Parallelism
    memory: int
    distributed_optimizer: bool
    ranks: tuple[RankGroup, ...]
    workload: Workload | None = None

    def chosen(self, group: RankGroup) -> Bytes:
        """The bytes under the optimizer that is meant."""
        return group.distributed if self.distributed_optimizer else group.replicated

    @property
    def largest(self) -> int:
        """Bytes of the rank that needs most."""
        return max(self.chosen(group).total for group in self.ranks)

    @property
    def headroom(self) -> int:
        """What the fullest rank has left; negative if the plan does not fit."""
        return self.memory - self.largest


# --- What a user writes. ---


def read_config(path_or_hub_id: str | Path) -> ModelConfig:
    """The model of a checkpoint's folder, of a config.json, or of a hub id; nothing but config.json is fetched or read.

    Only sizes matter here, so how the checkpoint is quantised does not.

    Raises:
        ValueError: there is none, or it is not a MiniMax-M2's.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not os.path.lexists(path / CONFIG_NAME):
            check_folder(path, A_DISTRIBUTED_FOLDER)
        path = path / CONFIG_NAME
    elif not path.exists() and not path.is_absolute() and len(path.parts) == 2 and path.suffix != ".json":
        try:
            path = Path(hf_hub_download(str(path_or_hub_id), CONFIG_NAME))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(
                f"{path_or_hub_id}: no such local folder, and the hub did not deliver its {CONFIG_NAME} ({error}); "
                "give an existing folder, or check the id and the network"
            ) from error
    config = read_object(path)
    check_model(config, path)
    return ModelConfig.from_hf({key: value for key, value in config.items() if key != "quantization_config"})


def parse_memory(text: str) -> int:
    """Bytes: "80GB" is 80e9, "80GiB" 80 x 2**30.

    Raises:
        ValueError: it is not a positive number with one of the units.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([MGT]I?B)", text.strip().upper(), flags=re.ASCII)
    number = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if number < 1:
        raise ValueError(
            "memory must be a positive number with a unit: MB, GB, TB (powers of 1000) or MiB, GiB, TiB (of 1024), "
            f"such as 80GB or 79.6GiB; found {text!r}"
        )
    return number


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers of each stage, from "15,16,16,15".

    Raises:
        ValueError: these are not numbers with commas between them.
    """
    if not re.fullmatch(r" *\d+ *(, *\d+ *)*", text, flags=re.ASCII):
        raise ValueError(f"layers per stage must be numbers with commas between, such as 15,16,16,15; found {text!r}")
    return tuple(map(int, text.split(",")))


def layout(
    config: ModelConfig, *, gpus: int, layers_per_stage: tuple[int, ...] | None = None, **sizes: Any
) -> Parallelism:
    """The parallel sizes of a run on so many GPUs: dp is what is left, and layers that do not divide are spread.

    `sizes` are those of `Parallelism`.

    Raises:
        ValueError: the sizes do not go together, or not with the model; as `Parallelism` and its `check`.
    """
    given = Parallelism(**{**sizes, "ep": 1, "etp": 1})  # refuses sizes below 1 before anything is divided by them
    ranks = given.tp * given.cp * given.pp
    if gpus < 1 or gpus % ranks:
        raise ValueError(
            f"gpus ({gpus}) must be a positive multiple of tp x cp x pp = {given.tp} x {given.cp} x {given.pp} = "
            f"{ranks}: dp is what is left"
        )
    if given.vpp > 1 and given.pp == 1:
        raise ValueError(f"vpp ({given.vpp}) needs pp of at least 2: megatron-core interleaves pipeline stages")
    layers = layers_per_stage or default_layers(config, given.pp * given.vpp)
    parallelism = Parallelism(**sizes, dp=gpus // ranks, layers_per_stage=layers)
    parallelism.check(config)
    return parallelism


def workload(seq_length: int | None, **settings: Any) -> Workload | None:
    """What a step computes on: `settings` are those of `Workload`. None where no sequence length is given.

    Raises:
        ValueError: `seq_length` is not given, but settings are that only count with it; or as `Workload`.
    """
    if seq_length is not None:
        return Workload(seq_length=seq_length, **settings)
    unused = Workload(seq_length=1, model=settings["model"])
    for name, value in settings.items():
        if value != getattr(unused, name):
            raise ValueError(f"{name} ({value}) is for counting activations, which needs seq_length: give it too")
    return None


# --- What follows from it. ---


def plan(
    config: ModelConfig,
    parallelism: Parallelism,
    *,
    memory: int,
    distributed_optimizer: bool = True,
    workload: Workload | None = None,
) -> Plan:
    """What each rank holds, and, of a workload, its activations.

    Raises:
        ValueError: the model or the workload does not divide by the parallel sizes.
    """
    peaks = [peak.total for peak in activations(config, parallelism, workload)] if workload else [0] * parallelism.pp
    held, dtype = [], workload.dtype if workload else "bf16"
    for holding, peak in zip(holdings(config, parallelism), peaks, strict=True):
        both = (training_bytes(holding, parallelism, distributed_optimizer=on, dtype=dtype) for on in (False, True))
        held.append((holding, *(one._replace(activations=peak) for one in both)))
    stages, local = parallelism.stages(config), config.num_local_experts // parallelism.ep
    ranks = []
    for rank in range(parallelism.world_size):
        at = parallelism.coordinates(rank)
        experts = range(at.ep * local, (at.ep + 1) * local)
        ranks.append(RankGroup((rank,), at.pp, tuple(stages[at.pp :: parallelism.pp]), (experts,), *held[at.pp]))
    return Plan(config, parallelism, memory, distributed_optimizer, tuple(ranks), workload)


def rank_groups(plan: Plan, most: int) -> list[RankGroup]:
    """The ranks; where there are more than `most`, those of equal stage and experts as one, or else of equal stage."""
    keys: list[Callable[[RankGroup], Any]] = [
        lambda group: group.ranks,
        lambda group: (group.stage, group.experts[0].start),
        lambda group: group.stage,
    ]
    for key in keys:
        groups = [list(group) for _, group in groupby(sorted(plan.ranks, key=key), key=key)]
        if len(groups) <= most:
            break
    return [
        same[0]._replace(
            ranks=tuple(rank for one in same for rank in one.ranks),
            experts=tuple(sorted({one.experts[0] for one in same}, key=lambda experts: experts.start)),
        )
        for same in groups
    ]


def advice(plan: Plan) -> Advice | None:
    """Layouts that fit, where the plan does not."""
    if plan.headroom >= 0:
        return None
    return advise(
        plan.config,
        plan.parallelism,
        memory=plan.memory,
        distributed_optimizer=plan.distributed_optimizer,
        workload=plan.workload,
    )
