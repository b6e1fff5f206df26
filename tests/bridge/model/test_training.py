"""megatron-core training on many ranks: every gradient equals `transformers`' in one process.

Of `GPTModel` and of `HybridModel`, whose losses and gradients are the same bits.

On a host without a GPU: gloo ranks, the local layer spec, float32. On one with GPUs: NCCL, the Transformer Engine spec,
as many ranks as there are GPUs; float32, and one step of bfloat16. (Start Python with NVIDIA_TF32_OVERRIDE=0 there:
Transformer Engine's float32 products are TensorFloat-32 otherwise, with errors a thousand times float32's.)

`support.megatron_training` has the ranks' part. Each rank is loaded with its slices by `reference.sharding`; afterwards
its gradients are put together by the same tables.
The oracle is `MiniMaxM2ForCausalLM`; the truth that both are measured against is the same model in float64.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.megatron_training import (
    CASE,
    DEEP_CASE,
    GPUS,
    LEARNING_RATE,
    WIDE_CASE,
    Setup,
    leave_out_the_backward_all_reduce,
    put_together,
    settled_batches,
    steps_of,
    train,
    weights_of,
)
from support.oracles import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
    hf_model,
    remove_float32_casts,
    to_disk_names,
)
from support.ranks import RankPool
from torch import Tensor

from reference.model_class import ModelClass
from reference.parallelism import Parallelism

GPT, HYBRID = ModelClass
SETUPS = {
    "one rank": Setup(CASE, Parallelism()),
    "tp2": Setup(CASE, Parallelism(tp=2, etp=1)),
    "tp2 ep2": Setup(CASE, Parallelism(tp=2, ep=2, etp=1)),
    "pp2": Setup(CASE, Parallelism(pp=2)),
    "pp2 vpp2": Setup(DEEP_CASE, Parallelism(pp=2, vpp=2)),
    "tp4, 2 key heads": Setup(CASE, Parallelism(tp=4, etp=1)),
    "tp2 pp2": Setup(CASE, Parallelism(tp=2, pp=2, etp=1)),
    "tp2 dp2 ep2": Setup(CASE, Parallelism(tp=2, dp=2, ep=2, etp=1)),
    "tp2 dp2 ep4": Setup(CASE, Parallelism(tp=2, dp=2, ep=4, etp=1)),
    "dp4 ep4": Setup(WIDE_CASE, Parallelism(dp=4, ep=4)),
    "dp8 ep8": Setup(WIDE_CASE, Parallelism(dp=8, ep=8)),
    "tp2 dp2 ep2, experts cut in two": Setup(CASE, Parallelism(tp=2, dp=2, ep=2, etp=2)),
    "tp2 pp2 vpp2": Setup(DEEP_CASE, Parallelism(tp=2, pp=2, vpp=2, etp=1)),
    "cp2": Setup(CASE, Parallelism(cp=2)),  # with Transformer Engine's attention
    "tp2 cp2": Setup(CASE, Parallelism(tp=2, cp=2, etp=1)),
    "tp2, drop-in": Setup(CASE, Parallelism(tp=2, etp=1), drop_in=True),
    "tp4, 2 key heads, drop-in": Setup(CASE, Parallelism(tp=4, etp=1), drop_in=True),
}
SETUPS |= {
    f"{name}, HybridModel": SETUPS[name]._replace(model=HYBRID)
    for name in ("one rank", "tp2", "tp2 ep2", "pp2", "pp2 vpp2", "tp2 pp2")
}
BACKEND = "nccl" if GPUS else "gloo"
RUNNABLE = [
    name
    for name, setup in SETUPS.items()
    if (setup.layout.world_size <= GPUS if GPUS else setup.layout.cp == 1)  # megatron-core's own attention has no cp
]
MANY_RANKS = ("dp4 ep4", "dp8 ep8")  # slow where ranks share few cores
DTYPES = [FLOAT32, BFLOAT16] if GPUS else [FLOAT32]


class Run(NamedTuple):
    """Loss and gradient norm of each step, the first step's gradients, and the weights after the last."""

    losses: list[float]
    norms: list[float]
    grads: dict[str, Tensor]
    weights: dict[str, Tensor]


# ------------------------------------------------------------------------------------------ the oracle, in one process


