"""megatron-core training on many ranks: every gradient equals `transformers`' in one process.

On a host without a GPU: gloo ranks, the local layer spec, float32. On one with GPUs: NCCL, the Transformer Engine spec,
as many ranks as there are GPUs; float32, and one step of bfloat16. (Start Python with NVIDIA_TF32_OVERRIDE=0 there:
Transformer Engine's float32 products are TensorFloat-32 otherwise, with errors a thousand times float32's.)

Real `GPTModel`, `DistributedDataParallel`, pipeline schedule, sequence parallelism and `finalize_model_grads`. Each
rank is loaded with its slices by `reference.sharding`; afterwards its gradients are put together by the same tables.
The oracle is `MiniMaxM2ForCausalLM`; the truth that both are measured against is the same model in float64.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.oracles import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
    disk_weights,
    hf_model,
    remove_float32_casts,
    settled_tokens,
    to_disk_names,
)
from support.ranks import RankPool
from torch import Tensor

from reference.sharding import Parallelism, parameters, placements, shard, unshard
from reference.weights import Dialect

CASE = Case(heads=8, groups=2, head_dim=16, rotary=8, hidden=32, width=24, experts=4, top_k=2, layers=2, vocab=64)
STEPS, MICROBATCHES, BATCH, SEQ, LEARNING_RATE = 3, 2, 2, 8, 0.5

LAYOUTS = {
    "one rank": Parallelism(),
    "tp2": Parallelism(tp=2, etp=1),
    "tp2 ep2": Parallelism(tp=2, ep=2, etp=1),
    "pp2": Parallelism(pp=2),
    "tp4, 2 key heads": Parallelism(tp=4, etp=1),
    "tp2 pp2": Parallelism(tp=2, pp=2, etp=1),
    "tp2 dp2 ep2": Parallelism(tp=2, dp=2, ep=2, etp=1),
    "tp2, drop-in": Parallelism(tp=2, etp=1),  # megatron-core's own attention with bridge.model.qk_norm in its slots
    "tp4, 2 key heads, drop-in": Parallelism(tp=4, etp=1),
}
GPUS = torch.cuda.device_count()
DIALECT = Dialect.MEGATRON_TE if GPUS else Dialect.MEGATRON_LOCAL
BACKEND = "nccl" if GPUS else "gloo"
RUNNABLE = [name for name, layout in LAYOUTS.items() if not GPUS or layout.world_size <= GPUS]
DTYPES = [FLOAT32, BFLOAT16] if GPUS else [FLOAT32]


class Run(NamedTuple):
    """Loss and gradient norm of each step, the first step's gradients, and the weights after the last."""

    losses: list[float]
    norms: list[float]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


def weights_of(dtype: torch.dtype) -> dict[str, Tensor]:
    return disk_weights(CASE, dtype=dtype)


def steps_of(dtype: torch.dtype) -> int:
    """Weights that move in bfloat16 soon send tokens to other experts, and then there is nothing to compare."""
    return STEPS if dtype == FLOAT32 else 1


def microbatches(dtype: torch.dtype) -> Tensor:
    """Sequences whose choice of experts is far from a tie."""
    model = hf_model(CASE, {name: value.float() for name, value in weights_of(dtype).items()}, FLOAT32)
    return settled_tokens(model, batch=MICROBATCHES * BATCH, seq=SEQ + 1).view(MICROBATCHES, BATCH, SEQ + 1)


# ------------------------------------------------------------------------------------------ the oracle, in one process


def run_transformers(weight_dtype: torch.dtype, dtype: torch.dtype, batches: Tensor) -> Run:
    weights = weights_of(weight_dtype)
    model = hf_model(CASE, {name: value.to(dtype) for name, value in weights.items()}, dtype)
    losses, norms, first = [], [], {}
    for _ in range(steps_of(weight_dtype)):
        model.zero_grad()
        loss = sum(model(batch, labels=batch).loss for batch in batches) / MICROBATCHES
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return Run(losses, norms, to_disk_names(first), to_disk_names(dict(model.state_dict())))


