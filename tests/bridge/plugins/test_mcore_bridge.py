"""The plug-in for mcore-bridge, in the real host on gloo ranks: models built, loaded, trained and saved by its own API.

Logits, gradients and weights after three steps are those of `bridge.build_model`, bit for bit, whose gradients
`test_training.py` holds against `transformers`; here too, at one layout. Files are compared byte by byte.

The host imports Transformer Engine and does not start without it, but needs no GPU.
"""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import SCALE, all_tensors
from support.megatron_training import CASE, Setup, settled_batches, train, weights_of
from support.oracles import FLOAT32, FLOAT64, hf_model, remove_float32_casts, to_disk_names
from support.ranks import RankPool
from support.sharded_models import CONFIG, groups_of
from torch import Tensor, distributed, nn

from bridge.huggingface.random_checkpoint import make_checkpoint
from reference.parallelism import Parallelism
from reference.sharding import placements, unshard

pytestmark = [
    pytest.mark.plugins,
    pytest.mark.skipif(
        find_spec("mcore_bridge") is None or find_spec("transformer_engine") is None,
        reason="needs mcore-bridge, and Transformer Engine, which it imports",
    ),
]

WORLD = 2
LAYOUTS = {
    "one rank": Parallelism(dp=2),
    "tp2": Parallelism(tp=2, etp=1),
    "tp2 ep2": Parallelism(tp=2, ep=2, etp=1),
    "pp2": Parallelism(pp=2),
}
DEPTH = {"num_hidden_layers": 2}
HF_CASE = CASE.released_config() | {"scoring_func": "sigmoid", "use_qk_norm": True}
Q_NORM, K_PROJ = "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_proj.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in FP8 and in bfloat16, both with an MTP layer."""
    folder = tmp_path_factory.mktemp("sources")
    config = CONFIG | DEPTH
    make_checkpoint(folder / "fp8", config, seed=5, mtp_layers=1, max_shard_bytes=2_000_000)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    make_checkpoint(folder / "bf16", plain, seed=5, mtp_layers=1)
    return {name: folder / name for name in ("fp8", "bf16")}


@pytest.fixture(scope="module")
def batches() -> Tensor:
    return settled_batches(CASE)


def host_config(hf: dict[str, Any] | Path, **overrides: Any) -> Any:
    """mcore-bridge's config of a config.json, or of a checkpoint's folder, for the groups that there are."""
    from mcore_bridge import ModelConfig, hf_to_mcore_config
    from megatron.core import parallel_state
    from transformers import AutoConfig, MiniMaxM2Config

    import bridge.plugins.mcore_bridge  # noqa: F401  # registers
    from bridge.model.config import CPU_OVERRIDES

    tp = parallel_state.get_tensor_model_parallel_world_size()
    groups = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
    cpu = {**CPU_OVERRIDES, "moe_grouped_gemm": False, "transformer_impl": "local", "variable_seq_lengths": False}
    one_stage_each = {"overlap_p2p_comm": False, "batch_p2p_comm": True}  # as ms-swift has it without virtual stages
    hf_config = AutoConfig.from_pretrained(hf) if isinstance(hf, Path) else MiniMaxM2Config(**hf)
    return ModelConfig(**{**hf_to_mcore_config(hf_config), **cpu, **one_stage_each, **groups, **overrides})


