"""What a training run is told: `TrainJob`, one table for the command's flags, for YAML and for Python.

A setting is a field with its help text, the panel of `--help` that it is in, and whether a run that goes on may have
another value: what decides the numbers may not change, the layout and what is written may.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from bridge.model.fusions import FusionName, fusion_settings
from reference.activations import Workload
from reference.model_class import ModelClass


def _setting(help: str, panel: str, default: Any = MISSING, *, free: bool = False) -> Any:
    return field(default=default, metadata={"help": help, "panel": panel, "free": free})


# Panels of --help.
RUN, DATA, MODEL = "Run", "Data", "Model"
PARALLEL, OPTIMIZER, CHECKPOINTS, SPEED = "Parallelism", "Optimizer", "Checkpoints", "Speed"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One training run: everything that decides its numbers, how it is laid out, and what it writes.

    Raises:
        ValueError: a value is not possible; names the setting, what was found and what is expected.
    """

    model: str = _setting(
        "What to start from: a Hugging Face folder or hub id, a Megatron checkpoint (torch_dist), the folder of "
        "another run, or a config.json for random weights.", RUN)  # fmt: skip
    data: tuple[str, ...] = _setting(
        "Files to train on: .jsonl with a text, messages or tokens in each line; .txt; megatron-core's .bin with its "
        ".idx beside. Several may follow one another.", RUN)  # fmt: skip
    out: str = _setting("Folder of the run: checkpoints, metrics, cached tokens.", RUN, free=True)
    steps: int = _setting("Optimizer steps of the whole run; the schedule and the order of the data depend on it.", RUN)
    until: int | None = _setting("Stop after this step; the same command without it goes on.", RUN, None, free=True)
    seed: int = _setting("Seed of the order of the data and of random weights.", RUN, 1234)

    seq_length: int = _setting("Tokens in a sequence.", DATA)
    micro_batch_size: int = _setting("Sequences in one forward pass of a rank.", DATA, 1, free=True)
    global_batch_size: int = _setting("Sequences in one optimizer step, over all ranks.", DATA, 8)
    data_weights: tuple[float, ...] = _setting(
        "Share of each file in the blend, one for each (default: by their tokens).", DATA, ())  # fmt: skip
    tokenizer: str | None = _setting("Folder or hub id of the tokenizer (default: the model's).", DATA, None)

    model_class: Literal["gpt", "hybrid"] = _setting(
        "megatron-core's GPTModel, or its successor HybridModel.", MODEL, ModelClass.GPT.value)  # fmt: skip
    random: bool = _setting("Start from random weights; of the model only config.json is read.", MODEL, False)
    dtype: Literal["bf16", "fp32"] = _setting(
        "Dtype of the parameters; gradients and optimizer weights are always float32.", MODEL, "bf16")  # fmt: skip
    freeze: tuple[str, ...] = _setting(
        "Parameters that stay as they are: patterns of megatron-core's names ('*.experts.*').", MODEL, ())  # fmt: skip
    bias_update_rate: float = _setting("Step of the router's bias towards balance; 0 leaves it as it is.", MODEL, 1e-3)
    aux_loss: float | None = _setting(
        "Coefficient of megatron-core's load-balancing loss (default: the config's).", MODEL, None)  # fmt: skip

    tp: int = _setting("Tensor parallel.", PARALLEL, 1, free=True)
    pp: int = _setting("Pipeline parallel.", PARALLEL, 1, free=True)
    vpp: int = _setting("Virtual pipeline chunks on each pipeline rank.", PARALLEL, 1, free=True)
    ep: int = _setting("Expert parallel.", PARALLEL, 1, free=True)
    etp: int | None = _setting("Expert-tensor parallel (default: as --tp).", PARALLEL, None, free=True)
    cp: int = _setting("Context parallel; needs Transformer Engine.", PARALLEL, 1, free=True)

    lr: float = _setting("Largest learning rate.", OPTIMIZER, 1e-5)
    min_lr: float = _setting("Learning rate at the end of the schedule.", OPTIMIZER, 0.0)
    warmup_steps: int = _setting("Steps in which the learning rate rises from 0.", OPTIMIZER, 0)
    schedule: Literal["cosine", "linear", "constant"] = _setting(
        "How the learning rate falls after the warm-up.", OPTIMIZER, "cosine")  # fmt: skip
    weight_decay: float = _setting("Decoupled weight decay; norms have none.", OPTIMIZER, 0.1)
    clip_grad: float = _setting("Largest norm of the gradient; 0 does not clip.", OPTIMIZER, 1.0)
    beta1: float = _setting("Adam's first decay.", OPTIMIZER, 0.9)
    beta2: float = _setting("Adam's second decay.", OPTIMIZER, 0.95)
    epsilon: float = _setting("Adam's epsilon.", OPTIMIZER, 1e-8)

    save_every: int | None = _setting(
        "Steps between checkpoints; one is made at the end.", CHECKPOINTS, None, free=True
    )
    keep_last: int = _setting("Checkpoints to keep.", CHECKPOINTS, 2, free=True)
    async_save: bool = _setting("Write checkpoints while training goes on.", CHECKPOINTS, True, free=True)
    export: Literal["bf16", "fp8"] | None = _setting(
        "Write a Hugging Face checkpoint to the run's export/ at the end.", CHECKPOINTS, None, free=True)  # fmt: skip

    recompute: Literal["none", "selective", "full"] = _setting(
        "Activations that are computed again in the backward pass.", SPEED, "none", free=True)  # fmt: skip
    cuda_graphs: bool | None = _setting(
        "CUDA graphs of attention and router, by Transformer Engine (default: on GPUs, in bfloat16, with TP 2 and "
        "whole experts at most, without virtual stages, recomputation, frozen parameters).",
        SPEED, None, free=True)  # fmt: skip
    fusions: tuple[FusionName, ...] = _setting(
        "Fused kernels (bridge.model.fusions), each by this option (default: all where CUDA graphs are the default, "
        "else in bfloat16 on GPUs router, permute and a cross entropy; that is cross_entropy_te from Transformer "
        "Engine 2.20 on, before cross_entropy).",
        SPEED, (), free=True)  # fmt: skip

    def __post_init__(self) -> None:
        least = {
            "steps": 1, "seq_length": 1, "micro_batch_size": 1, "global_batch_size": 1, "keep_last": 1, "until": 1,
            "save_every": 1, "warmup_steps": 0, "lr": 0, "min_lr": 0, "weight_decay": 0, "clip_grad": 0, "aux_loss": 0,
            "bias_update_rate": 0, "beta1": 0, "beta2": 0, "epsilon": 0,
        }  # fmt: skip
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, found {value}")
        for name, least_value in least.items():
            found = getattr(self, name)
            if found is not None and not found >= least_value:
                raise ValueError(f"{name} must be at least {least_value}, found {found}")
        if not self.data:
            raise ValueError("data: no file is given; name at least one .jsonl, .txt or .bin")
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ValueError(
                f"data_weights has {len(self.data_weights)} shares for {len(self.data)} files; give one for each"
            )
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, found {getattr(self, name)}")
        if not self.epsilon:
            raise ValueError(f"epsilon must be above 0, found {self.epsilon}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, found {self.seed}")
        if not all(0 < share < math.inf for share in self.data_weights):
            raise ValueError(f"data_weights must be positive, found {self.data_weights}; leave a file out instead")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        fusion_settings(self.fusions)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str) -> Self:
        """A job from names and values as YAML, JSON or a command line has them; `where` they are from, for errors.

        Raises:
            ValueError: a name is unknown or missing, or a value has another type.
        """
        known = {one.name: one for one in fields(cls)}
        for name in values:
            if name not in known:
                near = get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}"
                raise ValueError(f"{where}: unknown setting {name!r}; {hint}")
        types = setting_types()
        given = {name: _converted(value, types[name], f"{where}: {name}") for name, value in values.items()}
        missing = [name for name, one in known.items() if one.default is MISSING and name not in given]
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} must be given")
        return cls(**given)

    def decisive(self) -> dict[str, Any]:
        """The settings that decide the run's numbers, as JSON has them: a run that goes on must have the same."""
        kept = {one.name for one in fields(self) if not one.metadata["free"]}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items() if name in kept}

    @property
    def sizes(self) -> dict[str, Any]:
        """The parallel sizes, as `reference.parallelism.Parallelism` names them."""
        return {name: getattr(self, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp")}

    @property
    def workload(self) -> Workload:
        """What a step computes on, as the memory plan counts it."""
        return Workload(
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            recompute=self.recompute,
            model=ModelClass(self.model_class),
            dtype=self.dtype,
        )

    def at(self, **changes: Any) -> Self:
        """The same job with other values."""
        return replace(self, **changes)


def setting_types() -> dict[str, Any]:
    """The type of each setting."""
    return {name: hint for name, hint in get_type_hints(TrainJob).items() if name in TrainJob.__dataclass_fields__}


def setting_fields() -> dict[str, Field]:
    """The field of each setting, with its help."""
    return {one.name: one for one in fields(TrainJob)}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        ValueError: it is not YAML, or not a mapping from settings to values.
    """
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{path}: reading YAML needs pyyaml; pip install -e '.[train]' brings it") from error
    try:
        found = yaml.load(path.read_text(), _loader(yaml))  # its own is a safe one
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({error})") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: expected settings, a line `name: value` for each, found {type(found).__name__}")
    return found


def _loader(yaml: Any) -> Any:
    """`SafeLoader`, which would take the last of several values of a setting."""

    class OneEach(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"{twice} is there twice")
            return super().construct_mapping(node, deep)

    return OneEach


def optional(hint: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if get_origin(hint) is UnionType and NoneType in get_args(hint):
        return next(one for one in get_args(hint) if one is not NoneType), True
    inside = get_args(hint)
    if get_origin(hint) not in (Literal, tuple) and NoneType in inside:
        return next(one for one in inside if one is not NoneType), True
    return hint, False


def _converted(value: Any, hint: Any, what: str) -> Any:
    """A value as its type has it: YAML reads 1e-5 as text, and a single file as no list."""
    kind, may_be_none = optional(hint)
    if value is None and may_be_none:
        return None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{what} must be one of {', '.join(map(str, get_args(kind)))}, found {value!r}")
        return value
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_converted(item, get_args(kind)[0], what) for item in items)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise ValueError(f"{what} must be {kind.__name__}, found {value!r}")
