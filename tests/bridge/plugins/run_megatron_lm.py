"""Megatron-LM's own pretrain_gpt.py and pretrain_hybrid.py for a few steps with our specs.

    python tests/bridge/plugins/run_megatron_lm.py --megatron-lm CHECKOUT --gpus 1 --out record.json

On GPUs it needs Transformer Engine; `--gpus 0` is one rank on a host without any, in float32. The checkout's scripts
run on the installed megatron-core, which has the rest of Megatron-LM, or with `--core checkout` on the checkout's:
its main branch's pretrain_hybrid.py calls what 0.19.2 has not. Either is copied, with the installed package's
compiled helpers and a makefile that does nothing, because the scripts would compile them. For each class and layout:
a checkpoint is made and imported, the script loads it, trains on its mock data and saves; the result is exported. It
must hold that

- the first loss is the same for all, as far as bfloat16 goes: weights, norms and rotation are the same model;
- later losses too, since the data and the gradients are;
- every loss is finite, and the exported weights are not those that were imported.

The record has every loss. Exit status 1 if something does not hold.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ("pretrain_gpt.py", "pretrain_hybrid.py", "gpt_builders.py", "hybrid_builders.py", "model_provider.py")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
FIRST_LOSS, LATER_LOSSES = 2**-8, 2**-6  # relative: one rounding of bfloat16, and what a few steps make of it
LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: (\S+)")


class Run(NamedTuple):
    """One training: the class of the model, and the parallel sizes."""

    model: str
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def name(self) -> str:
        return f"{self.model} tp{self.tp} pp{self.pp} ep{self.ep}"


def runs_of(gpus: int) -> list[Run]:
    layouts = [(1, 1, 1), *([(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)] if gpus > 1 else [])]
    layouts += [(2, 2, 2), (4, 1, 2)] if gpus > 3 else []
    return [Run(model, *sizes) for model in ("gpt", "hybrid") for sizes in layouts]


def scripts_in(scripts: Path, checkout: Path, core: str) -> Path:
    """A folder with the checkout's scripts and the packages that they import, the installed ones or the checkout's."""
    import megatron.core

    installed = Path(megatron.core.__file__).parents[1]
    for package in ("core", "training"):
        of = installed if core == "installed" else checkout / "megatron"
        shutil.copytree(of / package, scripts / "megatron" / package)
    datasets = scripts / "megatron" / "core" / "datasets"
    for compiled in (installed / "core" / "datasets").glob("helpers_cpp*.so"):
        shutil.copy(compiled, datasets)
    (datasets / "Makefile").write_text("default: ;\n")
    for script in SCRIPTS:
        shutil.copy(checkout / script, scripts)
    return scripts


def words_of(run: Run, steps: int, folder: Path, *, gpus: int) -> list[str]:
    """The script's command line."""
    from bridge.huggingface.random_checkpoint import SMALL_CONFIG
    from bridge.plugins.megatron_lm_arguments import megatron_lm_arguments
    from reference.config import ModelConfig

    words = megatron_lm_arguments(ModelConfig.from_hf(SMALL_CONFIG | SIZES), model=run.model)
    if run.model == "hybrid" and run.pp == 2:
        words[words.index("--hybrid-layer-pattern") + 1] = "*E|*E"
    spec = "layer_spec" if run.model == "gpt" else "hybrid_stack_spec"
    options: dict[str, Any] = {
        "--spec": f"bridge.plugins.megatron_lm {spec}",
        "--tensor-model-parallel-size": run.tp,
        "--pipeline-model-parallel-size": run.pp,
        "--expert-model-parallel-size": run.ep,
        "--expert-tensor-parallel-size": 1,
        "--seq-length": 128,
        "--micro-batch-size": 1,
        "--global-batch-size": 8,
        "--train-iters": steps,
        "--lr": 1e-3,
        "--lr-decay-style": "constant",
        "--clip-grad": 0.0,  # on a CPU megatron-core cannot
        "--log-interval": 1,
        "--eval-iters": 0,
        "--eval-interval": 1000,
        "--split": "100,0,0",
        "--tokenizer-type": "NullTokenizer",
        "--make-vocab-size-divisible-by": 1,
        "--load": folder / f"imported-{run.model}",
        "--save": folder / run.name.replace(" ", "-"),
        "--save-interval": 1000,
        "--ckpt-format": "torch_dist",
        "--distributed-timeout-minutes": 5,
    }
    said = [word for name, value in options.items() for word in (name, *str(value).split())]
    switches = ["--mock-data", "--finetune", "--no-load-rng", "--no-load-optim"]
    switches += ["--sequence-parallel"] if run.tp > 1 else []
    if gpus:
        without_apex = "--no-gradient-accumulation-fusion"  # which has the extension for it
        precision = ["--bf16", "--use-distributed-optimizer"]
        return [*words, *said, *switches, *precision, "--moe-token-dispatcher-type", "alltoall", without_apex]
    from support.megatron_lm import cpu_words

    backend = ["--distributed-backend", "gloo", "--num-workers", "0", "--optimizer", "sgd"]
    return [*cpu_words(words), *said, *switches, *backend]


