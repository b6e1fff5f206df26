"""One step of megatron-core's Muon on a small model, on one rank of many."""

from typing import Any

import torch
from torch import Tensor

from support.megatron_training import SEQ, Setup, _build, _load, _shards, weights_of
from support.oracles import FLOAT32
from support.sharded_models import groups_of

LEARNING_RATE, ADAM_EPSILON = 0.02, 1e-3  # an epsilon that is not lost beside a gradient


def first_step(setup: Setup, batches: Tensor, tp_mode: str) -> dict[str, Any]:
    """This rank's gradients, and its weights after the step, by (chunk, name)."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

    from bridge.proof.judge.training import forward_backward, labelled_step, wrapped
    from bridge.weights.param_mapping import model_state

    rank, layout = torch.distributed.get_rank(), setup.layout
    held = setup.held(rank)
    config = OptimizerConfig(
        optimizer="muon",
        lr=LEARNING_RATE,
        weight_decay=0.0,
        clip_grad=0.0,
        adam_eps=ADAM_EPSILON,
        muon_tp_mode=tp_mode,
        muon_fp32_matmul_prec="highest",
    )
    with groups_of(layout):
        chunks = _build(setup, FLOAT32)
        _load(chunks, held, weights_of(setup.case, FLOAT32), drop_in=False)
        ddp = wrapped(chunks)
        optimizer: Any = get_megatron_optimizer(config, ddp, get_standard_config_overrides(config))  # pyright: ignore[reportArgumentType]
        mine = batches.chunk(layout.dp, 1)[layout.coordinates(rank).dp]
        microbatches = [(tokens[:, :-1], tokens[:, 1:]) for tokens in mine]
        forward_backward(ddp, microbatches, labelled_step, seq=SEQ, batch=len(mine[0]))
        grads = [{name: x.main_grad.clone() for name, x in chunk.named_parameters()} for chunk in chunks]
        optimizer.step()
        weights = _shards([model_state(chunk) for chunk in chunks], held, drop_in=False)
        return {"grads": _shards(grads, held, drop_in=False), "weights": weights}
