"""The norms as modules of a loop that is not ours, saved and loaded by megatron-core's `dist_checkpointing`.

Four gloo ranks: key heads on one rank each, on two and on all four; and two tensor-parallel ranks of two
data-parallel ones. Each weight has its own numbers, so a part that is lost or in another's place shows.
"""

from pathlib import Path

import torch
from support.ranks import RankPool
from torch.distributed.checkpoint import FileSystemReader, load

WORLD, HEADS, DIM = 4, 8, 4
# tensor-parallel size and key heads
LAYOUTS = [(1, 2), (2, 2), (4, 2), (4, 1), (4, 4)]


def whole(name: str, heads: int) -> torch.Tensor:
    return torch.arange(heads * DIM).float() + {"q_weight": 100, "k_weight": 200, "weight": 300}[name]


def save_and_load(folder: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.transformer.module import MegatronModule

    from bridge.model.config import transformer_config
    from bridge.model.process_groups import model_parallel
    from compiled import FullDimQKNorm, FullDimRMSNorm
    from reference.config import ModelConfig

    class Loop(MegatronModule):
        def __init__(self, kv_heads: int) -> None:
            super().__init__(transformer_config(ModelConfig(rotary_dim=64), backend="local"))
            tp = parallel_state.get_tensor_model_parallel_world_size()
            local, ranks = max(1, kv_heads // tp), parallel_state.get_tensor_model_parallel_group
            self.both = FullDimQKNorm(HEADS, kv_heads, DIM, ranks)
            self.key = FullDimRMSNorm(local * DIM, kv_heads * DIM, ranks)
            rank = parallel_state.get_tensor_model_parallel_rank()
            self.wanted = {"both.q_weight": whole("q_weight", HEADS).chunk(tp)[rank]}
            for name in ("both.k_weight", "key.weight"):
                held = max(1, tp // kv_heads)
                self.wanted[name] = whole(name.split(".")[1], kv_heads).chunk(tp // held)[rank // held]

        def check(self) -> None:
            assert self.state_dict().keys() == self.wanted.keys()
            for name, value in self.state_dict().items():
                assert torch.equal(value, self.wanted[name]), name

    for tp, kv_heads in LAYOUTS:
        path = folder / f"{tp} {kv_heads}"
        if torch.distributed.get_rank() == 0:
            path.mkdir()
        with model_parallel(tensor_model_parallel_size=tp):
            loop = Loop(kv_heads)
            with torch.no_grad():
                for name, value in loop.state_dict().items():
                    value.copy_(loop.wanted[name])
            torch.distributed.barrier()
            dist_checkpointing.save(loop.sharded_state_dict(), str(path))
    for path in (folder / "1 2", folder / "4 2"):  # at other sizes than it was saved at
        for tp in (1, 2, 4):
            with model_parallel(tensor_model_parallel_size=tp):
                loop = Loop(2)
                loop.load_state_dict(dist_checkpointing.load(loop.sharded_state_dict(), str(path)))
                loop.check()


def test_saved_whole_and_loaded_at_any_size(tmp_path: Path) -> None:
    with RankPool(WORLD) as ranks:
        ranks.call(save_and_load, tmp_path)
    for tp, kv_heads in LAYOUTS:
        path = tmp_path / f"{tp} {kv_heads}"
        expected = {
            "both.q_weight": whole("q_weight", HEADS),
            "both.k_weight": whole("k_weight", kv_heads),
            "key.weight": whole("weight", kv_heads),
        }
        held = FileSystemReader(path).read_metadata().state_dict_metadata
        assert {name: held[name].size for name in expected} == {name: x.shape for name, x in expected.items()}
        found = {name: torch.full_like(x, torch.nan) for name, x in expected.items()}
        load(found, storage_reader=FileSystemReader(path), no_dist=True)
        for name, value in expected.items():
            assert torch.equal(found[name], value), (tp, kv_heads, name)
