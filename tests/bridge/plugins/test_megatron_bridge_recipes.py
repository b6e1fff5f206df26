"""The recipes: megatron-bridge validates them, and `minimax-m2 plan` says that their layouts fit."""

import json

import pytest
import torch
from support.megatron_bridge import plugin
from support.oracles import Case
from support.plans import full_plan

from bridge.model.safe_settings import check_settings
from bridge.plugins.megatron_bridge import recipes

pytestmark = pytest.mark.plugins

FULL = Case(
    heads=48, groups=8, head_dim=128, rotary=64, hidden=3072, width=1536, experts=256, top_k=8, layers=62, vocab=200064
)
RECIPES = {
    "pretrain": recipes.minimax_m2_pretrain_128gpu_h100_bf16_config,
    "sft": recipes.minimax_m2_sft_128gpu_h100_bf16_config,
    "peft": recipes.minimax_m2_peft_16gpu_h100_bf16_config,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The full model's config.json, and no weights."""
    out = tmp_path_factory.mktemp("full")
    config = FULL.released_config() | {"architectures": ["MiniMaxM2ForCausalLM"], "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config))
    return str(out)


def validate(config: recipes.ConfigContainer, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host's entry points do first, on as many ranks."""
    from megatron.bridge.training import config as host

    monkeypatch.setattr(host, "get_world_size_safe", lambda: gpus)
    host.runtime_config_update(config)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_host_validates_it(kind: str, folder: str, monkeypatch: pytest.MonkeyPatch):
    config, layout = RECIPES[kind](folder), recipes.LAYOUTS[kind]
    validate(config, layout.gpus, monkeypatch)
    model = config.model
    assert type(model) is plugin.MiniMaxM2ModelProvider
    assert (model.num_layers, model.num_moe_experts, model.vocab_size) == (62, 256, 200064)
    assert config.data_parallel_size == layout.gpus // (layout.tensor * layout.pipeline)
    assert config.data_parallel_size * layout.tensor % layout.expert == 0
    assert {model.params_dtype, model.pipeline_dtype} == {torch.bfloat16}
    assert (model.sequence_parallel, model.moe_token_dispatcher_type) == (True, "alltoall")
    assert (config.ddp.use_distributed_optimizer, config.ddp.grad_reduce_in_fp32) == (True, True)
    assert str(layout.gpus) + "gpu" in RECIPES[kind].__name__
    check_settings(model, config.ddp)


@pytest.mark.parametrize("kind", ["sft", "peft"])
def test_fine_tuning_starts_from_the_checkpoint_and_leaves_the_routers_bias(
    kind: str, folder: str, monkeypatch: pytest.MonkeyPatch
):
    config = RECIPES[kind](folder)
    validate(config, recipes.LAYOUTS[kind].gpus, monkeypatch)
    assert config.checkpoint.pretrained_checkpoint == folder
    assert config.model.moe_router_bias_update_rate == 0
    assert (config.peft is None) == (kind == "sft")


def test_a_hub_id_is_no_checkpoint_to_start_from(folder: str, monkeypatch: pytest.MonkeyPatch):
    config = RECIPES["sft"](folder)
    config.checkpoint.pretrained_checkpoint = recipes.HUB_ID
    with pytest.raises(AssertionError, match=f"{recipes.HUB_ID} does not exist"):
        validate(config, 128, monkeypatch)


@pytest.mark.parametrize("kind", RECIPES)
def test_the_layout_fits(kind: str, folder: str):
    """All of training, of an adapter only the weights that it is on; a quarter of the memory is left."""
    config, layout = RECIPES[kind](folder), recipes.LAYOUTS[kind]
    sizes = {"tp": layout.tensor, "pp": layout.pipeline, "ep": layout.expert, "etp": 1}
    assert (config.model.tensor_model_parallel_size, config.model.expert_model_parallel_size) == (
        sizes["tp"],
        sizes["ep"],
    )
    plan = full_plan(layout.gpus, **sizes)
    held = [group.distributed.weights if kind == "peft" else group.distributed.total for group in plan.ranks]
    print(f"{kind}: {max(held) / 1e9:.1f} GB")
    assert max(held) < 0.75 * plan.memory
