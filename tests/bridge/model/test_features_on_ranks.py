"""megatron-core's training features, with this model, on two ranks: what they must not change, and what they must.

What only changes how a step is computed (recomputation, packed sequences) gives the gradients of the step without it.
What changes the loss (the load-balancing losses, the router's z-loss) gives on two ranks the gradients of one rank.
gloo ranks and the local layer spec. (Norms and activations are recomputed by code that needs Transformer Engine.) The
table in `bridge/model/README.md` says what was run on GPUs.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from support.megatron_training import CASE, GPUS, Setup, put_together, settled_batches, train
from support.oracles import FLOAT32
from support.ranks import RankPool
from support.small_model import SMALL, TOKENS, logits_of
from torch import Tensor

from bridge.model.build import build_gpt_model
from bridge.model.process_groups import model_parallel
from reference.parallelism import Parallelism

pytestmark = pytest.mark.skipif(GPUS > 0, reason="gloo ranks are for a host without GPUs")

ONE, TP2, TP2_EP2 = Parallelism(), Parallelism(tp=2, etp=1), Parallelism(tp=2, ep=2, etp=1)
EP2 = Parallelism(ep=2, dp=2)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def one() -> Iterator[RankPool]:
    with RankPool(1) as ranks:
        yield ranks


RUNS: dict[str, dict[str, Weights]] = {}


def run(pool: RankPool, setup: Setup) -> dict[str, Weights]:
    """As `train_on`, once for each setup."""
    if repr(setup) not in RUNS:
        RUNS[repr(setup)] = train_on(pool, setup)
    return RUNS[repr(setup)]


def train_on(pool: RankPool, setup: Setup) -> dict[str, Weights]:
    """The first step's gradients and the weights after the last, put together under on-disk names."""
    ranks = pool.call(train, setup, FLOAT32, settled_batches(CASE))
    return {what: put_together(setup, ranks, what) for what in ("grads", "weights")}


def distance(ours: Weights, theirs: Weights) -> float:
    """The greatest over all tensors, in parts of the tensor's norm."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - value).norm() / value.norm()).item() for name, value in theirs.items() if value.norm())


# A sum of a few hundred float32 products in another order: about 1e-6 of its norm was seen.
ROUNDING = 2e-5

RECOMPUTATION: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "experts": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


@pytest.mark.parametrize("name", RECOMPUTATION)
def test_recomputation_changes_no_bit(two: RankPool, name: str) -> None:
    kept = run(two, Setup(CASE, TP2_EP2))
    recomputed = run(two, Setup(CASE, TP2_EP2, settings=RECOMPUTATION[name]))
    for what, values in kept.items():
        assert values.keys() == recomputed[what].keys()
        assert [key for key, value in values.items() if not torch.equal(value, recomputed[what][key])] == []


@pytest.mark.parametrize("layout", [ONE, EP2, TP2_EP2], ids=["one rank", "ep2", "tp2 ep2"])
def test_both_dispatchers_give_the_same_gradients(one: RankPool, two: RankPool, layout: Parallelism) -> None:
    """`allgather`, which the other tests here have, and `alltoall`, which GPUs have; there and back in other orders."""
    pool = two if layout.world_size == 2 else one
    gathered, exchanged = (
        run(pool, Setup(CASE, layout, settings=settings))["grads"]
        for settings in ({}, {"moe_token_dispatcher_type": "alltoall"})
    )
    found = distance(exchanged, gathered)
    print(f"gradients off by {found:.1e}")
    assert found < ROUNDING


@pytest.mark.parametrize("layout", [ONE, TP2, TP2_EP2], ids=["one rank", "tp2", "tp2 ep2"])
def test_packed_sequences_are_the_sequences_alone(one: RankPool, two: RankPool, layout: Parallelism) -> None:
    """Of transformers too, whose gradients `test_training` finds in the run of sequences that are not packed."""
    alone = run(one, Setup(CASE, ONE))
    packed = run(two if layout.world_size == 2 else one, Setup(CASE, layout, packed=True))
    found = distance(packed["grads"], alone["grads"])
    print(f"gradients off by {found:.1e}")
    assert found < ROUNDING


LOSSES: dict[str, dict[str, Any]] = {
    "aux_loss": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "two at once": {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]},
    "z-loss": {"moe_z_loss_coeff": 0.1},
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_the_router_are_those_of_one_rank(one: RankPool, two: RankPool, name: str) -> None:
    whole, without = (run(one, Setup(CASE, ONE, settings=settings))["grads"] for settings in (LOSSES[name], {}))
    found = distance(run(two, Setup(CASE, TP2_EP2, settings=LOSSES[name]))["grads"], whole)
    print(f"gradients off by {found:.1e}, without the loss by {distance(without, whole):.1e}")
    assert found < ROUNDING
    assert distance(without, whole) > 100 * ROUNDING


def test_the_bias_of_the_experts_moves_alike(one: RankPool, two: RankPool) -> None:
    setup = Setup(CASE, ONE, settings={"moe_router_bias_update_rate": 1e-3})
    whole, still = (run(one, setup._replace(settings=settings))["weights"] for settings in (setup.settings, {}))
    biases = [name for name in whole if name.endswith("e_score_correction_bias")]
    assert len(biases) == CASE.layers
    found = run(two, setup._replace(layout=TP2_EP2))["weights"]
    for name in biases:
        assert torch.equal(found[name], whole[name])
        assert not torch.equal(found[name], still[name])


def test_replayed_routing_is_the_recorded_one() -> None:
    """As in RL: experts are those that were chosen then, and their weights those of the router now."""
    with model_parallel():
        model = build_gpt_model(SMALL, backend="local", params_dtype=FLOAT32, moe_enable_routing_replay=True)
        plain = build_gpt_model(SMALL, backend="local", params_dtype=FLOAT32)
        plain.load_state_dict(model.state_dict())
        biases = [layer.mlp.router.expert_bias for layer in model.decoder.layers]
        try:
            RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
            then = logits_of(model, TOKENS)
            recorded = [indices.clone() for indices in RouterReplay.get_recorded_data()]
            assert torch.equal(then, logits_of(plain, TOKENS))
            for bias in biases:
                bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))  # these two are chosen now; a bias is in no weight
            RouterReplay.clear_global_router_replay_action()
            assert not torch.equal(logits_of(model, TOKENS), then)
            RouterReplay.set_replay_data(recorded)
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            assert torch.equal(logits_of(model, TOKENS), then)
        finally:
            RouterReplay.clear_global_router_replay_instances()
