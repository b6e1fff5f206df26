"""Training as a user starts it: 200 steps on real text, two layers of true width in bfloat16, with and without graphs.

    python tests/benchmarks/record_steps.py OUT.json [--steps N] [--rows "eager" "graphs"]

Each row is `minimax-m2 train` in a process of its own, from the same random weights, on the same samples; with several
GPUs as many rows at a time, one on each. A row ends with a checkpoint of 6 GB: TMPDIR=/dev/shm saves a slow disk. The
record has the losses and gradient norms of each step, and how far they are from those of another row (`COMPARED`). What
adds in no fixed order makes two runs of the same row differ as well, "again" says by how much. Attention's backward
pass is asked for a fixed order (NVTE_ALLOW_NONDETERMINISTIC_ALGO=0); the local permutation of tokens has none, the
fused one has. Without a GPU the model is tiny and in float32, and there are no graphs.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from bridge.huggingface.byte_tokenizer import byte_tokenizer_files
from bridge.model.fusions import FASTEST
from bridge.training.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parent))
import child
from record import environment
from true_width import few_layers

TEXT = Path(__file__).parents[1] / "data" / "alice.txt"
EXPERTS = 16  # a checkpoint of 32 takes a minute to write
TINY = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}
FUSIONS = tuple(word for name in FASTEST for word in ("--fusions", name))
EAGER = ("--no-cuda-graphs",)
ROWS: dict[str, tuple[str, ...]] = {
    "eager": (*EAGER, "--fusions", "none"),
    "fusions": (*EAGER, *FUSIONS),
    "fusions and graphs": ("--cuda-graphs", *FUSIONS),
    "fusions again": (*EAGER, *FUSIONS),
    "eager again": (*EAGER, "--fusions", "none"),
    "graphs": ("--cuda-graphs", "--fusions", "none"),
}
ON_CPU = ("eager", "eager again")
COMPARED = {
    "eager again": "eager",
    "graphs": "eager",
    "fusions": "eager",
    "fusions again": "fusions",
    "fusions and graphs": "fusions",
}
KEPT = ("loss", "grad_norm", "tokens_per_second")
MOST_SECONDS = 540.0  # of a row


def make_folder(folder: Path, gpu: bool) -> None:
    """A config.json and a tokenizer of bytes."""
    folder.mkdir()
    width = {} if gpu else TINY | {"rotary_dim": 8, "num_experts_per_tok": 2}
    config = few_layers(2, EXPERTS if gpu else 4) | width | {"vocab_size": 512 if gpu else 260}
    for name, text in {"config.json": json.dumps(config), **byte_tokenizer_files()}.items():
        (folder / name).write_text(text)


def gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(torch.cuda.device_count())]


def train(name: str, folder: Path, steps: int, free: "Queue[str | None]") -> dict[str, Any]:
    """One row, on a GPU of those that are free: what it wrote of each step, or what it said when it failed."""
    gpu, out = free.get(), folder / name.replace(" ", "-")
    size = ["--seq-length", "1024", "--global-batch-size", "4"] if gpu else ["--seq-length", "32", "--dtype", "fp32"]
    words = ["train", "--model", folder / "model", "--random", "--data", TEXT, "--out", out, "--steps", steps, *size]
    words += ["--lr", "3e-4", "--warmup-steps", min(20, steps // 4), *ROWS[name]]
    command = [sys.executable, "-c", "from bridge.cli import app; app()", *map(str, words)]
    device = {"CUDA_VISIBLE_DEVICES": gpu, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"} if gpu else {}
    began, log = time.time(), out.with_suffix(".log")
    try:
        status = child.run(command, log, MOST_SECONDS, **device)
    finally:
        free.put(gpu)
    found: dict[str, Any] = {"command": [*map(str, size), *ROWS[name]], "seconds": round(time.time() - began, 1)}
    if status != 0:
        return found | {"failed": child.last_words(log, 25)}
    lines = read_metrics(out)
    shutil.rmtree(out)  # its checkpoint
    return found | {key: [line[key] for line in lines] for key in KEPT}


def apart(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The largest relative distance from another row, over ten steps and over all, and how many steps are equal."""
    found: dict[str, dict[str, Any]] = {}
    for name, other in COMPARED.items():
        row, base = rows.get(name, {}), rows.get(other, {})
        for key in ("loss", "grad_norm") if "loss" in row and "loss" in base else ():
            off = [abs(a / b - 1) for a, b in zip(row[key], base[key], strict=True)]
            equal = next((number for number, one in enumerate(off) if one), len(off))
            found.setdefault(f"{name}, off {other}", {})[key] = {
                "first ten": max(off[:10]), "all": max(off), "equal steps": equal}  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW")
    asked = parser.parse_args()
    child.end_all_when_ended()
    devices = gpus() or [None]
    names = asked.rows or (ON_CPU if None in devices else ROWS)
    rows: dict[str, dict[str, Any]] = {}
    free: Queue[str | None] = Queue()
    for device in devices:
        free.put(device)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(devices)) as pool:
        make_folder(Path(scratch, "model"), None not in devices)
        made = pool.map(train, names, repeat(Path(scratch)), repeat(asked.steps), repeat(free))
        for name, row in zip(names, made, strict=True):
            rows[name] = row
            found = {"what": f"{asked.steps} steps on real text", **environment(), "rows": rows, "apart": apart(rows)}
            asked.out.write_text(json.dumps(found, indent=1) + "\n")  # what is ended leaves what it had
            said = row.get("failed") or f"loss {row['loss'][0]:.4f} to {row['loss'][-1]:.4f}"
            print(name, said, row["seconds"], "s", flush=True)
    print(json.dumps(apart(rows), indent=1))
    return int(any("failed" in row or row["loss"][-1] >= row["loss"][0] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
