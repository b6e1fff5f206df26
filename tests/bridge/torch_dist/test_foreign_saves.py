"""What megatron-core and torch save on several ranks, with each of their options, is read whole."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from packaging.version import Version
from support.ranks import RankPool
from torch import Tensor, distributed

from bridge.model.cpu import megatron_on_cpu
from bridge.torch_dist.metadata import read_metadata
from bridge.torch_dist.reader import TorchDistFolder

WORLD = 2
GENERATOR = torch.Generator().manual_seed(0)
# A matrix cut by rows, a stack of layers one a rank, and what all ranks have.
VALUES = {
    "matrix": torch.randn(6, 8, generator=GENERATOR),
    "layers": torch.randn(2, 3, 5, generator=GENERATOR).bfloat16(),
    "norm": torch.randn(7, generator=GENERATOR),
}
COMMON = {"iteration": 3, "checkpoint_version": 3.0, "lr": [0.5]}


def sharded_state(rank: int) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    cut = ShardedTensor.from_rank_offsets
    return {
        "matrix": cut("matrix", VALUES["matrix"][rank * 3 : rank * 3 + 3].clone(), (0, rank, WORLD)),
        "layer": cut("layers", VALUES["layers"][rank].clone(), (0, rank, WORLD), prepend_axis_num=1),
        "norm": cut("norm", VALUES["norm"].clone(), replica_id=rank),
        "rng": ShardedObject("rng_state", [{"seed": rank, "cuda": torch.zeros(4)}], (WORLD,), (rank,)),
        "extra": ShardedObject("norm._extra_state", torch.zeros(2), (1,), (0,), replica_id=rank),
        **COMMON,
    }


def save_megatron(folder: Path, rank: int, *, fully_parallel: bool = False, **options: Any) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    strategy = TorchDistSaveShardedStrategy(**options)
    if fully_parallel:
        strategy = FullyParallelSaveStrategyWrapper(strategy, distributed.group.WORLD)
    dist_checkpointing.save(sharded_state(rank), str(folder), strategy)


def save_torch(folder: Path, rank: int, **options: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    places = {"matrix": Shard(0), "layers": Shard(0), "norm": Replicate()}
    state = {key: distribute_tensor(VALUES[key].clone(), mesh, [place]) for key, place in places.items()}
    dcp.save(state | {"common": COMMON}, storage_writer=dcp.FileSystemWriter(folder, **options))


SAVES: dict[str, Callable[[Path, int], None]] = {
    "megatron": save_megatron,
    "megatron, fully parallel": partial(save_megatron, fully_parallel=True),
    "megatron, two threads": partial(save_megatron, thread_count=2),
    "megatron, cached metadata": partial(save_megatron, cached_metadata=True),
    "megatron, files by hint": partial(save_megatron, separation_hint="matrix"),
    "torch": save_torch,
    "torch, two threads": partial(save_torch, thread_count=2),
    "torch, a file for each tensor": partial(save_torch, single_file_per_rank=False),
}


def save_all(folder: Path) -> None:
    """On every rank."""
    with megatron_on_cpu():
        for name, save in SAVES.items():
            (folder / name).mkdir(exist_ok=True)
            distributed.barrier()
            save(folder / name, distributed.get_rank())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with RankPool(WORLD) as ranks:
        ranks.call(save_all, folder)
    return folder


@pytest.mark.parametrize("save", SAVES)
def test_every_value_is_read(saved: Path, save: str) -> None:
    opened = TorchDistFolder(saved / save)
    assert opened.shapes == {key: tuple(value.shape) for key, value in VALUES.items()}
    for key, value in VALUES.items():
        assert opened.dtype(key) == value.dtype
        assert torch.equal(opened.read(key, (0,) * value.dim(), tuple(value.shape)), value)
        assert torch.equal(*corner(opened, key, value))
    if save.startswith("megatron"):
        objects = {"rng_state/shard_0_2", "rng_state/shard_1_2", "norm._extra_state/shard_0_1"}
        assert objects <= read_metadata(saved / save).objects.keys()
        assert COMMON.items() <= opened.common().items()


def corner(opened: TorchDistFolder, key: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """The last element of each axis, read and cut."""
    start = tuple(size - 1 for size in value.shape)
    return opened.read(key, start, (1,) * value.dim()), value[tuple(slice(at, None) for at in start)]


def test_the_saves_differ(saved: Path) -> None:
    """Else the options above say nothing."""
    found = {save: len(list((saved / save).glob("*.distcp"))) for save in SAVES}
    assert len(set(found.values())) > 1, found


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="torch 2.11 drops what megatron-core adds to the metadata"
)
def test_some_metadata_have_the_plans_of_the_save(saved: Path) -> None:
    """As megatron-core adds them."""
    assert any(b"SavePlan" in (saved / save / ".metadata").read_bytes() for save in SAVES)
