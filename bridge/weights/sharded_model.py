"""How a `GPTModel` or `HybridModel` is sharded over the ranks, read from process groups and the model itself.

The user is asked for nothing: the parallel sizes are those of megatron-core's process groups, the layers of each stage
those that the chunks hold, the padded vocabulary size that of the embedding. What `reference.sharding` assumes is
checked: the order of the ranks, layers in order over the stages, experts in order over the expert-parallel ranks. The
ranks exchange what they find, so all of them come to the same layout or raise the same error.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from megatron.core import parallel_state
from torch import Tensor, distributed, nn

from bridge.jobs.ranks import all_gather_objects, raise_on_all_ranks
from bridge.model.process_groups import group_sizes
from bridge.weights.decoder_layers import HeldLayers, held_layers
from bridge.weights.param_mapping import MappingRegistry, model_rows, model_state
from bridge.weights.parameter_classes import check_plain
from bridge.weights.shard_map import ShardMap
from bridge.weights.wrappers import unwrapped_chunks
from reference.config import ModelConfig
from reference.parallelism import Parallelism
from reference.weights import MODEL_DIALECTS, TABLE, Dialect, Row


@dataclass(frozen=True)
class ShardedModel:
    """This rank's shard of a model, and how the whole model is laid out over the ranks.

    `registry` says what each of this rank's parameters is made of, and `state` has their values by (chunk, name).
    `dtypes` are those of the whole model's parameters, by row of `reference.weights.TABLE`.
    """

    registry: MappingRegistry
    state: dict[tuple[int, str], Tensor]
    dtypes: dict[Row, torch.dtype]

    @property
    def parallelism(self) -> Parallelism:
        return self.registry.parallelism

    @property
    def rank(self) -> int:
        return self.registry.rank

    @cached_property
    def shard_map(self) -> ShardMap:
        """Which ranks hold which piece of every on-disk tensor."""
        return ShardMap(self.registry.config, self.parallelism, self.registry.dialect)

    @property
    def device(self) -> torch.device:
        return next(iter(self.state.values())).device if self.state else torch.device(torch.cuda.current_device())


class _Facts(NamedTuple):
    """What one rank finds out about itself, sent to all ranks.

    `at` is the rank's index along each axis of parallelism, `layers` has a list for each chunk, and `vocabulary` the
    padded sizes that the embedding and the head here imply. Layers and experts are numbered over the whole model, from
    0. Rows of `TABLE`, the keys of `dtypes`, are sent as their index.
    """

    sizes: dict[str, int]
    at: dict[str, int]
    layers: list[list[int]]
    experts: set[tuple[int, ...]]
    vocabulary: set[int]
    dialects: tuple[Dialect, ...]
    dtypes: dict[int, torch.dtype]


def sharded_model(model: nn.Module | Sequence[nn.Module], config: ModelConfig) -> ShardedModel:
    """Read the layout of a model; all ranks must call it. `model` is one chunk, or the list of a rank's chunks.

    Raises:
        ValueError: megatron-core is not set up; a parameter is not a plain tensor (`parameter_classes`); the ranks,
            layers or experts are not in the order that `reference.sharding` assumes; or the model is not of this
            config. All ranks raise the same error.
    """
    if not (distributed.is_initialized() and parallel_state.model_parallel_is_initialized()):
        raise ValueError(
            "megatron-core's process groups are not there: enter bridge.model.process_groups.model_parallel(), or call "
            "megatron.core.parallel_state.initialize_model_parallel() first"
        )
    with raise_on_all_ranks():
        chunks = unwrapped_chunks(model)
        for chunk in chunks:
            check_plain(chunk)
        held = [held_layers(chunk) for chunk in chunks]
        states = [model_state(chunk) for chunk in chunks]
        facts = _facts(held, states)
    everyone = all_gather_objects(facts)
    with raise_on_all_ranks():
        parallelism = _parallelism(everyone, config)
        registry = MappingRegistry(config, _dialect(everyone), parallelism, distributed.get_rank())
        found = (
            (index, dtype, f"{TABLE[index].names[registry.dialect][0]} of rank {rank}")
            for rank, facts in enumerate(everyone)
            for index, dtype in facts.dtypes.items()
        )
        dtypes = {TABLE[index]: dtype for index, dtype in _dtypes(found).items()}
        return ShardedModel(registry, registry.bind(states), dtypes)


def _facts(held: list[HeldLayers], states: list[dict[str, Tensor]]) -> _Facts:
    named = [(name, value.dtype) for state in states for name, value in state.items()]
    rows = model_rows([name for name, _ in named], MODEL_DIALECTS[held[0].model])
    of_either = next(iter(rows.values()))  # names that are in both dialects have the same rows in both
    sizes = group_sizes(len(held))
    tables = ("embedding.word_embeddings.weight", "output_layer.weight")
    return _Facts(
        sizes=sizes,
        at={
            "tp": parallel_state.get_tensor_model_parallel_rank(),
            "pp": parallel_state.get_pipeline_model_parallel_rank(),
            "ep": parallel_state.get_expert_model_parallel_rank(),
            # megatron-core declares nothing; None would be its rank before the groups are made
            "etp": parallel_state.get_expert_tensor_parallel_rank(),  # pyright: ignore[reportArgumentType]
            "cp": parallel_state.get_context_parallel_rank(),
            "dp": parallel_state.get_data_parallel_rank(),
        },
        layers=[of_chunk.layers for of_chunk in held],
        experts={experts for of_chunk in held for experts in of_chunk.experts},
        vocabulary={sizes["tp"] * len(state[table]) for state in states for table in tables if table in state},
        dialects=tuple(rows),
        dtypes=_dtypes((TABLE.index(row), dtype, name) for row, (name, dtype) in zip(of_either, named, strict=True)),
    )


def _parallelism(everyone: list[_Facts], config: ModelConfig) -> Parallelism:
    sizes = everyone[0].sizes
    for rank, facts in enumerate(everyone):
        if facts.sizes != sizes:
            raise ValueError(f"rank 0 has the parallel sizes {sizes}, rank {rank} has {facts.sizes}")
    padded = {rows for facts in everyone for rows in facts.vocabulary}
    if len(padded) != 1 or min(padded) < config.vocab_size:
        raise ValueError(
            f"embedding and head have {sorted(padded)} rows over all ranks, expected the same number, at least the "
            f"vocabulary's {config.vocab_size}"
        )
    found = Parallelism(
        **sizes, layers_per_stage=_layers_per_stage(everyone, config), vocab_divisor=min(padded) // sizes["tp"]
    )
    if found.world_size != len(everyone):
        raise ValueError(
            f"tp x cp x dp x pp = {found.world_size} ranks, expected the world's {len(everyone)}: megatron-core must "
            "have been set up over all ranks of torch.distributed, without weight rematerialisation groups"
        )
    for rank, facts in enumerate(everyone):
        expected = found.coordinates(rank)._asdict()
        for axis, index in facts.at.items():
            if expected[axis] != index:
                raise ValueError(
                    f"rank {rank} is number {index} along {axis}, expected {expected[axis]}: call "
                    "initialize_model_parallel with its default order, 'tp-cp-ep-dp-pp'"
                )
        local = config.num_local_experts // found.ep
        experts = tuple(range(expected["ep"] * local, (expected["ep"] + 1) * local))
        if facts.experts - {experts}:
            raise ValueError(f"rank {rank} holds experts {min(facts.experts - {experts})}, expected {experts}")
    return found


def _layers_per_stage(everyone: list[_Facts], config: ModelConfig) -> tuple[int, ...]:
    pp, vpp = everyone[0].sizes["pp"], everyone[0].sizes["vpp"]
    stages: dict[int, list[int]] = {}
    for rank, facts in enumerate(everyone):
        for chunk, layers in enumerate(facts.layers):
            stage = chunk * pp + facts.at["pp"]
            if stages.setdefault(stage, layers) != layers:
                raise ValueError(f"pipeline stage {stage}: rank {rank} holds layers {layers}, others {stages[stage]}")
    order = [layer for stage in range(pp * vpp) for layer in stages.get(stage, [])]
    if order != list(range(config.num_hidden_layers)):
        raise ValueError(
            f"the stages of the model hold layers {order}, expected 0 to {config.num_hidden_layers - 1} in this order; "
            "model and checkpoint have different depths, or the pipeline layout is not megatron-core's"
        )
    return tuple(len(stages[stage]) for stage in range(pp * vpp))


def _dialect(everyone: list[_Facts]) -> Dialect:
    """The one that fits the parameter names of every rank; those of a stage without layers fit both."""
    common = [dialect for dialect in Dialect if all(dialect in facts.dialects for facts in everyone)]
    if not common:
        raise ValueError(f"ranks have different layer specs: {sorted({facts.dialects for facts in everyone})}")
    return common[0]


def _dtypes(found: Iterable[tuple[int, torch.dtype, str]]) -> dict[int, torch.dtype]:
    """The dtype of each row of `TABLE`, from (index of the row, dtype, name) of every parameter.

    Raises:
        ValueError: layers, experts or ranks have different ones.
    """
    dtypes: dict[int, torch.dtype] = {}
    for index, dtype, name in found:
        if dtypes.setdefault(index, dtype) != dtype:
            raise ValueError(
                f"{name}: found {dtype}, expected {dtypes[index]} as on the others of its kind; build all layers and "
                "ranks with the same params_dtype"
            )
    return dtypes
