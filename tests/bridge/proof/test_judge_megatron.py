"""`validate --source` of a real `GPTModel` that is wrong in places, as megatron-core saves it."""

from pathlib import Path

import pytest
import torch
from support.checkpoints import edit_config, edit_tensors
from support.conversions import imported_from
from support.wrong_conversions import EXPERTS, GROUPS, LAYERS, PER_GROUP, SIZES, WIDTH
from torch import Tensor

from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.proof.judge_checkpoint import judge_checkpoint

LAYER = "decoder.layers.1."
QKV, PROJECTION = f"{LAYER}self_attention.linear_qkv.weight", f"{LAYER}self_attention.linear_proj.weight"
FC1, FC2 = (f"{LAYER}mlp.experts.local_experts.3.linear_fc{one}.weight" for one in (1, 2))
NORM, ROUTER, BIAS = f"{LAYER}pre_mlp_layernorm.weight", f"{LAYER}mlp.router.weight", f"{LAYER}mlp.router.expert_bias"


def concatenated(qkv: Tensor) -> Tensor:
    """[q; k; v] of what is in the order of the groups."""
    heads = qkv.split(WIDTH)
    groups = [heads[g * (PER_GROUP + 2) : (g + 1) * (PER_GROUP + 2)] for g in range(GROUPS)]
    return torch.cat(
        [head for kind in (slice(0, PER_GROUP), slice(-2, -1), slice(-1, None)) for g in groups for head in g[kind]]
    )


def plant(state: dict[str, Tensor]) -> None:
    half, columns = len(state[FC1]) // 2, state[FC2].shape[1] // 2
    state[QKV].copy_(concatenated(state[QKV]))
    state[FC1].copy_(torch.cat((state[FC1][half:], state[FC1][:half])))
    state[FC2].copy_(torch.cat((state[FC2][:, columns:], state[FC2][:, :columns]), 1))
    state[PROJECTION].copy_(state[PROJECTION].T.clone())
    state[NORM] -= 1
    state[ROUTER].copy_(state[ROUTER].to(torch.bfloat16))
    state[BIAS].zero_()


def test_mistakes_in_what_megatron_saves_are_named(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    from bridge import MiniMaxM2Bridge, model_parallel

    make_checkpoint(tmp_path / "original", SIZES)
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(tmp_path / "original") as checkpoint, torch.no_grad():
        model = checkpoint.to_megatron_model(params_dtype=torch.bfloat16)
        for folder, change in (("right", lambda state: None), ("wrong", plant)):
            change(dict(model.state_dict()))
            (tmp_path / folder).mkdir()
            dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path / folder))
    assert judge_checkpoint(tmp_path / "right", tmp_path / "original").holds
    found = judge_checkpoint(tmp_path / "wrong", tmp_path / "original")
    assert found.unexplained is None
    assert {one.name: one.tensors for one in found.findings} == {
        "qkv_concatenated": 3,
        "gate_up_swapped": 2,
        "shards_swapped": 1,
        "transposed": 1,
        "norm_shifted": 1,
        "router_narrowed": 1,
        "bias_lost": 1,
    }


@pytest.mark.parametrize(
    ("size", "has", "removed", "beyond", "extra"),
    [
        ("num_hidden_layers", LAYERS, f".layers.{LAYERS - 1}.", f"[{LAYERS - 1}:{LAYERS}]", 10),
        ("num_local_experts", EXPERTS, f".experts.{EXPERTS - 1}.", f"[:, {EXPERTS - 1}:{EXPERTS}]", 2),
    ],
)
def test_layers_and_experts_beyond_the_models_are_extra(
    size: str, has: int, removed: str, beyond: str, extra: int, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    make_checkpoint(original, SIZES)
    target = imported_from(original, tmp_path / "megatron")
    edit_config(original, lambda config: config.update({size: has - 1}))
    edit_tensors(original, lambda tensors: [tensors.pop(name) for name in list(tensors) if removed in name])
    if size == "num_local_experts":
        edit_tensors(original, lambda tensors: tensors.update(_routers(tensors)))
    found = {one.name: one for one in judge_checkpoint(target, original).findings}
    assert found["extra"].tensors == extra
    assert found["extra"].worst.endswith(beyond)


def _routers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one expert fewer."""
    return {n: v[:-1].clone() for n, v in tensors.items() if n.endswith((".gate.weight", "score_correction_bias"))}
