"""What a run and `--dry-run` refuse alike before there is a model: layouts, frozen parameters, folders, tokenizers."""

from collections import defaultdict
from fnmatch import fnmatchcase
from pathlib import Path

from bridge.jobs.target import check_apart
from bridge.memory_plan.plan import layout
from bridge.model.fusions import check_fusions
from bridge.model.layer_spec import Backend
from bridge.training.checkpoints import whole_step
from bridge.training.data.indexed import need_tokenizer
from bridge.training.data.tokenizer import Tokenizer
from bridge.training.run_record import check_folder, check_settings, make_record, read_record
from bridge.training.settings import TrainJob
from bridge.training.start import CHECKPOINTS, Start
from reference.config import ModelConfig
from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters
from reference.weights import Dialect, Scope

DIALECTS: dict[tuple[Backend, ModelClass], Dialect] = {
    ("transformer_engine", ModelClass.GPT): Dialect.MEGATRON_TE,
    ("transformer_engine", ModelClass.HYBRID): Dialect.HYBRID_TE,
    ("local", ModelClass.GPT): Dialect.MEGATRON_LOCAL,
    ("local", ModelClass.HYBRID): Dialect.HYBRID_LOCAL,
}


def check_layout(job: TrainJob, config: ModelConfig, world: int, backend: Backend) -> Parallelism:
    """The job's layout on so many ranks, with layers of a backend.

    Raises:
        ValueError: the sizes do not go together, or not with the model, the batch, the sequence or what is frozen; or
            something needs Transformer Engine.
    """
    parallelism = layout(config, gpus=world, **job.sizes)
    job.workload.check(config, parallelism)
    if job.cp > 1 and job.dtype == "fp32":
        raise ValueError(
            f"cp ({job.cp}) above 1 needs dtype bf16, found fp32, of which Transformer Engine has no attention across "
            "ranks"
        )
    if job.cp > 1 and backend == "local":
        raise ValueError(f"cp ({job.cp}) above 1 needs Transformer Engine's attention, and a GPU for it")
    if job.cuda_graphs and backend == "local":
        raise ValueError("cuda_graphs need a GPU and Transformer Engine; leave them out here")
    check_fusions(job.fusions, backend)
    if job.freeze:
        _check_frozen(job.freeze, config, parallelism, DIALECTS[backend, ModelClass(job.model_class)])
    return parallelism


def is_frozen(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a parameter's name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_frozen(patterns: tuple[str, ...], config: ModelConfig, parallelism: Parallelism, dialect: Dialect) -> None:
    """The patterns fit something and leave every rank something; experts of one module are all trained, or none.

    Raises:
        ValueError: they do not; names the pattern or the module.
    """
    first_of_stage = {parallelism.coordinates(rank).pp: rank for rank in reversed(range(parallelism.world_size))}
    stages = [  # ranks of one stage have the same names
        [one for one in parameters(config, parallelism, first_of_stage[stage], dialect) if one.row.trained]
        for stage in range(parallelism.pp)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(one.name, pattern) for stage in stages for one in stage):
            raise ValueError(f"freeze: no parameter fits {pattern!r}; names are such as {stages[0][0].name}")
    if any(all(is_frozen(one.name, patterns) for one in stage) for stage in stages):
        raise ValueError(f"freeze: {list(patterns)} leaves a rank nothing to train; freeze less")
    if torn := next((module for stage in stages if (module := _torn(stage, patterns))), None):
        raise ValueError(
            f"freeze: {list(patterns)} leaves some experts of {torn} trained and others not, where Transformer Engine "
            f"trains all of them or none; freeze '{torn}.*', or none of it"
        )


def _torn(stage: list[Parameter], patterns: tuple[str, ...]) -> str | None:
    """A module of several experts, of which some are frozen."""
    found: dict[tuple[int, str], set[bool]] = defaultdict(set)
    for one in stage:
        if one.row.scope is Scope.EXPERT:
            found[one.chunk, one.name.rpartition(".")[0]].add(is_frozen(one.name, patterns))
    return next((module for (_, module), kinds in found.items() if len(kinds) > 1), None)


def check_place(job: TrainJob) -> None:
    """The run's folder is apart from what is read, and is a run's or may become one.

    Raises:
        ValueError: it is not; names what is there.
    """
    check_apart(job.out, [job.model] if Path(job.model).exists() else [])
    check_folder(Path(job.out))


def begun_step(job: TrainJob, config: ModelConfig, backend: Backend) -> int:
    """The step that the run in the job's folder goes on from, with layers of a backend; 0 for its start.

    Raises:
        ValueError: its newest checkpoint is damaged, or it was begun with other settings or another model.
    """
    out = Path(job.out)
    step = whole_step(out / CHECKPOINTS)
    if step is None:
        return 0
    check_settings(out, read_record(out), make_record(job, config, backend))
    return step


def tokenizer_of(job: TrainJob, start: Start) -> Tokenizer | None:
    """What makes token ids of the job's data; None where that is token ids.

    Raises:
        ValueError: there is none, or it is another model's.
    """
    if not need_tokenizer(job.data):
        return None
    return Tokenizer(job.tokenizer or str(start.folder), start.config.vocab_size)
