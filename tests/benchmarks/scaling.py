"""What four and eight GPUs are to show, in four blocks; each is one command that writes one JSON file.

    python tests/benchmarks/scaling.py proof OUT.json     gradients and weights after training, against transformers
    python tests/benchmarks/scaling.py norm OUT.json      the norms at TP 2, 4 and 8, 4096 and 32768 tokens
    python tests/benchmarks/scaling.py load OUT.json      load and export of two and six layers of true width
    python tests/benchmarks/scaling.py speed OUT.json     training steps at EP 2, 4 and 8 and TP 2 x EP 4; weak scaling

A block is the runs of `blocks` that need `--ranks` ranks at most (all GPUs of the host, or two without one), each a
process that fails for itself; what is not run is said, and why. `--runs` names some of them. Without a GPU the models
are tiny and the ranks gloo's: that shows that a block works, and no speed. Weak scaling: each rank keeps its 32 experts
and its tokens, so that the time of a step would stay the same if communication cost nothing.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bridge.huggingface.random_checkpoint import SMALL_CONFIG

sys.path.insert(0, str(Path(__file__).parent))
import child
from record import environment
from train_rows import BASE, FP8_EXPERTS, PEER_NORMS
from true_width import few_layers, make

HERE = Path(__file__).parent
# Layouts of `tests/bridge/model/test_training.py`, and their ranks.
PROVEN = {
    "tp2": 2,
    "tp2 ep2": 2,
    "pp2": 2,
    "tp2 pp2": 4,
    "tp4, 2 key heads": 4,
    "tp2 dp2 ep2": 4,
    "tp2 dp2 ep2, experts cut in two": 4,
    "tp2 pp2 vpp2": 4,
    "tp2 cp2": 4,
    "dp4 ep4": 4,
    "tp2 dp2 ep4": 4,
    "dp8 ep8": 8,
}
NEEDS_TE = ("tp2 cp2",)  # megatron-core's own attention has no context parallelism
LOADED = {2: ("tp=2", "ep=2"), 4: ("tp=4", "tp=2,ep=4"), 8: ("ep=8",)}
DEPTHS = (2, 6)
SPEED_ROWS = (BASE, "fusions", "fusions and graphs", f"{PEER_NORMS}, fusions and graphs", f"{FP8_EXPERTS}, and graphs")
SPEED = {
    "ep 1": (1, {}),
    "ep 2": (2, {"ep": 2}),
    "ep 4": (4, {"ep": 4}),
    "tp 2, ep 4": (4, {"tp": 2, "ep": 4}),
    "ep 8": (8, {"ep": 8}),
}
SPEED_MINUTES, ROW_ROUNDS = 1.6, 2


class Run(NamedTuple):
    """A command that writes `{out}`, on so many ranks."""

    ranks: int
    command: list[str]
    needs_gpu: bool = False


def _ranks(script: str, ranks: int, *arguments: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(HERE / script), "{out}", *arguments]


def proof(ranks: int, gpu: bool) -> dict[str, Run]:
    """One run of all layouts, so that ranks are started once for each number of them."""
    named = [name for name, size in PROVEN.items() if size <= ranks and (gpu or name not in NEEDS_TE)]
    layouts = [word for name in named for word in ("--layout", name)]
    most = max(PROVEN[name] for name in named)
    return {"training": Run(most, [sys.executable, str(HERE / "record_equality.py"), "{out}", *layouts])}


def norm(ranks: int, gpu: bool) -> dict[str, Run]:
    return {f"tp {size}": Run(size, _ranks("bench_norm.py", size), needs_gpu=True) for size in (2, 4, 8)}


def load(ranks: int, gpu: bool) -> dict[str, Run]:
    def run(size: int, depth: int) -> Run:
        layouts = [word for layout in LOADED[size] for word in ("--layout", layout)]
        return Run(size, _ranks("bench_load.py", size, str(depth), f"{{folder}}/{depth}", *layouts))

    return {f"{depth} layers, {size} ranks": run(size, depth) for depth in DEPTHS for size in LOADED}


def speed(ranks: int, gpu: bool) -> dict[str, Run]:
    found = {}
    for name, (size, sizes) in SPEED.items():
        words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
        limits = ["--minutes", str(SPEED_MINUTES), "--rounds", str(ROW_ROUNDS), "--rows", *SPEED_ROWS]
        script = [sys.executable, str(HERE / "bench_train.py"), "{out}"]
        found[name] = Run(size, [*script, "--ranks", str(size), *words, *limits])
    return found


BLOCKS = {"proof": proof, "norm": norm, "load": load, "speed": speed}


def make_checkpoints(folder: Path, gpu: bool) -> None:
    """Two and six layers; on a host without a GPU tiny ones, whose experts divide over eight ranks."""
    for depth in DEPTHS:
        if not (folder / str(depth)).exists():
            tiny = SMALL_CONFIG | {"num_hidden_layers": depth, "num_local_experts": 8, "num_attention_heads": 8}
            make(folder / str(depth), few_layers(depth) if gpu else tiny)


def make_run(run: Run, folder: Path, limit: float) -> dict[str, Any]:
    """Its result and how it ended; what it printed last, if not well."""
    with tempfile.TemporaryDirectory() as scratch:
        out, log = Path(scratch, "out.json"), Path(scratch, "log")
        command = [word.format(out=out, folder=folder) for word in run.command]
        began = time.time()
        status = child.run(command, log, limit, NVIDIA_TF32_OVERRIDE="0")
        found = {"ranks": run.ranks, "command": shlex.join(run.command), "seconds": round(time.time() - began, 1)}
        found["status"] = f"ended after {limit:.1f} s" if status is None else status
        if status != 0:
            found["said"] = child.last_words(log, 20)
        return found | {"result": json.loads(out.read_text()) if out.exists() else None}


def weak_scaling(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Tokens per second and GPU over one GPU's, by row and run."""
    found: dict[str, dict[str, float]] = {}
    results = {name: run["result"]["rows"] for name, run in runs.items() if run.get("result")}
    for name, rows in results.items():
        for row, figures in rows.items():
            one = results.get("ep 1", {}).get(row, {}).get("tokens/s")
            if one and "tokens/s" in figures:
                found.setdefault(row, {})[name] = round(figures["tokens/s"] / runs[name]["ranks"] / one, 4)
    return found


