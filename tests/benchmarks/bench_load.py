"""Loading and exporting a live model: FP8 files of true width into a Transformer Engine `GPTModel`, and to the host.

Bytes: a rank reads its share of the files once (7.4 GB at two layers and one rank; of w2 and o_proj, which are cut by
columns, whole rows: 4/3 of its share of the experts at etp 2), moves what it read to its GPU and writes twice its share
there; an export moves 14.7 GB of bfloat16 or 7.4 GB of FP8 to the host. Page cache warm. The first load of a process
also makes the pinned buffers and compiles; the median of the others is what a second one costs. Memory is what the
process holds beyond what it held before, page cache not counted: its own (sampled), and pinned.

    python tests/benchmarks/bench_load.py OUT.json [LAYERS [FOLDER]]                              one GPU
    torchrun --nproc-per-node 2 tests/benchmarks/bench_load.py OUT.json [LAYERS [FOLDER]]         TP 2: etp 2, and EP 2
    torchrun --nproc-per-node 8 tests/benchmarks/bench_load.py OUT.json 2 FOLDER --layout tp=2,ep=4 --layout ep=8

The checkpoint is made in FOLDER if it is not there and the ranks are one: random codes, no model that says anything.
"""

import argparse
import json
import os
import re
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed

from bridge import MiniMaxM2Bridge
from bridge.huggingface.safetensors_folder import SafetensorsFolder
from bridge.huggingface.safetensors_header import TensorInfo
from bridge.jobs.ranks import all_gather_objects
from bridge.model.process_groups import model_parallel
from bridge.weights.gather import GatherRequest, rounds
from bridge.weights.param_mapping import MappingRegistry
from bridge.weights.read_plan import plan_batches
from bridge.weights.shard_map import ShardMap
from bridge.weights.sharded_model import ShardedModel, sharded_model
from reference.checkpoint import SCALE_SUFFIX, expected_tensors
from reference.config import ModelConfig
from reference.fp8 import scale_grid
from reference.parallelism import Parallelism, spread_layers
from reference.weights import Dialect

sys.path.insert(0, str(Path(__file__).parent))
from record import environment
from true_width import TRUE_WIDTH, few_layers, make

RUNS = 4
# ---------------------------------------------------------------------------------------------------------- measuring


@contextmanager
def measured(row: dict[str, Any], key: str) -> Iterator[None]:
    """Seconds, and GiB of host memory beyond those at the start."""
    if distributed.get_world_size() > 1:
        distributed.barrier()
    _synchronize()
    own, done = [_anonymous()], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            own.append(_anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield
        _synchronize()
        row[f"{key}, s"] = time.perf_counter() - start
    finally:
        done.set()
        sampler.join()
    row[f"{key}, host GiB"] = (max(own) - own[0]) / 2**30


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _anonymous() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return sum(1024 * int(kilobytes) for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status))


def pinned_gib() -> float:
    statistic = getattr(torch.cuda, "host_memory_stats", dict)() if torch.cuda.is_available() else {}
    return statistic.get("allocated_bytes.peak", 0) / 2**30


def measure(folder: Path, layout: Parallelism) -> dict[str, Any]:
    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }
    row: dict[str, Any] = {"tp": layout.tp, "dp": layout.dp, "ep": layout.ep, "etp": layout.expert_tp}
    with model_parallel(**sizes), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        row["rank"] = distributed.get_rank()
        with measured(row, "build"):
            model = bridge.to_megatron_model(load_weights=False)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            own = torch.cuda.memory_allocated()
        loads = []
        for run in range(RUNS):
            before = bridge.checkpoint.files.bytes_read
            with measured(row, "load"):
                bridge.load_hf_weights(model)
            row["bytes read"] = bridge.checkpoint.files.bytes_read - before
            loads.append(row["load, s"])
            if run == 0:
                row["first load, host GiB"] = row["load, host GiB"]
        row |= {"first load, s": loads[0], "load, s": statistics.median(loads[1:]), "loads, s": loads}
        row["load, GB/s"] = row["bytes read"] / row["load, s"] / 1e9
        row["pinned GiB"] = pinned_gib()
        if torch.cuda.is_available():
            row["load, GPU GiB beyond the parameters"] = (torch.cuda.max_memory_allocated() - own) / 2**30
        row["share"] = share(sharded_model(model, bridge.config), bridge.checkpoint.files)
        row["bytes read / share"] = row["bytes read"] / row["share"]
        for dtype in ("bf16", "fp8"):
            for device in ("cpu", None):
                key, times = f"export {dtype} to {device or 'GPU'}", []
                for _ in range(2):
                    with measured(row, key):
                        nbytes = sum(t.nbytes for _, t in bridge.export_hf_weights(model, dtype, device=device))
                    times.append(row[f"{key}, s"])
                row |= {f"{key}, GB": nbytes / 1e9, f"{key}, all s": times}
                row[f"{key}, GB/s"] = nbytes / row[f"{key}, s"] / 1e9
        if bridge.config.num_hidden_layers <= 2:
            with measured(row, "verify"):
                row["tensors identical to the files"] = verify(bridge, model)
        del model
    return row