# ----------------------------------------------------------------------------------------------------- one rank of many


def _leave_out_the_backward_all_reduce(folder: str) -> None:
    """What the peer's backward does, from Python and in the C++ that eager calls on a GPU go through."""
    from compiled.norm import function, host

    function._summed = lambda coupling, dws, *_: (coupling, dws)
    source, line = host.SOURCE.read_text(), "coupling = summed(coupling, dws, norm);"
    assert source.count(line) == 1
    host.SOURCE = Path(folder, f"host.{torch.distributed.get_rank()}.cpp")
    host.SOURCE.write_text(source.replace(line, ""))
    os.environ["TORCH_EXTENSIONS_DIR"] = folder


def _train(layout: Parallelism, dtype: torch.dtype, batches: Tensor, drop_in: bool) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from bridge.model.config import gpt_model_arguments, transformer_config
    from bridge.model.layer_spec import minimax_m2_block_spec
    from bridge.model.process_groups import model_parallel
    from bridge.weights.param_mapping import model_state

    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }
    config, rank = CASE.model_config(), torch.distributed.get_rank()
    with model_parallel(**sizes):
        megatron = transformer_config(
            config,
            params_dtype=dtype,
            sequence_parallel=layout.tp > 1,
            moe_aux_loss_coeff=0.0,
            moe_router_bias_update_rate=0.0,
            finalize_model_grads_func=partial(finalize_model_grads, force_all_reduce=True),
            **sizes,
        )
        block = minimax_m2_block_spec(megatron)
        if drop_in:
            for layer in block.layer_specs:
                _use_drop_in(layer.submodules.self_attention)
        model = GPTModel(
            megatron,
            block,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            **gpt_model_arguments(config),
        )
        held = parameters(config, layout, rank, DIALECT)
        state = model_state(model)
        assert state.keys() == {_name_in(drop_in, parameter.name) for parameter in held}
        weights = weights_of(dtype)
        with torch.no_grad():
            for parameter in held:
                name = _name_in(drop_in, parameter.name)
                whole = name != parameter.name  # a drop-in norm has all heads
                state[name].copy_(weights[parameter.sources[0]] if whole else shard(parameter, weights))
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        device = next(model.parameters()).device

        def shards(values: dict[str, Tensor]) -> dict[str, Tensor]:
            """Under the fused norms' names, and only this rank's heads of a drop-in norm."""
            found = {}
            for parameter in held:
                name = _name_in(drop_in, parameter.name)
                if name in values:
                    own = slice(None) if name == parameter.name else slice(*parameter.pieces[0].rows)
                    found[parameter.name] = values[name][own].detach().cpu()
            return found

        mine = batches.to(device).chunk(layout.dp, 1)[layout.coordinates(rank).dp]
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
            first = first or shards({name: p.main_grad.clone() for name, p in model.named_parameters()})
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= LEARNING_RATE * parameter.main_grad
        return {"losses": losses, "norms": norms, "grads": first, "weights": shards(model_state(model))}


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


# --------------------------------------------------------------------------------------------------------- comparisons


def run_megatron(pool: RankPool, name: str, dtype: torch.dtype, batches: Tensor) -> Run:
    """Training at one layout; gradients and weights put together under on-disk names."""
    layout = LAYOUTS[name]
    ranks = pool.call(_train, layout, dtype, batches, "drop-in" in name)
    held = {rank: parameters(CASE.model_config(), layout, rank, DIALECT) for rank in range(layout.world_size)}
    placed = placements(held)

    def whole(what: str) -> dict[str, Tensor]:
        values = {(rank, 0, key): value for rank, r in enumerate(ranks) for key, value in r[what].items()}
        return {
            source: unshard(places, values)
            for source, places in placed.items()
            if all((p.rank, 0, p.name) in values for p in places)  # the expert bias has no gradient
        }

    on_last_stage = [r["losses"] for r in ranks if r["losses"][0] is not None]
    losses = torch.tensor(on_last_stage, dtype=FLOAT64).mean(0).tolist()  # over data-parallel ranks
    assert len({tuple(r["norms"]) for r in ranks}) == 1, "ranks disagree on the gradient norm"
    return Run(losses, ranks[0]["norms"], whole("grads"), whole("weights"))


