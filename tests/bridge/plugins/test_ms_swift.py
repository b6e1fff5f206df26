"""ms-swift's own `megatron sft` with `--external_plugins`, on gloo: three steps, and the checkpoint that it saves.

The second layer is frozen: its weights must come back byte for byte. Two tensor-parallel ranks must train as one does.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support.checkpoints import all_tensors
from support.checks import ROOT
from support.sharded_models import CONFIG, truth_of
from torch import Tensor

from bridge.huggingface.random_checkpoint import make_checkpoint

pytestmark = [
    pytest.mark.plugins,
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("swift", "mcore_bridge", "transformer_engine", "tokenizers")),
        reason="needs ms-swift, mcore-bridge, and Transformer Engine, which they import",
    ),
]

PLUGIN = ROOT / "bridge" / "plugins" / "ms_swift.py"
FROZEN = "decoder.layers.1"
STEPS = 3
WORDS = 120
SECONDS = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 checkpoint with a tokenizer of a few words, and conversations in them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("ms-swift")
    config = CONFIG | {"num_hidden_layers": 2, "vocab_size": 132}  # a padded vocabulary's last logit would count
    make_checkpoint(folder / "source", config, seed=5, mtp_layers=1)
    special = ("<unk>", "<s>", "</s>", "<pad>")
    words = [*special, *(f"w{number}" for number in range(len(special), WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "source")

    def said(role: str, start: int, count: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(words[4 + (start + i) % (WORDS - 4)] for i in range(count))}

    lines = [{"messages": [said("user", 7 * i, 9), said("assistant", 5 * i, 8)]} for i in range(16)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(folder: Path, out: Path, *, ranks: int) -> list[float]:
    """The losses of `megatron sft` at TP `ranks`; the checkpoint is in `out`/checkpoint-3."""
    options = {
        "model": folder / "source",
        "model_type": "minimax_m2",
        "template": "dummy",
        "dataset": folder / "data.jsonl",
        "external_plugins": PLUGIN,
        "tuner_type": "full",
        "freeze_parameters": FROZEN,
        "torch_dtype": "float32",
        "cross_entropy_loss_fusion": "false",  # it rounds the gradient to bfloat16, which is refused in float32
        "fp16": "false",
        "bf16": "false",
        "tensor_model_parallel_size": ranks,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": str(ranks > 1).lower(),
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "max_length": 32,
        "lr": 1e-2,
        "lr_warmup_fraction": 0,
        "output_dir": out,
        "add_version": "false",
        "save_steps": STEPS,
        "logging_steps": 1,
        "no_save_optim": "true",
        "no_save_rng": "true",
        "finetune": "true",
        "save_safetensors": "true",
        "split_dataset_ratio": 0,
        "ddp_backend": "gloo",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*launcher, "-m", "support.ms_swift_on_cpu", *words],
        env={**os.environ, **offline},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    lines = [json.loads(line) for line in (out / "logging.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def stored(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    tensors = all_tensors(folder).items()
    return {name: (x.dtype, x.contiguous().view(torch.uint8).numpy().tobytes()) for name, x in tensors}


def values(folder: Path) -> dict[str, Tensor]:
    return truth_of(str(folder)).whole


def test_two_ranks_train_as_one_and_save_fp8(folder: Path, tmp_path: Path) -> None:
    losses = {ranks: run(folder, tmp_path / f"tp{ranks}", ranks=ranks) for ranks in (1, 2)}
    assert len(losses[1]) == STEPS
    assert losses[1][-1] < losses[1][0]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    saved = {ranks: tmp_path / f"tp{ranks}" / f"checkpoint-{STEPS}" for ranks in losses}
    before = stored(folder / "source")
    kept = {name for name in before if name.startswith(("model.layers.1.", "model.layers.2."))}  # frozen; MTP
    kept.remove("model.layers.1.block_sparse_moe.e_score_correction_bias")  # moved by counts of tokens
    trained = {f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for out in saved.values():
        after = stored(out)
        assert after.keys() == before.keys()
        assert all(after[name][0] == before[name][0] for name in before)
        changed = {name for name in before if after[name] != before[name]}
        assert kept
        assert not changed & kept
        assert trained <= changed
        assert (out / "config.json").read_bytes() == (folder / "source" / "config.json").read_bytes()
    ours, theirs = (values(out) for out in saved.values())
    for name, value in ours.items():  # float32's roundings may land on the other side of a float8 code's border
        assert (value.float() - theirs[name].float()).norm() <= 1e-2 * value.float().norm(), name


def test_what_ms_swift_imports_is_the_plugin_and_the_path_stays_clean() -> None:
    """In a process of its own, by ms-swift's own function, as `--external_plugins` does."""
    code = (
        "import sys\n"
        "from bridge.model.process_groups import model_parallel\n"
        "from swift.utils import import_external_file\n"
        f"import_external_file({str(PLUGIN)!r})\n"
        f"assert {str(PLUGIN.parent)!r} not in sys.path\n"
        "import mcore_bridge\n"
        "from mcore_bridge.model.register import get_model_meta\n"
        "print(mcore_bridge.__version__, get_model_meta('minimax_m2').loader.__module__)\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "bridge.plugins.mcore_bridge"
