"""megatron-core training on many ranks: every gradient equals `transformers`' in one process.

On a host without a GPU: gloo ranks, the local layer spec, float32. On one with GPUs: NCCL, the Transformer Engine spec,
as many ranks as there are GPUs; float32, and one step of bfloat16. (Start Python with NVIDIA_TF32_OVERRIDE=0 there:
Transformer Engine's float32 products are TensorFloat-32 otherwise, with errors a thousand times float32's.)

`support.megatron_training` has the ranks' part. Each rank is loaded with its slices by `reference.sharding`; afterwards
its gradients are put together by the same tables.
The oracle is `MiniMaxM2ForCausalLM`; the truth that both are measured against is the same model in float64.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.megatron_training import (
    BATCH,
    CASE,
    DIALECT,
    GPUS,
    LEARNING_RATE,
    MICROBATCHES,
    SEQ,
    leave_out_the_backward_all_reduce,
    steps_of,
    train,
    weights_of,
)
from support.oracles import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    hf_model,
    remove_float32_casts,
    settled_tokens,
    to_disk_names,
)
from support.ranks import RankPool
from torch import Tensor

from reference.parallelism import Parallelism
from reference.sharding import parameters, placements, unshard

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
BACKEND = "nccl" if GPUS else "gloo"
RUNNABLE = [name for name, layout in LAYOUTS.items() if not GPUS or layout.world_size <= GPUS]
DTYPES = [FLOAT32, BFLOAT16] if GPUS else [FLOAT32]


class Run(NamedTuple):
    """Loss and gradient norm of each step, the first step's gradients, and the weights after the last."""

    losses: list[float]
    norms: list[float]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


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


# --------------------------------------------------------------------------------------------------------- comparisons


def run_megatron(pool: RankPool, name: str, dtype: torch.dtype, batches: Tensor) -> Run:
    """Training at one layout; gradients and weights put together under on-disk names."""
    layout = LAYOUTS[name]
    ranks = pool.call(train, layout, dtype, batches, "drop-in" in name)
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
        pool.call(leave_out_the_backward_all_reduce, str(tmp_path))
        run = run_megatron(pool, "tp2", oracle.dtype, oracle.batches)
    grads = excess(run.grads, oracle.theirs.grads, oracle.truth.grads, torch.finfo(oracle.dtype).eps / 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = oracle.truth.grads[name]
    relative = ((run.grads[name].double() - exact).norm() / exact.norm()).item()
    print(f"q_proj gradient off by {relative:.1%} of its norm, {grads[name]:.0f} times transformers' own error")
    assert grads[name] > ALLOWED
