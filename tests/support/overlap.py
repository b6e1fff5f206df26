"""Steps of training on data-parallel ranks, with the distributed optimizer's communication overlapped or not."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

STEPS, BEFORE = 4, 3  # hooks are taken off before this step, as for a capture


def train_steps(source: str, overlap: bool) -> dict[str, Any]:
    """Losses, this rank's weights after the last step, and logits with the hooks off and after they are back."""
    from bridge.model.process_groups import groups_of
    from bridge.training import optimizer
    from bridge.training.cuda_graphs import without_gather_hooks
    from bridge.training.start import open_start
    from bridge.training.step import StepResult, train_step
    from bridge.training.train import build
    from reference.parallelism import Parallelism
    from support.training_runs import job_of

    job = job_of(Path(source), Path("nowhere"), micro_batch_size=1, bias_update_rate=0.0, warmup_steps=0)
    chosen = optimizer.ddp_config
    with open_start(job) as start, groups_of(Parallelism(dp=torch.distributed.get_world_size())):
        # Without a GPU the driver overlaps nothing.
        with patch.object(optimizer, "ddp_config", lambda config, **_: chosen(config, overlap=overlap)):
            trained = build(job, start)
        losses, logits = [], []
        for step in range(1, STEPS + 1):
            if step == BEFORE:
                with without_gather_hooks(trained.wrapped) as hooked:
                    assert hooked == overlap
                    logits.append(_logits(trained.wrapped[0]))
                logits.append(_logits(trained.wrapped[0]))
            result = train_step(trained, [iter(_microbatches(step))])
            assert isinstance(result, StepResult)
            losses.append(result.loss)
        optimizer.gather_parameters(trained.wrapped)
        weights = {name: value.detach().clone() for name, value in trained.chunks[0].named_parameters()}
        return {"losses": losses, "logits": logits, "weights": weights}


def _microbatches(step: int) -> list[dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    tokens = torch.randint(3, 259, (2, 1, 33), generator=torch.Generator().manual_seed(10 * step + rank))
    return [{"tokens": one[:, :-1], "labels": one[:, 1:], "loss_mask": torch.ones(1, 32)} for one in tokens]


def _logits(model: Any) -> Tensor:
    tokens = torch.arange(3, 35)[None]
    with torch.no_grad():
        return model(tokens, torch.arange(32)[None], None).clone()
