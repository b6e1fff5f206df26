"""`model_parallel` again and again in one process: nothing of one block is left for the next."""

import os
import subprocess
import sys
from pathlib import Path

from support.commands import ENVIRONMENT

# Each block sums the ranks over a group of its own; in each the ranks know each other anew.
BLOCKS = """
import os, sys
from pathlib import Path
import torch
from megatron.core import parallel_state
from bridge import model_parallel
from bridge.jobs.ranks import TorchrunRanks, all_gather_objects
from bridge.model.process_groups import groups_of
from reference.parallelism import Parallelism

rank, said = int(os.environ["RANK"]), []

def sum_over(group):
    ranks = torch.tensor([rank + 1])
    torch.distributed.all_reduce(ranks, group=group)
    said.append(ranks.item())

with model_parallel(tensor_model_parallel_size=2):
    sum_over(parallel_state.get_tensor_model_parallel_group())
    with TorchrunRanks(models=True):  # they have joined
        sum_over(parallel_state.get_data_parallel_group())
with TorchrunRanks():
    said.append(all_gather_objects(rank))
with groups_of(Parallelism(dp=2, ep=2)):
    sum_over(parallel_state.get_expert_model_parallel_group())
    sum_over(parallel_state.get_tensor_model_parallel_group())
with TorchrunRanks():
    said.append(all_gather_objects(rank))
with model_parallel(pipeline_model_parallel_size=2):
    sum_over(parallel_state.get_pipeline_model_parallel_group())
assert not torch.distributed.is_initialized()
(Path(sys.argv[1]) / f"rank{rank}").write_text(repr(said))
"""


def test_torchruns_ranks_join_as_often_as_they_are_asked_to(tmp_path: Path) -> None:
    """In groups of other sizes, and between them without a model."""
    script = tmp_path / "script.py"
    script.write_text(BLOCKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(script), str(tmp_path)], env=os.environ | ENVIRONMENT, check=True, timeout=300)
    for rank in range(2):
        own, both = rank + 1, 3
        expected = [both, own, [0, 1], both, own, [0, 1], both]
        assert (tmp_path / f"rank{rank}").read_text() == repr(expected)