def run_transformers(case: Case, weight_dtype: torch.dtype, dtype: torch.dtype, batches: Tensor) -> Run:
    weights = weights_of(case, weight_dtype)
    model = hf_model(case, {name: value.to(dtype) for name, value in weights.items()}, dtype)
    losses, norms, first = [], [], {}
    for _ in range(steps_of(weight_dtype)):
        model.zero_grad()
        loss = sum(model(batch, labels=batch).loss for batch in batches) / len(batches)
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item())
        first = first or {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
    return Run(losses, norms, to_disk_names(first), to_disk_names(dict(model.state_dict())))


# --------------------------------------------------------------------------------------------------------- comparisons


def run_megatron(pool: RankPool, setup: Setup, dtype: torch.dtype, batches: Tensor) -> Run:
    """Training at one layout; gradients and weights put together under on-disk names."""
    ranks = pool.call(train, setup, dtype, batches)
    on_last_stage = [r["losses"] for r in ranks if r["losses"][0] is not None]
    losses = torch.tensor(on_last_stage, dtype=FLOAT64).mean(0).tolist()  # over data-parallel ranks
    assert len({tuple(r["norms"]) for r in ranks}) == 1, "ranks disagree on the gradient norm"
    return Run(losses, ranks[0]["norms"], *(put_together(setup, ranks, what) for what in ("grads", "weights")))


class Oracle(NamedTuple):
    """`transformers` in the dtype of the run, and the truth in float64, on the same weights and tokens."""

    batches: Tensor
    theirs: Run
    truth: Run


@cache
def oracle_of(case: Case, dtype: torch.dtype) -> Oracle:
    batches = settled_batches(case, dtype)
    theirs = run_transformers(case, dtype, dtype, batches)
    with pytest.MonkeyPatch.context() as patch:
        remove_float32_casts(patch)
        return Oracle(batches, theirs, run_transformers(case, dtype, FLOAT64, batches))


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


on_their_ranks = pytest.mark.parametrize(
    ("pool", "name"),
    [
        pytest.param(SETUPS[name].layout.world_size, name, marks=[pytest.mark.slow] if name in MANY_RANKS else [])
        for name in RUNNABLE
    ],
    indirect=["pool"],
)


@on_their_ranks
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_equals_transformers(pool: RankPool, name: str, dtype: torch.dtype, record_property) -> None:
    if SETUPS[name].layout.cp > 1 and dtype == FLOAT32:
        pytest.skip("Transformer Engine has no attention of float32 across context-parallel ranks")
    oracle = oracle_of(SETUPS[name].case, dtype)
    run = run_megatron(pool, SETUPS[name], dtype, oracle.batches)
    trained, unit = set(oracle.truth.grads), torch.finfo(dtype).eps / 2
    assert run.grads.keys() == trained
    for what, values in (("grads", run.grads), ("weights", {name: run.weights[name] for name in trained})):
        ratios = excess(values, getattr(oracle.theirs, what), getattr(oracle.truth, what), unit)
        worst = max(ratios, key=ratios.get)
        mean = sum(ratios.values()) / len(ratios)
        print(f"{name}, {what}: error over transformers' own: mean {mean:.2f}, max {ratios[worst]:.2f} ({worst})")
        record_property(what, {"mean": round(mean, 2), "max": round(ratios[worst], 2), "of": worst})
        assert ratios[worst] <= ALLOWED, (what, worst)
    # Losses and norms are sums of many roundings; a wrong gradient shows in the third digit (the test below).
    numbers = zip((*run.losses, *run.norms), (*oracle.truth.losses, *oracle.truth.norms), strict=True)
    for ours, exact in numbers:
        assert ours == pytest.approx(exact, rel=200 * unit)


@pytest.mark.parametrize(
    ("pool", "name"),
    [(SETUPS[name].layout.world_size, name) for name in RUNNABLE if f"{name}, HybridModel" in RUNNABLE],
    indirect=["pool"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_classes_train_alike(pool: RankPool, name: str, dtype: torch.dtype) -> None:
    """Losses, gradients and weights bit for bit; the gradient norm is summed over parameters in another order."""
    batches = oracle_of(SETUPS[name].case, dtype).batches
    gpt, hybrid = (run_megatron(pool, SETUPS[key], dtype, batches) for key in (name, f"{name}, HybridModel"))
    assert gpt.losses == hybrid.losses
    assert gpt.norms == pytest.approx(hybrid.norms, rel=1e-6)
    for what in ("grads", "weights"):
        ours, theirs = getattr(gpt, what), getattr(hybrid, what)
        assert ours.keys() == theirs.keys()
        assert [key for key, value in ours.items() if not torch.equal(value, theirs[key])] == []


@pytest.mark.skipif("tp2" not in RUNNABLE, reason="needs two ranks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_the_backward_all_reduce_gradients_are_wrong(
    dtype: torch.dtype, tmp_path: Path, record_property
) -> None:
    """The peer's mistake, made on purpose: the proof above must not pass with it."""
    oracle = oracle_of(CASE, dtype)
    with RankPool(2, BACKEND) as pool:
        pool.call(leave_out_the_backward_all_reduce, str(tmp_path))
        run = run_megatron(pool, SETUPS["tp2"], dtype, oracle.batches)
    grads = excess(run.grads, oracle.theirs.grads, oracle.truth.grads, torch.finfo(dtype).eps / 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = oracle.truth.grads[name]
    relative = ((run.grads[name].double() - exact).norm() / exact.norm()).item()
    print(f"q_proj gradient off by {relative:.1%} of its norm, {grads[name]:.0f} times transformers' own error")
    record_property("q_proj gradient", {"off by": round(relative, 3), "ratio": round(grads[name], 2)})
    assert grads[name] > ALLOWED
