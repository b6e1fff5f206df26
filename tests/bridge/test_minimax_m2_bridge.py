"""Checkpoints through a real megatron-core GPTModel and back, through the bridge's public API."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import EDGY_CONFIG, GATE, Q, all_tensors, edit_config, edit_tensors
from support.small_model import DEVICE
from torch import Tensor

from bridge import MiniMaxM2Bridge
from bridge.huggingface.random_checkpoint import SMALL_CONFIG, make_checkpoint
from bridge.model.layer_spec import default_backend
from bridge.model.process_groups import model_parallel
from bridge.proof.transformers_logits import transformers_logits
from reference.fp8 import dequantize_blockwise
from reference.weights import Dialect


@pytest.fixture
def bridge(checkpoint: Path) -> Iterator[MiniMaxM2Bridge]:
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(checkpoint) as bridge:
        yield bridge


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def differing(left: dict[str, Tensor], right: dict[str, Tensor]) -> set[str]:
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(raw(left[name]), raw(right[name]))}


@pytest.mark.parametrize("params_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantization_config": {**EDGY_CONFIG["quantization_config"], "weight_block_size": [64, 64]}},
        {"quantization_config": {**EDGY_CONFIG["quantization_config"], "modules_to_not_convert": ["gate", "v_proj"]}},
        {"num_key_value_heads": 6, "num_experts_per_tok": 1},
        {"num_key_value_heads": 1, "rotary_dim": 48},
    ],
    ids=["edge blocks", "blocks of 64", "v not quantised", "1:1 heads", "one group"],
)
def test_untouched_checkpoint_comes_back_byte_identical(
    tmp_path: Path, changes: dict, params_dtype: torch.dtype
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, EDGY_CONFIG | changes, seed=3, mtp_layers=1)
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(source) as bridge:
        model = bridge.to_megatron_model(params_dtype=params_dtype)
        bridge.save_hf_pretrained(model, out, max_shard_bytes=100_000)
    assert differing(all_tensors(source), all_tensors(out)) == set()
    assert len(list(out.glob("*.safetensors"))) > 3
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (source / file).read_bytes()


def test_logits_equal_transformers(tmp_path: Path) -> None:
    """`transformers` opens the same files, dequantises by itself, and computes the same; float32 against its error."""
    make_checkpoint(tmp_path / "source", SMALL_CONFIG | {"num_hidden_layers": 2}, seed=1)
    tokens = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(1))
    theirs = transformers_logits(tmp_path / "source", tokens)
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(tmp_path / "source") as bridge, torch.no_grad():
        model = bridge.to_megatron_model(params_dtype=torch.float32).eval()
        ours = model(tokens.to(DEVICE), torch.arange(24, device=DEVICE).expand(2, -1), None).cpu()
    # Both round every operation to float32. Relative rounding errors of 2^-24 accumulate over about 30 operations a
    # layer in depth, each mixing independent errors: sqrt(2 layers x 30) x 2^-24 x sqrt(2) for the difference, x4.
    bound = 4 * (2 * 2 * 30) ** 0.5 * 2**-24
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"relative difference {error:.2e}, bound {bound:.2e}")
    assert error < bound


def test_changed_block_gets_a_fresh_scale_and_nothing_else_changes(
    bridge: MiniMaxM2Bridge, checkpoint: Path, tmp_path: Path
) -> None:
    model = bridge.to_megatron_model()
    mapping = bridge.mapping_registry().hf_to_megatron_lookup(Q)
    with torch.no_grad():
        weight = model.get_parameter(mapping.megatron_param)
        parts = mapping.megatron_to_hf(weight)
        updated = parts[Q].clone()
        updated[130:134, 0:8] += torch.linspace(-3, 3, 32, dtype=torch.bfloat16, device=DEVICE).view(4, 8)
        weight.copy_(mapping.hf_to_megatron({**parts, Q: updated}))
        updated = updated.cpu()
    bridge.save_hf_pretrained(model, tmp_path / "out")
    before, after = all_tensors(checkpoint), all_tensors(tmp_path / "out")
    assert differing(before, after) == {Q, Q + "_scale_inv"}
    scales = after[Q + "_scale_inv"] != before[Q + "_scale_inv"]
    assert scales.nonzero().tolist() == [[1, 0]]
    assert after[Q + "_scale_inv"][1, 0] == updated[128:256, 0:128].abs().max().float() / 448
    decoded = dequantize_blockwise(after[Q], after[Q + "_scale_inv"], dtype=torch.float32)
    # e4m3 rounds to 4 significant bits (half a unit: 2^-4 relative), or to multiples of 2^-9 below 2^-6.
    bound = 2**-4 * updated.float().abs() + 2**-10 * after[Q + "_scale_inv"][1, 0]
    assert (decoded - updated.float()).abs().le(bound).all()


def test_router_stays_float32_and_exact_in_a_bfloat16_model(bridge: MiniMaxM2Bridge, checkpoint: Path) -> None:
    model = bridge.to_megatron_model(params_dtype=torch.bfloat16).bfloat16()
    router = model.decoder.layers[0].mlp.router
    tensors = all_tensors(checkpoint)
    assert not torch.equal(tensors[GATE], tensors[GATE].bfloat16().float()), "the weight must need float32"
    assert torch.equal(router.weight.cpu(), tensors[GATE])
    assert torch.equal(router.expert_bias.cpu(), tensors["model.layers.0.block_sparse_moe.e_score_correction_bias"])
    assert {p.dtype for name, p in model.named_parameters() if "router" not in name} == {torch.bfloat16}


def test_export_is_lazy_complete_and_dequantised(bridge: MiniMaxM2Bridge, checkpoint: Path) -> None:
    model = bridge.to_megatron_model()
    stream = bridge.export_hf_weights(model, device="cpu")
    assert isinstance(stream, Iterator)
    exported = dict(stream)
    disk = {name: value for name, value in all_tensors(checkpoint).items() if name not in bridge.checkpoint.mtp_tensors}
    assert exported.keys() == {name for name in disk if not name.endswith("_scale_inv")}
    for name, value in exported.items():
        scale = disk.get(name + "_scale_inv")
        assert torch.equal(value, disk[name] if scale is None else dequantize_blockwise(disk[name], scale)), name


def test_bfloat16_export_and_back_to_fp8(bridge: MiniMaxM2Bridge, checkpoint: Path, tmp_path: Path) -> None:
    model = bridge.to_megatron_model()
    bridge.save_hf_pretrained(model, tmp_path / "bf16", quantization=None)
    written, source = all_tensors(tmp_path / "bf16"), all_tensors(checkpoint)
    config = json.loads((tmp_path / "bf16/config.json").read_text())
    expected = {key: value for key, value in EDGY_CONFIG.items() if key != "quantization_config"}
    assert config == expected
    assert not [name for name in written if name.endswith("_scale_inv")]
    assert written[Q].dtype == torch.bfloat16
    assert torch.equal(written[Q], dequantize_blockwise(source[Q], source[Q + "_scale_inv"]))
    assert torch.equal(written[GATE], source[GATE])

    with MiniMaxM2Bridge.from_hf_pretrained(tmp_path / "bf16") as unquantised:
        again = unquantised.to_megatron_model()
        unquantised.save_hf_pretrained(again, tmp_path / "fp8", quantization="fp8")
    with MiniMaxM2Bridge.from_hf_pretrained(tmp_path / "fp8") as requantised:
        assert requantised.config == bridge.config
        fresh = requantised.checkpoint.files.read(Q + "_scale_inv")
    assert fresh[0, 0] == written[Q][:128, :128].abs().max().float() / 448


def test_unquantised_checkpoint_comes_back_byte_identical(bridge: MiniMaxM2Bridge, tmp_path: Path) -> None:
    bridge.save_hf_pretrained(bridge.to_megatron_model(), tmp_path / "bf16", quantization=None)
    with MiniMaxM2Bridge.from_hf_pretrained(tmp_path / "bf16") as plain:
        plain.save_hf_pretrained(plain.to_megatron_model(), tmp_path / "again", quantization=None)
    assert differing(all_tensors(tmp_path / "bf16"), all_tensors(tmp_path / "again")) == set()
    assert (tmp_path / "bf16/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()


def test_both_config_dialects_load_the_same_model(copy: Path, bridge: MiniMaxM2Bridge) -> None:
    def rewrite(config: dict) -> None:
        theta, rotary = config.pop("rope_theta"), config.pop("rotary_dim")
        config["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": theta,
            "partial_rotary_factor": rotary / config["head_dim"],
        }

    edit_config(copy, rewrite)
    with MiniMaxM2Bridge.from_hf_pretrained(copy) as other:
        assert other.config == bridge.config


def test_mtp_layers_are_listed_and_carried(bridge: MiniMaxM2Bridge, checkpoint: Path, tmp_path: Path) -> None:
    assert bridge.checkpoint.mtp_tensors == ["model.layers.2.enorm.weight", "model.layers.2.hnorm.weight"]
    bridge.save_hf_pretrained(bridge.to_megatron_model(), tmp_path / "out", quantization=None)
    before, after = all_tensors(checkpoint), all_tensors(tmp_path / "out")
    assert all(torch.equal(raw(before[name]), raw(after[name])) for name in bridge.checkpoint.mtp_tensors)


def test_weights_are_dequantised_by_name(bridge: MiniMaxM2Bridge, checkpoint: Path) -> None:
    disk = all_tensors(checkpoint)
    parts = {"q": Q, "gate": GATE}
    read = bridge.maybe_modify_loaded_hf_weight(parts, disk, dtype=torch.float32)
    assert torch.equal(read["q"], dequantize_blockwise(disk[Q], disk[Q + "_scale_inv"], dtype=torch.float32))
    assert torch.equal(read["gate"], disk[GATE])
    assert torch.equal(bridge.maybe_modify_loaded_hf_weight(Q, disk), bridge.checkpoint.read_weight(Q))
    with pytest.raises(ValueError, match=f"{Q}: float8 without its scales"):
        bridge.maybe_modify_loaded_hf_weight(Q, {Q: disk[Q]})
    with pytest.raises(ValueError, match=f"{Q}: missing"):
        bridge.maybe_modify_loaded_hf_weight(Q, {})


def test_registry_covers_the_model_in_both_directions(bridge: MiniMaxM2Bridge, checkpoint: Path) -> None:
    registry = bridge.mapping_registry(Dialect.MEGATRON_TE)
    qkv = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert registry.hf_to_megatron_lookup(Q).megatron_param == qkv
    assert Q in registry.megatron_to_hf_lookup(qkv).hf_params
    plain = {name for name in all_tensors(checkpoint) if not name.endswith("_scale_inv")} - set(
        bridge.checkpoint.mtp_tensors
    )
    assert {name for mapping in registry for name in mapping.hf_params} == plain
    with pytest.raises(ValueError, match=r"decoder.layers.2.mlp.router.weight: this rank holds no such parameter"):
        registry.megatron_to_hf_lookup("decoder.layers.2.mlp.router.weight")
    with pytest.raises(ValueError, match=r"model.layers.7.input_layernorm.weight: no parameter"):
        registry.hf_to_megatron_lookup("model.layers.7.input_layernorm.weight")


def test_model_of_other_sizes_is_refused_before_it_is_changed(bridge: MiniMaxM2Bridge, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "wider", EDGY_CONFIG | {"intermediate_size": 80})
    make_checkpoint(tmp_path / "deeper", EDGY_CONFIG | {"num_hidden_layers": 3})
    number = "0" if default_backend() == "transformer_engine" else ""  # of the expert, in the parameter's name
    for name, error in (
        ("wider", rf"linear_fc1.weight{number}: found shape \[160, 160\], expected \[144, 160\]"),
        ("deeper", r"the stages of the model hold layers \[0, 1, 2\], expected 0 to 1 in this order"),
    ):
        with MiniMaxM2Bridge.from_hf_pretrained(tmp_path / name) as other:
            model = other.to_megatron_model()
        before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
        with pytest.raises(ValueError, match=error):
            bridge.load_hf_weights(model)
        with pytest.raises(ValueError, match=error):
            bridge.save_hf_pretrained(model, tmp_path / "out")
        assert all(torch.equal(before[key], model.state_dict()[key]) for key in before)
    with pytest.raises(ValueError, match="found a Linear, expected megatron-core's GPTModel or HybridModel"):
        bridge.load_hf_weights(torch.nn.Linear(2, 2))
    assert not (tmp_path / "out").exists()


def test_output_choices_are_checked_before_anything_is_written(
    bridge: MiniMaxM2Bridge, checkpoint: Path, tmp_path: Path
) -> None:
    model = bridge.to_megatron_model()
    with pytest.raises(ValueError, match="quantization must be 'fp8' or None, found 'int4'"):
        bridge.save_hf_pretrained(model, tmp_path / "out", quantization="int4")
    with pytest.raises(ValueError, match="which is read; write elsewhere"):
        bridge.save_hf_pretrained(model, checkpoint, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_damaged_source_leaves_no_output(copy: Path, tmp_path: Path) -> None:
    """The weights are fine when loaded; a scale goes bad before the export needs it."""
    edit_tensors(copy, lambda t: None)
    with model_parallel(), MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge:
        model = bridge.to_megatron_model()
        edit_tensors(copy, lambda t: t[Q + "_scale_inv"].fill_(-1))
        with pytest.raises(ValueError, match="changed while"):
            bridge.save_hf_pretrained(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_no_network_for_local_folders_and_a_clear_error_for_the_rest(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        MiniMaxM2Bridge.from_hf_pretrained(tmp_path / "nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="MiniMaxAI/MiniMax-M2-no-such: no such local folder, and the hub"):
        MiniMaxM2Bridge.from_hf_pretrained("MiniMaxAI/MiniMax-M2-no-such")
