"""Every row of `REFUSALS`: its settings are refused wherever a model is configured or built, and its remedy passes.

That a row is true of megatron-core is shown where a processor can show it; the others were seen on GPUs, and
`test_safe_settings_gpu` shows them there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from support.checks import ROOT
from support.megatron_training import DEEP_CASE, MICROBATCHES, SEQ, Setup, train
from support.oracles import FLOAT32
from support.ranks import RankPool
from support.small_model import DEVICE, SMALL, TOKENS

from bridge import MiniMaxM2Bridge, build_model, check_settings, model_parallel
from bridge.model.attention import MiniMaxM2SelfAttention
from bridge.model.config import gpt_model_arguments, transformer_config
from bridge.model.layer_spec import minimax_m2_block_spec, minimax_m2_hybrid_spec, minimax_m2_layer_spec
from bridge.model.safe_settings import REFUSALS, on
from reference.parallelism import Parallelism


class Trigger(NamedTuple):
    """Settings that a row is about."""

    model: Mapping[str, Any]
    ddp: Mapping[str, Any] = {}
    needs: Mapping[str, Any] = {}
    """Without these megatron-core itself refuses them."""


EXPERTS_OVERLAP = {
    "overlap_moe_expert_parallel_comm": True,
    "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall",
}
GRAPHS = {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn"]}
FP8 = {"fp8": "e4m3", "fp8_recipe": "blockwise", "moe_token_dispatcher_type": "alltoall"}
TRIGGERS: dict[str, Trigger] = {
    "virtual stages on two pipeline ranks": Trigger(
        {
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 2,
            "overlap_p2p_comm": False,
            "batch_p2p_comm": True,
        }
    ),
    "delayed weight gradients": Trigger({"delay_wgrad_compute": True}, needs=EXPERTS_OVERLAP),
    "FP8 parameters": Trigger({"fp8_param": True}, needs=FP8),
    "Megatron-FSDP": Trigger({}, {"use_megatron_fsdp": True}),
    "MTP layers": Trigger({"mtp_num_layers": 1}),
    "experts in chunks, load-balancing loss": Trigger({"mlp_chunks_for_training": 2, "moe_aux_loss_coeff": 0.01}),
    "experts in chunks, z-loss": Trigger(
        {"mlp_chunks_for_training": 2, "moe_z_loss_coeff": 0.001}, needs={"moe_aux_loss_coeff": 0.0}
    ),
    "meta device": Trigger({"init_model_with_meta_device": True}),
    "operation fuser": Trigger({"use_transformer_engine_op_fuser": True}),
    "gradient accumulation of local layers": Trigger(
        {"gradient_accumulation_fusion": True, "transformer_impl": "local"}
    ),
    "compiled cross entropy of other dtypes": Trigger(
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native", "params_dtype": torch.float32}
    ),
    "Transformer Engine's cross entropy of float16": Trigger(
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te", "params_dtype": torch.float16}
    ),
    "fused router, routing replay": Trigger({"moe_router_fusion": True, "moe_enable_routing_replay": True}),
    "fused router, quantile balancing": Trigger(
        {"moe_router_fusion": True, "moe_router_load_balancing_type": "quantile_balancing"},
        needs={"moe_aux_loss_coeff": 0.0},
    ),
    "fused permutation, padding to capacity": Trigger(
        {"moe_permute_fusion": True, "moe_pad_expert_input_to_capacity": True},
        needs={"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"},
    ),
    "local CUDA graphs": Trigger({"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]}),
    "CUDA graphs, router padding": Trigger(GRAPHS | {"moe_router_padding_for_quantization": True}, needs=FP8),
    "CUDA graphs, gathering parameters": Trigger(
        GRAPHS, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "HybridModel, overlap of experts' communication": Trigger(
        {"is_hybrid_model": True, "overlap_moe_expert_parallel_comm": True}, needs=EXPERTS_OVERLAP
    ),
    "fused_single_qkv_rope": Trigger({"fused_single_qkv_rope": True}),
    "attention_output_gate": Trigger({"attention_output_gate": True}),
    "qk_l2_norm": Trigger({"qk_l2_norm": True}),
    "rotary_interleaved": Trigger({"rotary_interleaved": True}),
    "no_rope_freq": Trigger({"no_rope_freq": 2}),
}
# How the README says what a row is about besides its own settings.
IN_WORDS = {
    "pipeline_model_parallel_size": "two pipeline ranks",
    "virtual_pipeline_model_parallel_size": "virtual stages",
    "is_hybrid_model": "HybridModel",
    "overlap_moe_expert_parallel_comm": "build_schedule_plan",
    "cuda_graph_impl": "CUDA graphs",
    "transformer_impl": "local",
}
OF_THE_MODEL = [name for name, refusal in REFUSALS.items() if not refusal.ddp]
NEEDS_TRANSFORMER_ENGINE = {"fp8", "moe_permute_fusion"}  # or megatron-core's own check comes first
IS_BUILT_ON_CPU = [
    name for name in OF_THE_MODEL if not NEEDS_TRANSFORMER_ENGINE & {*TRIGGERS[name].needs, *TRIGGERS[name].model}
]


def configs(name: str, *, remedied: bool = False) -> tuple[Any, DistributedDataParallelConfig]:
    """A config and a DDP config with the settings of a row, and with its remedy.

    They are set on a config that is there, so that megatron-core's own checks of what is installed are not in the way.
    """
    trigger, remedy = TRIGGERS[name], REFUSALS[name].instead if remedied else {}
    config, ddp = transformer_config(SMALL), DistributedDataParallelConfig()
    for field, value in ({**trigger.needs, **trigger.model, **trigger.ddp, **remedy}).items():
        sides = [side for side in (config, ddp) if hasattr(side, field)]
        assert sides, f"megatron-core has no {field}"
        setattr(sides[0], field, value)
    return config, ddp


def remedy_of(name: str) -> str:
    return ", ".join(f"{field}={value!r}" for field, value in REFUSALS[name].instead.items())


def test_every_row_is_triggered_here() -> None:
    assert TRIGGERS.keys() == REFUSALS.keys()


def test_the_readme_has_every_row_and_names_tests_that_are_there() -> None:
    text = (ROOT / "bridge/model/README.md").read_text()
    refused = [line for line in text.splitlines() if "refused" in line]
    for name, refusal in REFUSALS.items():
        fields = {**refusal.model, **refusal.ddp}
        words = [IN_WORDS.get(field, field) if len(fields) > 1 else field for field in fields]
        words.append(f"{refusal.status}, refused")
        assert any(all(word in line for word in words) for line in refused), (name, words)
    found = set(re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py)`", text))
    assert len(found) > 5
    missing = [name for name in found if not ((ROOT if "/" in name else Path(__file__).parent) / name).is_file()]
    assert not missing


@pytest.mark.parametrize("name", REFUSALS)
def test_settings_are_refused_with_a_remedy_that_passes(name: str) -> None:
    with pytest.raises(ValueError, match="; set ") as error:
        check_settings(*configs(name))
    assert str(error.value).endswith(f": {REFUSALS[name].happens}; set {remedy_of(name)}")
    found = {**REFUSALS[name].model, **REFUSALS[name].ddp}
    assert all(f"{field}=" in str(error.value) for field in found)
    check_settings(*configs(name, remedied=True))


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_a_layer_is_not_made_with_them(name: str) -> None:
    """By the specs, in a loop of one's own; and by the attention, in a spec of one's own."""
    config, _ = configs(name)
    attention = {"layer_number": 1, "submodules": None}
    with model_parallel():
        for make in (
            lambda: minimax_m2_layer_spec(config),
            lambda: minimax_m2_block_spec(config),
            lambda: minimax_m2_hybrid_spec(config),
            lambda: MiniMaxM2SelfAttention(config, **attention),
        ):
            with pytest.raises(ValueError, match=REFUSALS[name].happens.split("(")[0].split("+")[0]):
                make()


@pytest.mark.parametrize("name", IS_BUILT_ON_CPU)
def test_a_model_is_not_configured_with_them(name: str, checkpoint: Path) -> None:
    trigger = TRIGGERS[name]
    settings = {**trigger.needs, **trigger.model}
    if "pipeline_model_parallel_size" in settings:
        settings |= {"num_layers": 4}
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        # sizes that `build_model` takes from the process groups: here only as the caller's own
        for make in (
            lambda: transformer_config(SMALL, **settings),
            lambda: build_model(SMALL, **settings),
            lambda: bridge.provider_bridge(**settings),
            lambda: bridge.to_megatron_model(**settings),
        ):
            with pytest.raises(ValueError, match="; set "):
                make()
        kept = settings | dict(REFUSALS[name].instead)
        config = transformer_config(SMALL, **kept)
        assert all(on(getattr(config, field)) == on(value) for field, value in REFUSALS[name].instead.items())


@pytest.mark.parametrize("given", [{}, {"overlap_p2p_comm": True}, {"batch_p2p_comm": False}], ids=str)
def test_virtual_stages_on_two_ranks_get_what_is_right(given: dict[str, bool]) -> None:
    sizes = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "num_layers": 4}
    config = transformer_config(SMALL, **sizes, **given)
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)
    layout = transformer_config(
        SMALL,
        pipeline_model_parallel_size=2,
        num_layers=4,
        pipeline_model_parallel_layout=[["embedding", "decoder"], ["decoder"], ["decoder"], ["decoder", "loss"]],
    )
    assert layout.virtual_pipeline_model_parallel_size == 2
    assert (layout.overlap_p2p_comm, layout.batch_p2p_comm) == (True, False)
    four = transformer_config(SMALL, **sizes | {"pipeline_model_parallel_size": 4, "num_layers": 8})
    assert (four.overlap_p2p_comm, four.batch_p2p_comm) == (
        False,
        True,
    )  # the default, right there


# ------------------------------------------------------------------------------------------------ true of megatron-core


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two ranks")
def test_virtual_stages_on_two_ranks_are_wrong_with_megatrons_default() -> None:
    """The same training with the refused setting, which is made after the model: other gradients, and no error."""
    batches = torch.randint(DEEP_CASE.vocab, (MICROBATCHES[DEEP_CASE], 2, SEQ + 1), generator=torch.manual_seed(3))
    right = Setup(DEEP_CASE, Parallelism(pp=2, vpp=2))
    wrong = right._replace(changes=TRIGGERS["virtual stages on two pipeline ranks"].model)
    with RankPool(2, "nccl" if torch.cuda.is_available() else "gloo") as pool:
        ours, theirs = (pool.call(train, setup, FLOAT32, batches) for setup in (right, wrong))
    relative = [
        ((theirs[rank]["grads"][key] - grad).norm() / grad.norm()).item()
        for rank in range(2)
        for key, grad in ours[rank]["grads"].items()
        if grad.norm()
    ]
    print(f"losses {ours[1]['losses']} and {theirs[1]['losses']}, gradients off by up to {max(relative):.0%}")
    assert max(relative) > 0.1
    assert all(grad.isfinite().all() for rank in theirs for grad in rank["grads"].values())


def test_mtp_layers_fail_far_from_their_cause() -> None:
    """In megatron-core's own model, which is given no block of them either."""
    with model_parallel():
        config = transformer_config(SMALL, backend="local", params_dtype=torch.float32)
        config.normalization, config.mtp_num_layers = "LayerNorm", 1
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        model = GPTModel(config, spec, **gpt_model_arguments(SMALL)).to(DEVICE)
        positions = torch.arange(TOKENS.shape[1], device=DEVICE).expand_as(TOKENS)
        with pytest.raises(IndexError):
            model(TOKENS, positions, None, labels=TOKENS)


def test_only_gpt_model_has_the_overlapped_schedule() -> None:
    assert hasattr(GPTModel, "build_schedule_plan")
    assert not hasattr(HybridModel, "build_schedule_plan")
