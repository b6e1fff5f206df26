"""What a run starts from: a Hugging Face checkpoint, a Megatron one, another run's newest, or random weights.

A Hugging Face checkpoint is read by the rows that each rank needs. Of a Megatron one each rank reads whole weights, one
at a time, so that any class and layout it was saved from will do. Random weights are drawn by name, so that they are
the same at any layout.
"""

import hashlib
import math
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from bridge.huggingface.companions import companions
from bridge.huggingface.safetensors_folder import CONFIG_NAME
from bridge.jobs.durable import copy_file
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import raise_on_all_ranks
from bridge.memory_plan.plan import read_config
from bridge.minimax_m2_bridge import MiniMaxM2Bridge
from bridge.torch_dist.checkpoint import HF_FOLDER, MegatronCheckpoint, beside, open_folder
from bridge.training.checkpoints import TRACKER
from bridge.training.settings import TrainJob
from bridge.weights.sharded_model import sharded_model
from reference.checkpoint import expected_tensors
from reference.config import ModelConfig
from reference.sharding import shard

CHECKPOINTS = "checkpoints"  # in the folder of a run


class Start(Protocol):
    """`config` is the model, `folder` has its config.json and tokenizer; `what` it is, in words.

    `files` are those that weights are read from, each with what tells it from another of its name, such as its size.
    """

    config: ModelConfig
    folder: Path
    what: str
    files: list[tuple[Any, ...]]

    def fill(self, chunks: Sequence[nn.Module], progress: Progress) -> None:
        """Put the weights into a model; all ranks must call it."""
        ...


class HuggingFaceStart(AbstractContextManager):
    """A Hugging Face checkpoint, to which the trained model may be exported on its own scales."""

    what = "a Hugging Face checkpoint"

    def __init__(self, source: str):
        self.bridge = MiniMaxM2Bridge.from_hf_pretrained(source)
        self.config, self.folder = self.bridge.config, self.bridge.checkpoint.files.folder
        self.files = list(self.bridge.checkpoint.files.versions)

    def fill(self, chunks: Sequence[nn.Module], progress: Progress = no_progress) -> None:
        self.bridge.load_hf_weights(chunks, progress=progress)

    def __exit__(self, *_: object) -> None:
        self.bridge.close()


class _WeightByWeight:
    """Weights that are read or made one at a time, under their on-disk names."""

    config: ModelConfig
    folder: Path

    def read_weight(self, name: str) -> Tensor:
        raise NotImplementedError

    def fill(self, chunks: Sequence[nn.Module], progress: Progress = no_progress) -> None:
        sharded = sharded_model(chunks, self.config)
        with raise_on_all_ranks(), torch.no_grad():
            held = [mapping.parameter for mapping in sharded.registry]
            for parameter in progress(held, "load", len(held)):
                whole = {name: self.read_weight(name) for name in parameter.sources}
                sharded.state[parameter.chunk, parameter.name].copy_(shard(parameter, whole))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MegatronStart(_WeightByWeight):
    """A torch_dist checkpoint, or the newest of a folder or run."""

    what = "a Megatron checkpoint"

    def __init__(self, folder: Path):
        inside = folder / CHECKPOINTS
        files = open_folder(inside if (inside / TRACKER).is_file() else folder)
        self.checkpoint = MegatronCheckpoint(files)
        self.config, self.folder = self.checkpoint.config, beside(files)
        self.files = sorted((path.name, path.stat().st_size) for path in files.folder.iterdir() if path.is_file())

    def read_weight(self, name: str) -> Tensor:
        return self.checkpoint.read_weight(name)


class RandomStart(_WeightByWeight):
    """Weights drawn from their name and the seed, at 1/sqrt(fan-in) in matrices, norms 1 and the router's bias 0."""

    what = "random weights"

    def __init__(self, path: Path, seed: int):
        self.config, self.seed = read_config(path), seed
        self.folder = path if path.is_dir() else path.parent
        self.files = []
        self.specs = expected_tensors(self.config)

    def read_weight(self, name: str) -> Tensor:
        shape = self.specs[name].shape
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(shape)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        drawn_from = hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(drawn_from) >> 1)
        std = self.config.initializer_range if "embed_tokens" in name else 1 / math.sqrt(shape[-1])
        return torch.randn(shape, generator=generator) * std


def open_start(job: TrainJob) -> Any:
    """What the job starts from, opened and checked; no weight is read.

    Raises:
        ValueError: it is none of these, or not a whole MiniMax-M2.
    """
    path = Path(job.model)
    if job.random or path.suffix == ".json":
        if not path.exists():
            raise ValueError(f"{path}: no such file; random weights need a config.json, or a folder that has one")
        if path.is_file() and path.name != CONFIG_NAME:
            raise ValueError(
                f"{path}: is not called {CONFIG_NAME}, as it must be beside the run's checkpoints; rename it"
            )
        return RandomStart(path, job.seed)
    is_megatron = path.is_dir() and any(
        (path / name).exists() for name in (".metadata", TRACKER, f"{CHECKPOINTS}/{TRACKER}")
    )
    return MegatronStart(path) if is_megatron else HuggingFaceStart(job.model)


def lay_companions(source: Path, checkpoints: Path, *, anew: bool) -> None:
    """config.json and the tokenizer's files beside the checkpoints of a run, for the way back; on rank 0.

    `anew`: in place of those that are there.
    """
    target = checkpoints / HF_FOLDER
    if anew and target.exists():
        shutil.rmtree(target)
    for name in (Path(CONFIG_NAME), *companions(source).carried):
        if (source / name).is_file() and not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(source / name, target / name)