def measure(block: str, ranks: int, gpu: bool, until: float, some: Sequence[str], folder: Path) -> dict[str, Any]:
    """Every run of the block, or why it was not made."""
    planned = BLOCKS[block](ranks, gpu)
    unknown = set(some) - planned.keys()
    if unknown:
        raise SystemExit(f"--runs: {', '.join(sorted(unknown))} is not in {block}; of {', '.join(planned)}")
    found: dict[str, Any] = {}
    for name, run in planned.items():
        if some and name not in some:
            continue
        if run.ranks > ranks:
            found[name] = {"not run": f"needs {run.ranks} ranks, and there are {ranks}"}
        elif run.needs_gpu and not gpu:
            found[name] = {"not run": "needs GPUs"}
        elif time.time() > until:
            found[name] = {"not run": "no time was left; name it in --runs"}
        else:
            if block == "load":
                make_checkpoints(folder, gpu)
            found[name] = make_run(run, folder, until - time.time())
        print(
            name, {key: found[name][key] for key in ("not run", "status", "seconds") if key in found[name]}, flush=True
        )
    return found


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", choices=BLOCKS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--minutes", type=float, default=9.5, help="what is not done by then is ended")
    parser.add_argument("--runs", nargs="+", default=[], metavar="RUN")
    parser.add_argument("--folder", type=Path, help="where the checkpoints of load are made and kept")
    options = parser.parse_args(given)
    gpu, until = torch.cuda.is_available(), time.time() + 60 * options.minutes
    if not gpu:
        print("no NVIDIA GPU here: tiny models by gloo, whose figures say nothing of a GPU", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        runs = measure(options.block, options.ranks, gpu, until, options.runs, options.folder or Path(scratch))
    found = {"what": f"scaling: {options.block}", **environment(), "ranks": options.ranks, "runs": runs}
    if options.block == "speed":
        found["weak scaling, tokens a second and GPU over one GPU's"] = weak_scaling(runs)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(run.get("status", 0) != 0 for run in runs.values()))


if __name__ == "__main__":
    child.end_all_when_ended()
    sys.exit(main())
