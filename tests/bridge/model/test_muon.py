"""megatron-core's Muon with this model: its first step is that of whole matrices, on one rank and on several.

The oracle is Emerging Optimizers' own Newton-Schulz iteration on whole matrices as the checkpoint has them: queries,
keys and values each, an expert's w1 above its w3. The gradients are those that `test_training` compares with
`transformers`. Norms, embedding and head have Adam. Emerging Optimizers is in no registry: the tests run where it was
installed from its repository (0.4.0), and are skipped elsewhere.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from support.megatron_training import CASE, GPUS, Setup, put_together, settled_batches, train, weights_of
from support.muon import ADAM_EPSILON, LEARNING_RATE, muon
from support.oracles import FLOAT32
from support.ranks import RankPool
from torch import Tensor

from reference.parallelism import Parallelism

muon_utils = pytest.importorskip(
    "emerging_optimizers.orthogonalized_optimizers.muon_utils", reason="needs Emerging Optimizers, from its repository"
)
pytestmark = pytest.mark.skipif(GPUS > 0, reason="gloo ranks are for a host without GPUs")

Weights = dict[str, Tensor]
ROUNDING = 2e-5  # about 1e-6 of a matrix's norm was seen
ONE = Parallelism()
LAYOUTS = {
    "dp2": Parallelism(dp=2),
    "dp2 ep2": Parallelism(dp=2, ep=2),
    "pp2": Parallelism(pp=2),
    "tp2": Parallelism(tp=2, etp=1),
    "tp2 ep2": Parallelism(tp=2, ep=2, etp=1),
    "tp2, experts cut in two": Parallelism(tp=2, etp=2),
}
SHARED_KEY_HEADS = Parallelism(tp=4, etp=1)  # of which there are two


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    found = {world: RankPool(world) for world in (1, 2, 4)}
    yield found
    for pool in found.values():
        pool.end()


def stepped(pools: dict[int, RankPool], layout: Parallelism, tp_mode: str) -> tuple[Weights, Weights]:
    """Gradients and weights after one step, by on-disk names."""
    setup = Setup(CASE, layout)
    ranks = pools[layout.world_size].call(train, setup, FLOAT32, settled_batches(CASE), None, partial(muon, tp_mode), 1)
    gradients, weights = (put_together(setup, ranks, what) for what in ("grads", "weights"))
    return gradients, {name: weights[name] for name in gradients}


def apart(ours: Weights, theirs: Weights) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: ((ours[name] - value).norm() / value.norm()).item() for name, value in theirs.items()}


def orthogonal(gradient: Tensor) -> Tensor:
    iterated = muon_utils.newton_schulz(gradient, steps=5, coefficient_type="quintic")
    return iterated * max(gradient.shape) ** 0.5


def test_the_step_of_one_rank_is_that_of_whole_matrices(pools: dict[int, RankPool]) -> None:
    gradients, after = stepped(pools, ONE, "duplicated")
    before = weights_of(CASE, FLOAT32)
    wanted = {}
    for name, gradient in gradients.items():
        if gradient.dim() == 1 or "embed_tokens" in name or "lm_head" in name:
            update = gradient / (gradient.abs() + ADAM_EPSILON)
        elif name.endswith("w1.weight"):
            update, third = orthogonal(torch.cat([gradient, gradients[name.replace("w1", "w3")]])).chunk(2)
            wanted[name.replace("w1", "w3")] = before[name.replace("w1", "w3")] - LEARNING_RATE * third
        elif name.endswith("w3.weight"):
            continue
        else:
            update = orthogonal(gradient)
        wanted[name] = before[name] - LEARNING_RATE * update
    off = apart(after, wanted)
    assert max(off.values()) < ROUNDING, off


@pytest.mark.parametrize("mode", ["duplicated", "distributed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_several_ranks_make_the_step_of_one(pools: dict[int, RankPool], name: str, mode: str) -> None:
    _, one = stepped(pools, ONE, "duplicated")
    _, several = stepped(pools, LAYOUTS[name], mode)
    off = apart(several, one)
    assert max(off.values()) < ROUNDING, off


@pytest.mark.parametrize(
    ("layout", "mode"), [(LAYOUTS["tp2"], "blockwise"), (SHARED_KEY_HEADS, "duplicated")], ids=["blockwise", "shared"]
)
def test_where_it_is_another_optimizer(pools: dict[int, RankPool], layout: Parallelism, mode: str) -> None:
    """megatron-core's default takes each rank's part for a matrix; where key heads are shared it does not split qkv."""
    _, one = stepped(pools, ONE, "duplicated")
    _, several = stepped(pools, layout, mode)
    off = apart(several, one)
    assert max(value for name, value in off.items() if "self_attn.k_proj" in name) > 1000 * ROUNDING
    assert max(value for name, value in off.items() if "norm" in name or "experts" in name) < ROUNDING
