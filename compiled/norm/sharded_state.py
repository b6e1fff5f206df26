"""megatron-core's `sharded_state_dict` for weights that are spread over tensor-parallel ranks, with or without copies.

The only module of this package that imports megatron-core, and only when megatron-core calls it.
"""

from typing import Any

from torch import nn

from compiled.norm.collectives import ProcessGroupInfo


def sharded_weights(
    module: nn.Module,
    replicas: dict[str, int],
    ranks: ProcessGroupInfo,
    prefix: str,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """A ShardedTensor for each parameter in `replicas`, which says how many neighbouring ranks hold the same part.

    Parts are cut on axis 0. The replica id counts these ranks and the data-parallel ones; the first of all writes.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
    from megatron.core.utils import get_pg_rank

    data_rank = get_pg_rank(ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"])
    axis = len(sharded_offsets)
    return {
        prefix + name: ShardedTensor.from_rank_offsets(
            prefix + name,
            module.get_parameter(name),
            *sharded_offsets,
            (axis, ranks.rank // held, ranks.size // held),
            replica_id=(0, ranks.rank % held, data_rank),
            prepend_axis_num=axis,
        )
        for name, held in replicas.items()
    }
