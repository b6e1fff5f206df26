"""Steps of training a small `GPTModel` with megatron-core, on one rank of many.

Real `DistributedDataParallel`, pipeline schedule, sequence parallelism and `finalize_model_grads`. On a host with GPUs
the Transformer Engine spec, else the local one.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters, shard
from reference.weights import Dialect
from support.oracles import FLOAT32, Case, disk_weights

CASE = Case(heads=8, groups=2, head_dim=16, rotary=8, hidden=32, width=24, experts=4, top_k=2, layers=2, vocab=64)
STEPS, MICROBATCHES, BATCH, SEQ, LEARNING_RATE = 3, 2, 2, 8, 0.5

GPUS = torch.cuda.device_count()
DIALECT = Dialect.MEGATRON_TE if GPUS else Dialect.MEGATRON_LOCAL


def weights_of(dtype: torch.dtype) -> dict[str, Tensor]:
    return disk_weights(CASE, dtype=dtype)


def steps_of(dtype: torch.dtype) -> int:
    """Weights that move in bfloat16 soon send tokens to other experts, and then there is nothing to compare."""
    return STEPS if dtype == FLOAT32 else 1


def leave_out_the_backward_all_reduce(folder: str) -> None:
    """What the peer's backward does, from Python and in the C++ that eager calls on a GPU go through."""
    from compiled.norm import function, host

    function._summed = lambda coupling, dws, *_: (coupling, dws)
    source, line = host.SOURCE.read_text(), "coupling = summed(coupling, dws, norm);"
    assert source.count(line) == 1
    host.SOURCE = Path(folder, f"host.{torch.distributed.get_rank()}.cpp")
    host.SOURCE.write_text(source.replace(line, ""))
    os.environ["TORCH_EXTENSIONS_DIR"] = folder


def train(layout: Parallelism, dtype: torch.dtype, batches: Tensor, drop_in: bool) -> dict[str, Any]:
    """Losses and gradient norms of each step, this rank's gradients of the first, and its weights after the last."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from bridge.model.process_groups import model_parallel
    from bridge.weights.param_mapping import model_state

    rank, sizes = torch.distributed.get_rank(), _group_sizes(layout)
    held = parameters(CASE.model_config(), layout, rank, DIALECT)
    with model_parallel(**sizes):
        model = _build(sizes, dtype, drop_in)
        _load(model, held, dtype, drop_in)
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        mine = batches.to(next(model.parameters()).device).chunk(layout.dp, 1)[layout.coordinates(rank).dp]
        losses, norms, first = [], [], {}
        for _ in range(steps_of(dtype)):
            ddp.zero_grad_buffer()
            reduced = get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=iter(mine),
                model=[ddp],
                num_microbatches=MICROBATCHES,
                seq_length=SEQ,
                micro_batch_size=BATCH // layout.dp,
            )
            losses.append(float(sum(step["loss"] for step in reduced)) / MICROBATCHES if reduced else None)
            norms.append(_gradient_norm(model))
            grads = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
            first = first or _shards(grads, held, drop_in)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= LEARNING_RATE * parameter.main_grad
        weights = _shards(model_state(model), held, drop_in)
        return {"losses": losses, "norms": norms, "grads": first, "weights": weights}


def _group_sizes(layout: Parallelism) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def _build(sizes: dict[str, int], dtype: torch.dtype, drop_in: bool) -> torch.nn.Module:
    """This rank's `GPTModel`, with random weights."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.models.gpt import GPTModel

    from bridge.model.config import gpt_model_arguments, transformer_config
    from bridge.model.layer_spec import minimax_m2_block_spec

    config = CASE.model_config()
    megatron = transformer_config(
        config,
        params_dtype=dtype,
        sequence_parallel=sizes["tensor_model_parallel_size"] > 1,
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,
        finalize_model_grads_func=partial(finalize_model_grads, force_all_reduce=True),
        **sizes,
    )
    block = minimax_m2_block_spec(megatron)
    if drop_in:
        for layer in block.layer_specs:
            _use_drop_in(layer.submodules.self_attention)
    return GPTModel(
        megatron,
        block,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **gpt_model_arguments(config),
    )


def _load(model: torch.nn.Module, held: list[Parameter], dtype: torch.dtype, drop_in: bool) -> None:
    """This rank's slices; a drop-in norm has all heads."""
    from bridge.weights.param_mapping import model_state

    state, weights = model_state(model), weights_of(dtype)
    assert state.keys() == {_name_in(drop_in, parameter.name) for parameter in held}
    with torch.no_grad():
        for parameter in held:
            name = _name_in(drop_in, parameter.name)
            whole = name != parameter.name
            state[name].copy_(weights[parameter.sources[0]] if whole else shard(parameter, weights))


def _shards(values: dict[str, Tensor], held: list[Parameter], drop_in: bool) -> dict[str, Tensor]:
    """Under the fused norms' names, and only this rank's heads of a drop-in norm."""
    found = {}
    for parameter in held:
        name = _name_in(drop_in, parameter.name)
        if name in values:
            own = slice(None) if name == parameter.name else slice(*parameter.pieces[0].rows)
            found[parameter.name] = values[name][own].detach().cpu()
    return found


def _use_drop_in(attention) -> None:
    from megatron.core.transformer.attention import SelfAttention

    from bridge.model.qk_norm import FullDimKNorm, FullDimQNorm

    attention.module = SelfAttention
    attention.submodules.q_layernorm, attention.submodules.k_layernorm = FullDimQNorm, FullDimKNorm


def _name_in(drop_in: bool, name: str) -> str:
    if not drop_in:
        return name
    return name.replace("qk_norm.q_weight", "q_layernorm.weight").replace("qk_norm.k_weight", "k_layernorm.weight")


def _forward_step(batches, model):
    tokens = next(batches)
    positions = torch.arange(SEQ, device=tokens.device).expand(len(tokens), -1)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, lambda losses: (losses.mean(), {"loss": losses.mean().detach()})


def _gradient_norm(model: torch.nn.Module) -> float:
    """megatron-core's own: each parameter once, dense and expert parameters over their own groups."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    groups = {
        True: parallel_state.get_model_parallel_group(),
        False: parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    }
    tp, etp = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_expert_tensor_parallel_group()
    norms = []
    for dense, group in groups.items():
        counted = [
            parameter.main_grad
            for parameter in model.parameters()
            if getattr(parameter, "allreduce", True) is dense
            and param_is_not_tensor_parallel_duplicate(parameter, tp, etp)
        ]
        norms.append(float(get_grad_norm_fp32(counted, grad_stats_parallel_group=group)))
    return (norms[0] ** 2 + norms[1] ** 2) ** 0.5
