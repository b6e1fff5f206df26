"""What comes out of training: the model that was trained, in Hugging Face's formats, read by `transformers`.

One run of a small FP8 checkpoint in bfloat16 whose experts are frozen, exported as FP8 and as bfloat16.
"""

import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import all_tensors
from support.training_runs import job_of, make_source
from transformers import MiniMaxM2ForCausalLM

from bridge.minimax_m2_bridge import MiniMaxM2Bridge
from bridge.proof.checkpoint import open_checkpoint
from bridge.proof.compare import compare_checkpoints
from bridge.proof.reference_logits import random_tokens, reference_logits
from bridge.proof.roundtrip import judge_logits, logit_truth
from bridge.proof.transformers_logits import missing_packages, transformers_logits
from bridge.training.train import train

# transformers dequantises only whole blocks of 128 x 128.
WHOLE_BLOCKS = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64, "rotary_dim": 32, "num_hidden_layers": 2}
FROZEN = "experts"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, `run`, and the exports `fp8` and `bf16`; the second is of a run that had ended."""
    folder = tmp_path_factory.mktemp("export")
    source = make_source(folder / "source", **WHOLE_BLOCKS)
    job = job_of(source, folder / "run", steps=3, dtype="bf16", freeze=("*.experts.*",), bias_update_rate=0.0)
    for form in ("fp8", "bf16"):
        summary = train(job.at(export=form))
        assert summary.exported is not None
        shutil.move(summary.exported, folder / form)
    return folder


def test_only_weights_that_changed_are_quantised_again(run: Path) -> None:
    source, exported = all_tensors(run / "source"), all_tensors(run / "fp8")
    assert source.keys() == exported.keys()
    same = {
        name for name, value in source.items() if torch.equal(value.view(torch.uint8), exported[name].view(torch.uint8))
    }
    linear = {name for name in source if name.endswith("proj.weight")}
    assert linear
    assert not linear & same, "attention was trained"
    assert {name for name in source if f".{FROZEN}." in name} <= same, "codes and scales of the experts"
    assert {name for name in source if "correction_bias" in name or ".enorm" in name} <= same
    assert {exported[name].dtype for name in linear} == {torch.float8_e4m3fn}


def test_the_export_is_the_checkpoint(run: Path) -> None:
    found = compare_checkpoints(run / "run" / "checkpoints", run / "bf16")
    assert not found.differences


@torch.no_grad()
def plain_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = MiniMaxM2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()(tokens).logits


@pytest.mark.skipif(bool(missing_packages()), reason=f"needs {', '.join(missing_packages())}")
@pytest.mark.parametrize("form", ["fp8", "bf16"])
def test_transformers_reads_it_with_the_same_logits(run: Path, form: str) -> None:
    with MiniMaxM2Bridge.from_hf_pretrained(run / form) as exported:
        tokens = random_tokens(exported.config, length=32)
        truth = logit_truth(exported, tokens, params_dtype=torch.float32)
        logits = transformers_logits(run / form, tokens) if form == "fp8" else plain_logits(run / form, tokens)
        found = judge_logits("transformers", logits, truth)
        print(found)
        assert found.holds
    exact = {"weight_dtype": torch.float32, "compute_dtypes": (torch.float64,)}
    (ours,) = reference_logits(open_checkpoint(run / "run" / "checkpoints"), tokens, **exact)
    (before,) = reference_logits(open_checkpoint(run / "source"), tokens, **exact)
    moved = truth.measure(ours - before)
    error = truth.measure(truth.logits - ours)
    print(f"{form}: training moved logits by {moved:.2e}, the export is {error:.2e} off the checkpoint")
    # bfloat16 is the checkpoint; FP8 rounds what was trained, which is less than what training changed.
    assert error == 0 if form == "bf16" else error < moved / 2
