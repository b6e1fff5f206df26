"""On a GPU: what is refused is so in megatron-core and Transformer Engine, and what is worked around is right."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import pad_routing_map, permute
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from support.checks import NO_GPU
from support.small_model import SMALL

from bridge import model_parallel
from bridge.model.config import gpt_model_arguments, transformer_config
from bridge.model.router import Float32Router

pytestmark = [pytest.mark.gpu, NO_GPU]


def stock_model(**changed: object) -> GPTModel:
    """megatron-core's own layers, with settings that are refused for ours."""
    config = transformer_config(SMALL, backend="transformer_engine")
    for name, value in changed.items():
        setattr(config, name, value)
    return GPTModel(
        config, get_gpt_decoder_block_spec(config, use_transformer_engine=True), **gpt_model_arguments(SMALL)
    )


def test_the_meta_device_leaves_parameters_without_values() -> None:
    with model_parallel():
        model = stock_model(init_model_with_meta_device=True)
        assert {p.is_meta for p in model.parameters()} == {True, False}


def test_the_operation_fuser_is_refused_by_megatrons_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVTE_CUTEDSL_FUSED_GROUPED_MLP", raising=False)
    with model_parallel(), pytest.raises(AssertionError, match="Fused GroupedMLP is not supported"):
        stock_model(use_transformer_engine_op_fuser=True)


# ------------------------------------------------------------------------------------------ the router's fused padding


def routed(*, fused: bool, unknown: int | None = None) -> list[torch.Tensor]:
    """Weights of the experts, padded map, and gradients, where the dispatcher pads the map in place.

    One token may be `unknown`, that is NaN.
    """
    config = transformer_config(SMALL, moe_router_fusion=fused)
    config.moe_router_padding_for_quantization = True  # megatron-core asks for FP8 with it, which a router is not in
    router = Float32Router(config, ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp"]))
    generator = torch.Generator("cuda").manual_seed(3)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.expert_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    x = torch.randn(64, 1, SMALL.hidden_size, device="cuda", generator=generator)
    if unknown is not None:
        x[unknown] = torch.nan
    probs, routing_map = router(x.requires_grad_())
    assert (routing_map.sum(1) == SMALL.num_experts_per_tok).all(), "experts of a token"
    padded = pad_routing_map(routing_map, 16)
    assert (padded.sum(0) % 16 == 0).all()
    weights = torch.randn(probs.shape, device="cuda", generator=generator)
    grads = torch.autograd.grad((probs * weights).sum(), [x, router.weight])
    return [probs.detach(), padded, *grads]


def test_a_fused_router_is_padded_like_one_that_is_not() -> None:
    with model_parallel():
        for ours, plain in zip(routed(fused=True), routed(fused=False), strict=True):
            if ours.dtype == torch.bool:
                assert torch.equal(ours, plain)
            else:  # a sigmoid and a sum of two in another order
                torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_megatrons_own_fused_router_cannot_be_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the map is copied: when this passes no more, it need not be."""
    monkeypatch.setattr(Float32Router, "routing", TopKRouter.routing)
    with model_parallel(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        routed(fused=True)


def test_a_token_that_is_nan_has_as_many_experts_and_no_weights() -> None:
    with model_parallel():
        probs, known = routed(fused=True, unknown=7)[0], routed(fused=True)[0]
    others = [token for token in range(64) if token != 7]
    assert torch.equal(probs[others], known[others])
    assert probs[7].isnan().all()


def test_megatrons_own_fused_router_chooses_an_expert_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is not shown what is NaN."""
    monkeypatch.setattr(Float32Router, "routing", TopKRouter.routing)
    with model_parallel(), pytest.raises(AssertionError, match="experts of a token"):
        routed(fused=True, unknown=7)


# ------------------------------------------------------------------------------------------------- what fusions ignore


def test_megatrons_own_fused_router_does_not_replay() -> None:
    """The expert that was recorded is another than the one that would be chosen."""
    chosen = {}
    with model_parallel():
        for fused in (False, True):
            config = transformer_config(SMALL, moe_enable_routing_replay=True)
            assert not config.moe_router_fusion  # a default gives way
            config.moe_router_fusion = fused
            groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "tp_cp", "tp_dp_cp"])
            router = Float32Router(config, groups)
            try:
                router.expert_bias.copy_(torch.tensor([0.0, 0.0, 9.0, 9.0]))
                RouterReplay.set_replay_data([torch.tensor([[0, 1]] * 8, device="cuda")])
                RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
                chosen[fused] = router(torch.randn(8, 1, SMALL.hidden_size, device="cuda"))[1]
            finally:
                RouterReplay.clear_global_router_replay_instances()
    assert torch.equal(chosen[False], torch.tensor([[True, True, False, False]] * 8, device="cuda"))
    assert torch.equal(chosen[True], ~chosen[False])


def test_megatrons_own_fused_permutation_does_not_pad() -> None:
    """Tokens of an expert that has fewer than its capacity are followed by those of the next, not by nothing."""
    routing_map = torch.tensor([[True, False], [False, True], [False, True]], device="cuda")
    tokens = torch.arange(1.0, 4, device="cuda")[:, None].expand(3, 16).contiguous()
    slots = {
        fused: permute(
            tokens, routing_map, probs=routing_map.float(), num_out_tokens=4, fused=fused, drop_and_pad=True
        )[0][:, 0].tolist()
        for fused in (False, True)
    }
    assert slots[False][0] == 1
    assert slots[False][2:] == [2, 3]  # the second expert's two
    assert slots[True][1:3] == [2, 3]