def host_model(hf: dict[str, Any] | Path, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> list[nn.Module]:
    """This rank's chunks, with random weights or none."""
    from mcore_bridge import get_mcore_model

    return get_mcore_model(host_config(hf, params_dtype=dtype, bf16=dtype == torch.bfloat16, **overrides))


# ------------------------------------------------------------------------------------------------- logits and training


def _host_chunks(setup: Setup, dtype: torch.dtype) -> list[nn.Module]:
    from megatron.core.distributed import finalize_model_grads

    return host_model(
        HF_CASE,
        dtype,
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,
        finalize_model_grads_func=partial(finalize_model_grads, force_all_reduce=True),
    )


def _trained(layout: Parallelism, batches: Tensor) -> tuple[dict, dict]:
    """By the host's model, and by ours."""
    setup = Setup(CASE, layout)
    return train(setup, FLOAT32, batches, _host_chunks), train(setup, FLOAT32, batches)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_that_of_build_model(ranks: RankPool, batches: Tensor, name: str) -> None:
    for theirs, ours in ranks.call(_trained, LAYOUTS[name], batches):
        assert theirs["losses"] == ours["losses"]
        assert theirs["norms"] == ours["norms"]
        for what in ("grads", "weights"):
            assert theirs[what].keys() == ours[what].keys()
            assert ours[what]
            assert [key for key, value in ours[what].items() if not torch.equal(value, theirs[what][key])] == []


def test_gradients_equal_transformers(ranks: RankPool, batches: Tensor) -> None:
    """Of two tensor- and expert-parallel ranks, against one process in float64."""
    layout = LAYOUTS["tp2 ep2"]
    found = [theirs["grads"] for theirs, _ in ranks.call(_trained, layout, batches)]
    values = {(rank, *key): value for rank, grads in enumerate(found) for key, value in grads.items()}
    placed = placements({rank: Setup(CASE, layout).held(rank) for rank in range(WORLD)})
    weights = {name: value.double() for name, value in weights_of(CASE, FLOAT32).items()}
    with pytest.MonkeyPatch.context() as patch:
        remove_float32_casts(patch)
        model = hf_model(CASE, weights, FLOAT64)
        sum(model(batch, labels=batch).loss / len(batches) for batch in batches).backward()
    exact = to_disk_names({name: parameter.grad for name, parameter in model.named_parameters()})
    assert {Q_NORM, K_PROJ} <= exact.keys()
    for name, truth in exact.items():
        error = (unshard(placed[name], values).double() - truth).norm() / truth.norm()
        assert error < 1e-5, name  # float32's roundings; the norm's missing backward all-reduce makes 0.9 to 20 %


# ------------------------------------------------------------------------------------------------------------- weights


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def _load_and_give_back(layout: Parallelism, source: str, out: str) -> None:
    """Loaded, its logits are those of our model; exported and saved, its bytes are the source's."""
    from bridge import MiniMaxM2Bridge

    with groups_of(layout), MiniMaxM2Bridge.from_hf_pretrained(source) as ours:
        model = host_model(Path(source))
        weights = model[0].config.bridge
        weights.load_weights(model, source)
        if layout.pp == 1:
            tokens = torch.arange(16).view(2, 8)
            assert torch.equal(_logits(model[0], tokens), _logits(ours.to_megatron_model(), tokens))
        disk = all_tensors(Path(source))
        exported = dict(weights.export_weights(model, target_device="cpu"))
        carried = set(ours.checkpoint.carried_tensors)
        assert exported.keys() == disk.keys() - carried
        assert carried
        assert all(torch.equal(value, disk[name]) for name, value in exported.items())
        to_master = dict(weights.export_weights(model, only_master_rank=True))
        assert to_master.keys() == (exported.keys() if distributed.get_rank() == 0 else set())
        weights.save_weights(model, out)


def _bytes(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (x.dtype, x.view(torch.uint8).numpy().tobytes()) for name, x in all_tensors(folder).items()}


@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_comes_back_byte_for_byte(
    ranks: RankPool, sources: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    out = tmp_path / "checkpoint-1"
    out.mkdir()
    (out / "args.json").write_text("{}")  # a trainer's own files are there already
    ranks.call(_load_and_give_back, LAYOUTS[name], str(sources[kind]), str(out))
    assert _bytes(out) == _bytes(sources[kind])
    beside = {"config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert all((out / file).read_bytes() == (sources[kind] / file).read_bytes() for file in beside)
    found = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert found == beside | {"args.json", "model.safetensors.index.json"}


def _save_changed(source: str, out: str) -> None:
    """One weight is trained; a second source is not needed, nor that the model was loaded by this bridge."""
    with groups_of(LAYOUTS["tp2"]):
        model = host_model(Path(source))
        first, second = model[0].config.bridge, host_config(Path(source)).bridge
        first.load_weights(model, source)
        with torch.no_grad():
            model[0].decoder.layers[1].self_attention.linear_proj.weight.mul_(1.5)
        second.save_weights(model, out, save_missing_weights=source)


def test_only_what_was_trained_is_encoded_anew(ranks: RankPool, sources: dict[str, Path], tmp_path: Path) -> None:
    ranks.call(_save_changed, str(sources["fp8"]), str(tmp_path / "out"))
    before, after = _bytes(sources["fp8"]), _bytes(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {O_PROJ, O_PROJ + SCALE}
    assert before[O_PROJ + SCALE] != after[O_PROJ + SCALE]


def test_a_converter_renames_what_is_exported(alone: None, sources: dict[str, Path]) -> None:
    model = host_model(sources["bf16"])
    weights = model[0].config.bridge
    weights.load_weights(model, str(sources["bf16"]))
    exported = dict(
        weights.export_weights(model, converter=lambda name, x: (f"hf.{name}", x) if name == Q_NORM else None)
    )
    assert list(exported) == [f"hf.{Q_NORM}"]
    for call in (partial(weights.load_weights, model), partial(weights.save_weights, model)):
        with pytest.raises(ValueError, match="converter is given"):
            call(str(sources["bf16"]), converter=lambda name, x: (name, x))


# ---------------------------------------------------------------------------------------------------- one rank, in here


@pytest.fixture
def alone() -> Iterator[None]:
    from bridge.model.process_groups import model_parallel

    with model_parallel():
        yield


def test_the_rotation_is_the_stated_one_where_transformers_ignores_it(alone: None, sources: dict[str, Path]) -> None:
    """transformers 5.12 reads `rotary_dim` as an unknown key, and mcore-bridge not at all: it rotates every channel."""
    from reference.rope import inverse_frequencies

    (model,) = host_model(sources["fp8"])
    assert torch.equal(model.rotary_pos_emb.inv_freq, inverse_frequencies(CONFIG["rotary_dim"], CONFIG["rope_theta"]))


def test_packed_tokens_rotate_by_their_own_positions(alone: None) -> None:
    """The host looks the angles up by `position_ids`: each sequence's heads are those of that sequence alone."""
    (model,) = host_model(HF_CASE, FLOAT32, perform_initialization=True)
    attention = model.decoder.layers[0].self_attention
    lengths = (5, 4, 7)
    hidden = torch.randn(sum(lengths), 1, CASE.hidden, generator=torch.Generator().manual_seed(0))
    table = model.rotary_pos_emb(max(lengths))

    def heads(rows: Tensor, angles: Tensor, packed: Any) -> tuple[Tensor, ...]:
        attention._angles, attention._packed = angles, packed
        return attention.get_query_key_value_tensors(rows)

    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, 5, 9, 16], dtype=torch.int32)
    packed = SimpleNamespace(cu_seqlens_q=cu_seqlens, cu_seqlens_q_padded=None, cp_group=None, local_cp_size=None)
    together = heads(hidden, table[positions], packed)
    each = [heads(rows, table[: len(rows)], None) for rows in hidden.split(lengths)]
    for found, alone_ in zip(together, zip(*each, strict=True), strict=True):
        assert torch.equal(found, torch.cat(alone_))


def _adapted(model: nn.Module) -> nn.Module:
    """LoRA on one weight, by peft's own wrapper, which goes around any module, and one module trained whole."""
    from peft import LoraConfig, get_peft_model

    model.config.to_dict = dict  # peft asks a transformers config for it
    lora = LoraConfig(
        r=2,
        target_modules=[],
        target_parameters=["layers.1.self_attention.linear_proj.weight"],
        modules_to_save=["final_layernorm"],
        init_lora_weights=False,
    )
    return get_peft_model(model, lora)


def test_adapters_are_merged_into_what_is_saved(alone: None, sources: dict[str, Path], tmp_path: Path) -> None:
    model = host_model(sources["fp8"])
    weights = model[0].config.bridge
    weights.load_weights(model, str(sources["fp8"]))
    adapted = _adapted(model[0])
    weights.load_weights([adapted], str(sources["fp8"]))  # under wrappers too
    with torch.no_grad():
        adapted.base_model.model.decoder.final_layernorm.modules_to_save["default"].weight.add_(1)
    with pytest.raises(ValueError, match=r"linear_proj: has an adapter that is not merged"):
        weights.save_weights([adapted], str(tmp_path / "lost"))
    assert not (tmp_path / "lost").exists()
    adapted.merge_adapter()
    weights.save_weights([adapted], str(tmp_path / "merged"))
    before, after = _bytes(sources["fp8"]), _bytes(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {O_PROJ + SCALE} == {O_PROJ, "model.norm.weight"}
    assert any("lora_A" in name for name, _ in adapted.named_parameters()), "the wrappers are back"


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("stated", "overrides", "message"),
    [
        ({"scoring_func": "softmax"}, {}, "scoring_func is 'softmax', but only 'sigmoid' is supported"),
        (
            {},
            {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
            "moe_router_score_function is 'softmax' in mcore-bridge's config.*has 'sigmoid': pass",
        ),
        ({}, {"qk_layernorm": False}, "qk_layernorm is False in mcore-bridge's config.*has True"),
        ({}, {"num_query_groups": 4}, "num_query_groups is 4.*has 2"),
        ({}, {"hf_config": None}, "hf_config is None, expected the model's transformers config"),
        ({}, {"task_type": "seq_cls"}, "task_type is 'seq_cls', expected 'causal_lm'"),
        ({}, {"mtp_num_layers": 1}, "mtp_num_layers is 1, expected None: MTP layers are not trained"),
        ({"rotary_dim": None}, {}, "gives neither rotary_dim nor"),
    ],
)
def test_another_model_is_refused(alone: None, stated: dict[str, Any], overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        host_model(HF_CASE | stated, FLOAT32, **overrides)


def test_another_architecture_is_refused(alone: None) -> None:
    """A config of another model under this model's type."""
    from transformers import Qwen3MoeConfig

    config = host_config(HF_CASE)
    config.hf_config = Qwen3MoeConfig()
    with pytest.raises(ValueError, match="model_type is 'qwen3_moe', but only 'minimax_m2' is supported"):
        type(config.model_meta.loader(host_config(HF_CASE)))(config)


def test_a_source_is_needed(alone: None, tmp_path: Path) -> None:
    model = host_model(HF_CASE)
    with pytest.raises(ValueError, match="no source checkpoint is known"):
        model[0].config.bridge.save_weights(model, str(tmp_path / "out"))


@pytest.mark.parametrize("size", ["5MB", "0GB", "GB", "1.5GB"])
def test_a_shard_size_is_in_gigabytes(alone: None, sources: dict[str, Path], tmp_path: Path, size: str) -> None:
    model = host_model(sources["bf16"])
    model[0].config.bridge.load_weights(model, str(sources["bf16"]))
    with pytest.raises(ValueError, match="max_shard_size must be a whole number of GB"):
        model[0].config.bridge.save_weights(model, str(tmp_path / "out"), max_shard_size=size)
