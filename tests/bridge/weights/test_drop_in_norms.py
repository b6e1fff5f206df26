"""Our norms in the norm slots of megatron-core's own attention: such models are loaded, exported and saved like ours.

On four gloo ranks. The truth is the files: both norms' weights lie whole on every rank, every other parameter is what
the model of our own layer spec has, and what comes out has the bytes of what went in.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import all_tensors
from support.ranks import RankPool
from support.sharded_models import groups_of, truth_of
from torch import Tensor, distributed, nn

from reference.model_class import ModelClass
from reference.parallelism import Parallelism, padded_vocab_size, spread_layers

WORLD = 4
LAYOUTS = {
    "tp1 ep2": Parallelism(ep=2, dp=4),
    "tp2 ep2": Parallelism(tp=2, ep=2, etp=1, dp=2),
    "tp4, 2 key heads": Parallelism(tp=4, ep=4, etp=1),
    "tp2 pp2": Parallelism(tp=2, pp=2, ep=2, etp=1, layers_per_stage=spread_layers(5, 2)),
}
SLOTS = {"q_layernorm": "q_norm", "k_layernorm": "k_norm"}  # of attention: of the files
ROUTER = "block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


@pytest.mark.parametrize("kind", ModelClass)
@pytest.mark.parametrize("name", LAYOUTS)
def test_they_are_loaded_and_give_back_every_byte(
    ranks: RankPool, wide_checkpoint: Path, tmp_path: Path, name: str, kind: ModelClass
) -> None:
    ranks.call(_load_and_give_back, name, kind, str(wide_checkpoint), str(tmp_path / "out"))


def test_megatron_cores_own_spec_with_them(ranks: RankPool, wide_checkpoint: Path, tmp_path: Path) -> None:
    """The README's. Its router keeps its weight in `params_dtype`, so only a float32 model keeps that weight's bits."""
    ranks.call(_megatron_cores_own, str(wide_checkpoint), str(tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------- on every rank


def _load_and_give_back(name: str, kind: ModelClass, folder: str, out: str) -> None:
    from bridge import MiniMaxM2Bridge
    from bridge.weights.sharded_model import sharded_model

    layout, truth = LAYOUTS[name], truth_of(folder)
    with groups_of(layout), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        ours = sharded_model(bridge.to_megatron_model(model=kind), bridge.config)
        model = _with_drop_in(kind, bridge, layout)
        bridge.load_hf_weights(model)
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        norms = {name for name in state if "_layernorm.weight" in name and "self_attention" in name}
        assert len(norms) == 2 * len(layout.stages(bridge.config)[layout.coordinates(distributed.get_rank()).pp])
        first = layout.stages(bridge.config)[layout.coordinates(distributed.get_rank()).pp].start
        for norm in norms:
            layer = int(norm.split(".")[2]) // (2 if kind is ModelClass.HYBRID else 1) + first
            slot = norm.split(".")[4]
            assert torch.equal(state[norm], truth.whole[f"model.layers.{layer}.self_attn.{SLOTS[slot]}.weight"])
        others = {name: value for (_, name), value in ours.state.items() if ".qk_norm." not in name}
        assert others.keys() == state.keys() - norms
        assert all(torch.equal(state[name], value) for name, value in others.items())
        _check_given_back(bridge, model, truth.disk, Path(out))


def _check_given_back(bridge, model: nn.Module, disk: dict[str, Tensor], out: Path) -> None:
    for to in ("all", "spread"):
        exported = list(bridge.export_hf_weights(model, "source", to=to))
        for name, value in exported:
            assert _same(value, disk[name]), (to, name)
        names = {name for name, _ in exported}
        gathered: list[Any] = [None] * WORLD
        distributed.all_gather_object(gathered, names)
        assert set().union(*gathered) == disk.keys() - set(bridge.checkpoint.mtp_tensors)
    bridge.save_hf_pretrained(model, out, max_shard_bytes=1_000_000)
    saved = all_tensors(out)
    assert saved.keys() == disk.keys()
    assert all(_same(saved[name], value) for name, value in disk.items())


def _megatron_cores_own(folder: str, out: str) -> None:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from bridge import FullDimKNorm, FullDimQNorm, MiniMaxM2Bridge

    disk = truth_of(folder).disk
    layout = LAYOUTS["tp4, 2 key heads"]
    with groups_of(layout), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        for dtype in (torch.float32, torch.bfloat16):
            provider = bridge.provider_bridge(
                params_dtype=dtype,
                tensor_model_parallel_size=layout.tp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=1,
                sequence_parallel=False,  # torch's norm refuses it
            )
            layer: Any = get_gpt_layer_local_spec(num_experts=4, qk_layernorm=True, normalization="RMSNorm")
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm, attention.k_layernorm = FullDimQNorm, FullDimKNorm
            model = GPTModel(
                provider.transformer_config, layer, **_padded(provider.gpt_model_arguments, bridge, layout)
            )
            bridge.load_hf_weights(model)
            if dtype == torch.float32:
                _check_given_back(bridge, model, disk, Path(out))
            else:
                exported = dict(bridge.export_hf_weights(model, "source"))
                differ = {name for name, value in exported.items() if not _same(value, disk[name])}
                assert differ == {name for name in exported if name.endswith(ROUTER)}
                assert all(torch.equal(exported[name], disk[name].bfloat16().float()) for name in differ)


def _with_drop_in(kind: ModelClass, bridge, layout: Parallelism) -> nn.Module:
    """megatron-core's own attention in our layer spec."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.attention import SelfAttention

    from bridge import FullDimKNorm, FullDimQNorm, minimax_m2_block_spec, minimax_m2_hybrid_spec
    from bridge.model.build import _gpt_stages

    stages = _gpt_stages(bridge.config, layout) if kind is ModelClass.GPT else {}
    provider = bridge.provider_bridge(
        model=kind,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        sequence_parallel=layout.tp > 1,
        **stages,
    )
    ends = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    config = provider.transformer_config
    spec: Any
    if kind is ModelClass.GPT:
        spec = minimax_m2_block_spec(config, "local")
        attentions = [layer.submodules.self_attention for layer in spec.layer_specs]
    else:
        spec = minimax_m2_hybrid_spec(config, "local")
        attentions = [spec.submodules.attention_layer.submodules.self_attention]
    for attention in attentions:
        attention.module = SelfAttention
        attention.submodules.q_layernorm, attention.submodules.k_layernorm = FullDimQNorm, FullDimKNorm
    arguments = _padded(provider[1], bridge, layout)
    if kind is ModelClass.GPT:
        return GPTModel(config, spec, **arguments, **ends)
    return HybridModel(config, spec, **arguments, **ends)


def _padded(arguments: dict[str, Any], bridge, layout: Parallelism) -> dict[str, Any]:
    return arguments | {"vocab_size": padded_vocab_size(bridge.config, layout)}


def _same(one: Tensor, other: Tensor) -> bool:
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
