"""`model_parallel` again and again in one process: nothing of one block is left for the next."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from support.commands import ENVIRONMENT
from support.small_model import DEVICE, SMALL, TOKENS
from torch import Tensor

from bridge.model.build import build_gpt_model
from bridge.model.process_groups import model_parallel

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


MICROBATCHES = 4


def balancing_gradient(*, scheduled: bool) -> Tensor:
    """Of the router: what the load-balancing loss adds, over the same microbatch again and again."""
    with_loss, without = (router_gradient(coefficient, scheduled=scheduled) for coefficient in (0.5, 0.0))
    return with_loss - without


def router_gradient(coefficient: float, *, scheduled: bool) -> Tensor:
    torch.manual_seed(1)
    model = build_gpt_model(
        SMALL,
        params_dtype=torch.float32,
        moe_aux_loss_coeff=coefficient,
        finalize_model_grads_func=lambda *_, **__: None,
    )
    positions = torch.arange(TOKENS.shape[1], device=DEVICE).expand_as(TOKENS)

    def forward_step(_: object, chunk: Any) -> tuple[Tensor, Any]:
        return chunk(TOKENS, positions, None, labels=TOKENS), lambda losses: (losses.mean(), {})

    if scheduled:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=MICROBATCHES,
            seq_length=TOKENS.shape[1],
            micro_batch_size=TOKENS.shape[0],
        )
    else:
        for _ in range(MICROBATCHES):
            output, loss = forward_step(None, model)
            (loss(output)[0] / MICROBATCHES).backward()
    layer: Any = model.decoder.layers[1]
    return layer.mlp.router.weight.grad


def test_a_loop_has_the_load_balancing_gradient_of_a_fresh_process() -> None:
    """Whatever ran in the block before: a schedule, which divides it by the number of microbatches, or a plain loop."""
    found = {}
    for name, scheduled in (("fresh", False), ("schedule", True), ("after a schedule", False), ("again", True)):
        with model_parallel():
            found[name] = balancing_gradient(scheduled=scheduled)
        assert MoEAuxLossAutoScaler.main_loss_backward_scale is None, name
        assert MTPLossAutoScaler.main_loss_backward_scale.item() == 1.0, name
    assert found["fresh"].norm() > 1e-3
    assert torch.equal(found["after a schedule"], found["fresh"])
    assert torch.equal(found["again"], found["schedule"])
    torch.testing.assert_close(found["fresh"], MICROBATCHES * found["schedule"])


def test_a_block_does_not_begin_with_what_a_schedule_outside_left() -> None:
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor([7.0])
    MTPLossAutoScaler.set_loss_scale(torch.tensor([7.0]))
    with model_parallel():
        assert MoEAuxLossAutoScaler.main_loss_backward_scale is None
        assert MTPLossAutoScaler.main_loss_backward_scale.item() == 1.0
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([5.0]))
        with model_parallel():  # the groups are there already: a schedule may be at work
            kept: Any = MoEAuxLossAutoScaler.main_loss_backward_scale
            assert kept.item() == 5.0