def train(run: Run, scripts: Path, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Losses of the run, and whether the exported weights differ from the source's; the output's end if it failed."""
    from bridge import ExportJob, compare_checkpoints, export_checkpoint

    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(asked.gpus or 1)]
    launcher = [] if asked.gpus else [str(ROOT / "tests" / "support" / "megatron_lm_on_cpu.py")]
    script = [*launcher, str(scripts / f"pretrain_{run.model}.py")]
    command = [sys.executable, *ranks, *script, *words_of(run, asked.steps, folder, gpus=asked.gpus)]
    path = os.pathsep.join(filter(None, [str(scripts), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    losses = [float(value) for _, value in LOSS.findall(done.stdout)]
    found: dict[str, Any] = {"run": run.name, "status": done.returncode, "losses": losses}
    if done.returncode or len(losses) != asked.steps:
        return found | {"end": (done.stdout + done.stderr).splitlines()[-60:]}
    saved, exported = folder / run.name.replace(" ", "-"), folder / f"exported-{run.name}".replace(" ", "-")
    source = str(folder / "source")
    export_checkpoint(ExportJob(str(saved), str(exported), source=source))
    changed = compare_checkpoints(source, str(exported)).differences
    return found | {"changed": bool(changed)}


def problems(found: list[dict[str, Any]]) -> list[str]:
    """What does not hold, in words."""
    said = [f"{one['run']}: exit status {one['status']}, losses {one['losses']}" for one in found if "end" in one]
    good = [one for one in found if "end" not in one]
    said += [f"{one['run']}: the exported weights are the source's" for one in good if not one["changed"]]
    for one in good:
        for step, (loss, first) in enumerate(zip(one["losses"], good[0]["losses"], strict=True)):
            bound = FIRST_LOSS if step == 0 else LATER_LOSSES
            if not abs(loss - first) <= bound * first:
                said.append(f"{one['run']}: loss {loss} in step {step + 1}, {first} in {good[0]['run']}")
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron-lm", type=Path, required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--core", choices=("installed", "checkout"), default="installed", help="whose megatron-core")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    parser.add_argument("--out", type=Path, help="where to write the record, as JSON")
    asked = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from bridge import ImportJob, import_checkpoint
    from bridge.huggingface.random_checkpoint import SMALL_CONFIG, make_checkpoint

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scripts = scripts_in(folder / "scripts", asked.megatron_lm, asked.core)
        make_checkpoint(folder / "source", SMALL_CONFIG | SIZES)
        for kind in ("gpt", "hybrid"):
            import_checkpoint(ImportJob(str(folder / "source"), str(folder / f"imported-{kind}"), model=kind))
        found = []
        for run in runs_of(asked.gpus):
            if asked.only in run.name:
                found.append(train(run, scripts, asked, folder))
                print(json.dumps(found[-1]), flush=True)
    packages = ("torch", "megatron-core", "transformer-engine")
    versions = {package: _version(package) for package in packages}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {
        "versions": versions,
        "gpu": gpu,
        "gpus": asked.gpus,
        "core": asked.core,
        "runs": found,
        "problems": problems(found),
    }
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(record["problems"]) or f"{len(found)} runs hold")
    return 1 if record["problems"] else 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
