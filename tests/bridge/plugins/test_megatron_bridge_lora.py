"""LoRA of megatron-bridge on our model, on two gloo ranks: gradients, the merged FP8 export, the adapter in `peft`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.checkpoints import SCALE
from support.forks import server_of
from support.megatron_bridge import make_folder
from support.megatron_bridge_lora import (
    ATTENTION,
    BATCH,
    EXPERTS,
    IN,
    OUT,
    SEQ,
    adapter_gradients,
    merge_and_export,
    merged,
    train_adapters,
)
from support.oracles import (
    FLOAT32,
    FLOAT64,
    Case,
    disk_weights,
    hf_model,
    remove_float32_casts,
    settled_tokens,
    to_disk_names,
)
from support.ranks import RankError, RankPool
from support.sharded_models import truth_of
from torch import Tensor

from bridge.huggingface.checkpoint import same_bits
from reference.fp8 import dequantize_blockwise
from reference.parallelism import Parallelism

pytestmark = pytest.mark.plugins

CASE = Case(heads=8, groups=2, head_dim=16, rotary=8, hidden=32, width=24, experts=4, top_k=2, layers=2, vocab=64)
TP2 = Parallelism(tp=2, etp=1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with server_of("support.megatron_bridge_lora"), RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint."""
    out = tmp_path_factory.mktemp("float32")
    config = CASE.released_config() | {"architectures": ["MiniMaxM2ForCausalLM"], "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    save_file(disk_weights(CASE), out / "model.safetensors")
    return out


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return settled_tokens(hf_model(CASE, disk_weights(CASE), FLOAT32), batch=BATCH, seq=SEQ + 1)


def gradients(weights: dict[str, Tensor], tokens: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """`transformers`' gradients of the mean loss, under on-disk names."""
    model = hf_model(CASE, {name: value.to(dtype) for name, value in weights.items()}, dtype)
    model(tokens, labels=tokens).loss.backward()
    return to_disk_names({name: parameter.grad for name, parameter in model.named_parameters()})


def test_gradients_of_adapters_at_tp_2_are_those_of_the_merged_weights(
    ranks: RankPool, folder: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On attention and experts, in each of the steps."""
    targets = (*ATTENTION, *EXPERTS)
    steps, other = ranks.call(train_adapters, str(folder), tokens, TP2, targets)
    wrong, _ = ranks.call(train_adapters, str(folder), tokens, TP2, targets, None, True)
    weights = disk_weights(CASE)
    theirs = [gradients(merged(weights, step.adapters), tokens, FLOAT32) for step in steps]
    remove_float32_casts(monkeypatch)
    for number, (step, own) in enumerate(zip(steps, theirs, strict=True)):
        assert step.adapters.keys() == step.grads.keys() == adapter_names(CASE.layers, CASE.experts)
        assert all(torch.equal(value, other[number].grads[name]) for name, value in step.grads.items())
        truth = adapter_gradients(step.adapters, gradients(merged(weights, step.adapters), tokens, FLOAT64))
        ours, oracle = off(step.grads, truth), off(adapter_gradients(step.adapters, own), truth)
        worst, its = max(ours, key=ours.__getitem__), max(oracle.values())
        print(f"step {number}: off by at most {ours[worst]:.1e} ({worst}), transformers by {its:.1e}")
        assert ours[worst] <= 2 * its, worst
        if number == 0:  # the same model with the host's own norms
            found = off(wrong[number].grads, truth)
            print({name: f"{share:.2%}" for name, share in found.items() if "self_attn.q_proj" in name})
            assert min(share for name, share in found.items() if "q_proj" in name or "k_proj" in name) > 1e-3


def off(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors, as norms."""
    return {name: ((found[name].double() - exact).norm() / exact.norm()).item() for name, exact in truth.items()}


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        (Parallelism(tp=2, etp=2), "linear_fc[12]: its adapter is wrong on 2 expert-tensor-parallel ranks"),
        (Parallelism(tp=2, ep=2, etp=1), "linear_fc[12]: of 2 expert-parallel ranks the host exports one rank's"),
    ],
    ids=["cut experts", "experts on several ranks"],
)
def test_adapters_of_experts_that_are_wrong_are_refused(
    ranks: RankPool, folder: Path, tokens: Tensor, layout: Parallelism, error: str
) -> None:
    """Without the refusal, gradients are off by 50 to 280 %, and half of the adapters are missing from the export."""
    with pytest.raises(RankError, match=error):
        ranks.call(train_adapters, str(folder), tokens, layout, EXPERTS)


def test_a_trained_adapter_is_loaded_by_peft(ranks: RankPool, folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    """Its logits are those of the merged weights, in float64."""
    steps, _ = ranks.call(train_adapters, str(folder), tokens, TP2, ATTENTION, str(tmp_path / "adapter"))
    last = steps[-1]
    weights = {name: value.double() for name, value in disk_weights(CASE).items()}
    saved = {
        name.removeprefix("base_model.model."): value
        for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
    }
    assert saved.keys() == last.adapters.keys()
    model = PeftModel.from_pretrained(hf_model(CASE, weights, FLOAT64), str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = model(tokens).logits
        expected = hf_model(CASE, merged(weights, saved), FLOAT64)(tokens).logits
        base = hf_model(CASE, weights, FLOAT64)(tokens).logits
    assert (logits - expected).abs().max() < 1e-5 * (base - expected).abs().max()


def adapter_names(layers: int, experts: int) -> set[str]:
    modules = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    modules += [f"block_sparse_moe.experts.{e}.{part}" for e in range(experts) for part in ("w1", "w2", "w3")]
    return {f"model.layers.{i}.{module}{suffix}" for i in range(layers) for module in modules for suffix in (IN, OUT)}


def test_a_merged_export_at_tp_2_encodes_what_the_adapters_touch_and_nothing_else(
    ranks: RankPool, tmp_path: Path
) -> None:
    """One layer's queries, keys and values and the same layer's experts, of an FP8 checkpoint."""
    source = make_folder(tmp_path / "source")
    targets = ("*.layers.1.*.linear_qkv", "*.layers.1.*.local_experts.2.linear_fc1")
    adapters, _ = ranks.call(merge_and_export, str(source), TP2, targets, str(tmp_path / "merged"))
    truth, found = truth_of(str(source)), truth_of(str(tmp_path / "merged"))
    touched = {f"model.layers.1.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")}
    touched |= {f"model.layers.1.block_sparse_moe.experts.2.{part}.weight" for part in ("w1", "w3")}
    assert {name.removesuffix(IN) + ".weight" for name in adapters if name.endswith(IN)} == touched
    assert found.disk.keys() == truth.disk.keys()
    changed = {name for name, value in found.disk.items() if not same_bits(value, truth.disk[name])}
    assert changed == touched | {name + SCALE for name in touched}
    exact = merged(truth.whole, adapters)
    for name in touched:
        value = dequantize_blockwise(found.disk[name], found.disk[name + SCALE], dtype=FLOAT32)
        # Half a step of e4m3 is 1/16 of a value, or 2^-10 scales below the normal ones; bfloat16 adds 2^-8 twice.
        bound = exact[name].abs() * (1 / 16 + 2**-7) + found.disk[name + SCALE].max() * 2**-9
        assert ((value - exact[name]).abs() <= bound).all(), name
