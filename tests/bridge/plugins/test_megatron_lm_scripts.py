"""Megatron-LM's scripts with our specs: `MEGATRON_LM=checkout pytest -m plugins`.

What runs them is `run_megatron_lm.py`; here is also what can be seen without the scripts: each word that it gives them
is known to their parser, and a record in which something does not hold is found out.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checks import ROOT
from support.files import module_of
from support.megatron_lm import parsed

from bridge.plugins.megatron_lm import hybrid_stack_spec, layer_spec
from bridge.plugins.megatron_lm_arguments import check_arguments

SCRIPT = Path(__file__).with_name("run_megatron_lm.py")
by_hand = module_of(SCRIPT)


@pytest.mark.parametrize("gpus", [0, 4])
@pytest.mark.parametrize("run", [by_hand.Run("gpt"), by_hand.Run("hybrid", 2, 2, 2)], ids=lambda run: run.name)
def test_the_scripts_know_every_word(run, gpus: int, tmp_path: Path) -> None:
    from megatron.core.transformer.spec_utils import import_module

    found = parsed(by_hand.words_of(run, 5, tmp_path, gpus=gpus), validated=False)
    check_arguments(found)
    assert (found.tensor_model_parallel_size, found.pipeline_model_parallel_size) == (run.tp, run.pp)
    assert import_module(found.spec) is (layer_spec if run.model == "gpt" else hybrid_stack_spec)


def test_what_does_not_hold_is_said() -> None:
    good = {"run": "gpt tp1 pp1 ep1", "status": 0, "losses": [6.25, 6.0], "changed": True}
    assert by_hand.problems([good, good | {"losses": [6.26, 6.05]}]) == []
    bad = {
        "status 1": good | {"status": 1, "end": []},
        "the exported weights are the source's": good | {"changed": False},
        "loss 6.5 in step 1, 6.25 in": good | {"losses": [6.5, 6.0]},
        "loss nan in step 2": good | {"losses": [6.25, float("nan")]},
    }
    for said, record in bad.items():
        assert any(said in problem for problem in by_hand.problems([good, record])), said


@pytest.mark.plugins
def test_the_scripts_train_on_this_host(tmp_path: Path) -> None:
    """On a host without a GPU one rank, in float32."""
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout:
        pytest.skip("MEGATRON_LM is not set to a checkout of Megatron-LM")
    gpus = 2 ** (min(torch.cuda.device_count(), 4).bit_length() - 1) if torch.cuda.is_available() else 0
    command = [sys.executable, str(SCRIPT), "--megatron-lm", checkout, "--gpus", str(gpus)]
    command += ["--steps", "3", "--core", "checkout"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