class Oracle(NamedTuple):
    """`transformers` in the dtype of the run, and the truth in float64, on the same weights and tokens."""

    dtype: torch.dtype
    batches: Tensor
    theirs: Run
    truth: Run


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def oracle(request) -> Oracle:
    dtype, batches = request.param, microbatches(request.param)
    theirs = run_transformers(dtype, dtype, batches)
    with pytest.MonkeyPatch.context() as patch:
        remove_float32_casts(patch)
        return Oracle(dtype, batches, theirs, run_transformers(dtype, FLOAT64, batches))


@pytest.fixture(scope="module")
def pool(request) -> Iterator[RankPool]:
    with RankPool(request.param, BACKEND) as ranks:
        yield ranks


def excess(ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor], unit: float) -> dict:
    """Our error over theirs, both against the truth, for every tensor: norms over the tensor, and one rounding of its
    norm granted to both."""
    ratios = {}
    for name, value in ours.items():
        granted = unit * truth[name].norm()
        error, own = ((side.double() - truth[name]).norm() + granted for side in (value, theirs[name]))
        ratios[name] = (error / own).item() if own else float(error > 0)
    return ratios


# Sums over tokens and heads are made in another order on each shard: errors of the same size, not the same errors; 1.74
# at most was found. Bfloat16's are so large that the mistake of the last test is 3.4 times them (float32's: 66,000).
ALLOWED = 2.5


@pytest.mark.parametrize(("pool", "layout"), [(LAYOUTS[name].world_size, name) for name in RUNNABLE], indirect=["pool"])
def test_training_equals_transformers(pool: RankPool, layout: str, oracle: Oracle) -> None:
    run = run_megatron(pool, layout, oracle.dtype, oracle.batches)
    trained, unit = set(oracle.truth.grads), torch.finfo(oracle.dtype).eps / 2
    assert run.grads.keys() == trained
    for what, values in (("grads", run.grads), ("weights", {name: run.weights[name] for name in trained})):
        ratios = excess(values, getattr(oracle.theirs, what), getattr(oracle.truth, what), unit)
        worst = max(ratios, key=ratios.get)
        mean = sum(ratios.values()) / len(ratios)
        print(f"{layout}, {what}: error over transformers' own: mean {mean:.2f}, max {ratios[worst]:.2f} ({worst})")
        assert ratios[worst] <= ALLOWED, (what, worst)
    # Losses and norms are sums of many roundings; a wrong gradient shows in the third digit (the test below).
    numbers = zip((*run.losses, *run.norms), (*oracle.truth.losses, *oracle.truth.norms), strict=True)
    for ours, exact in numbers:
        assert ours == pytest.approx(exact, rel=200 * unit)


@pytest.mark.skipif("tp2" not in RUNNABLE, reason="needs two ranks")
def test_without_the_backward_all_reduce_gradients_are_wrong(oracle: Oracle, tmp_path: Path) -> None:
    """The peer's mistake, made on purpose: the proof above must not pass with it."""
    with RankPool(2, BACKEND) as pool:
        pool.call(_leave_out_the_backward_all_reduce, str(tmp_path))
        run = run_megatron(pool, "tp2", oracle.dtype, oracle.batches)
    grads = excess(run.grads, oracle.theirs.grads, oracle.truth.grads, torch.finfo(oracle.dtype).eps / 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = oracle.truth.grads[name]
    relative = ((run.grads[name].double() - exact).norm() / exact.norm()).item()
    print(f"q_proj gradient off by {relative:.1%} of its norm, {grads[name]:.0f} times transformers' own error")
    assert grads[name] > ALLOWED