def share(live: ShardedModel, checkpoint: SafetensorsFolder) -> int:
    """Bytes of this rank's slices, with the scales of the blocks that they touch."""
    total = 0
    for mapping in live.registry:
        for source, rows, cols in mapping.parameter.pieces:
            if source is not None:
                info = checkpoint.tensors[source]
                columns = 1 if cols is None else cols[1] - cols[0]
                total += (rows[1] - rows[0]) * columns * info.dtype.itemsize
                if source + SCALE_SUFFIX in checkpoint.tensors and cols is not None:
                    blocks = scale_grid((rows[1] - rows[0] // 128 * 128, cols[1] - cols[0] // 128 * 128))
                    total += 4 * blocks[0] * blocks[1]
    return total


def verify(bridge: MiniMaxM2Bridge, model: Any) -> int:
    """Export as the source is, each tensor to one rank, and compare the bytes."""
    count = 0
    for name, tensor in bridge.export_hf_weights(model, "source", to="spread", device="cpu"):
        left, right = (x.view(-1).view(torch.uint8) for x in (tensor, bridge.checkpoint.files.read(name)))
        if not torch.equal(left, right):
            raise AssertionError(f"{name} differs")
        count += 1
    return count


def planning() -> dict[str, float]:
    """Everything that is worked out before the first byte of the whole model moves, for one of 512 ranks."""
    config = ModelConfig.from_hf(TRUE_WIDTH | {"num_hidden_layers": 62})
    specs = expected_tensors(config).items()
    files = SimpleNamespace(tensors={name: TensorInfo(spec.dtypes[0], spec.shape, "", 0) for name, spec in specs})
    found = {}
    for etp, ep in ((1, 32), (8, 8)):
        layout = Parallelism(tp=8, pp=8, ep=ep, etp=etp, dp=8, layers_per_stage=spread_layers(62, 8))
        start = time.perf_counter()
        registry = MappingRegistry(config, Dialect.MEGATRON_TE, layout, 77)
        state = {(m.parameter.chunk, m.megatron_param): torch.empty(m.parameter.shape, device="meta") for m in registry}
        plan_batches(ShardedModel(registry, state, {}), files, config.block_size)
        own = time.perf_counter()
        shard_map = ShardMap(config, layout, Dialect.MEGATRON_TE)
        rounds([GatherRequest(source, torch.bfloat16, None) for source in shard_map.sources])
        for source in shard_map.sources:
            shard_map.replicas(source)
        found |= {
            f"load, etp {etp} ep {ep}, s": own - start,
            f"export, etp {etp} ep {ep}, s": time.perf_counter() - own,
        }
    return found


def layout_of(words: str, world: int) -> Parallelism:
    """ "tp=2,ep=4" on so many ranks; the others are data-parallel, and experts are whole unless etp says otherwise."""
    sizes = {name: int(size) for name, size in (part.split("=") for part in words.split(","))}
    return Parallelism(**{"etp": 1, "dp": world // sizes.get("tp", 1)} | sizes)


def main(out: Path, layers: int, folder: Path, given: Sequence[str] = ()) -> None:
    warnings.simplefilter("ignore")
    world = int(os.environ.get("WORLD_SIZE", 1))
    made = time.perf_counter()
    if not folder.exists() and world == 1:
        make(folder, few_layers(layers))
    made = time.perf_counter() - made
    print(f"checkpoint {made:.1f} s", flush=True)
    layouts = [Parallelism(tp=world, etp=world)] + ([Parallelism(tp=world, ep=world, etp=1)] if world > 1 else [])
    layouts = [layout_of(words, world) for words in given] or layouts
    found = {"layers": layers, "planning for 512 ranks": planning(), "rows": []}
    with model_parallel():
        from megatron.core import parallel_state

        for layout in layouts:
            parallel_state.destroy_model_parallel()
            found["rows"] += all_gather_objects(measure(folder, layout))
            if distributed.get_rank() == 0:
                print(json.dumps(found["rows"][-world:], indent=1), flush=True)
                out.write_text(json.dumps({**environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("layers", type=int, nargs="?", default=2)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layout", action="append", default=[], help="such as tp=2,ep=4")
    options = parser.parse_args()
    made_in = options.folder or Path(f"/tmp/minimax-m2-{options.layers}-layers")
    main(options.out, options.layers, made_in, options.layout)
