"""Offline import and export on the CPU: seconds over a plain copy that moves as many bytes, and memory of each process.

Bytes, for a checkpoint of b bytes of FP8 (7.4 GB: two layers of true width, a small vocabulary): import reads b and
writes 2 b of bfloat16; export reads 2 b, and b again with scales="source", and writes b. The copy reads and writes
that many bytes in one process, 16 MiB at a time, and syncs every file; files are as large as the conversion's. Before
each of them, memory is touched, which also empties the page cache; each conversion's time includes starting its
processes.

    python tests/benchmarks/bench_offline.py OUT.json [LAYERS [EXPERTS [FOLDER]]]

Everything is written to FOLDER (default: a temporary one), which needs room for six times the checkpoint: fewer experts
leave room for more layers, to see that memory does not grow with them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from record import environment
from true_width import few_layers, make

BUFFER = 16 << 20
FILE_BYTES = 512 << 20
COMMAND = [sys.executable, "-c", "from bridge.cli import app; app()"]


def files_of(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def back_memory() -> None:
    """A virtual machine gets its memory from the host page by page, at seconds a GB: not in what is timed here."""
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    np.ones(int(0.8 * available) // 8)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def copy(sources: list[Path], nbytes: int, target: Path) -> float:
    """Seconds to read the sources and to write that many bytes of them, synced."""
    target.mkdir()
    start = time.perf_counter()
    for source in sources:
        with source.open("rb", buffering=0) as file:
            buffer = bytearray(BUFFER)
            while file.readinto(buffer):
                pass
    for number in range(-(-nbytes // FILE_BYTES)):
        with (target / str(number)).open("wb") as file:
            for _ in range(0, min(FILE_BYTES, nbytes - number * FILE_BYTES), BUFFER):
                file.write(buffer)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    return seconds


def run(*words: str) -> dict[str, Any]:
    """A command's seconds, what it says of itself, and the largest of its processes in GiB, page cache not counted."""
    largest: dict[int, int] = {}
    start = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *words, "--json"], stdout=subprocess.PIPE, text=True)

    def sample() -> None:
        while process.poll() is None:
            for pid in (process.pid, *children(process.pid)):
                largest[pid] = max(largest.get(pid, 0), anonymous(pid))
            time.sleep(0.05)

    sampler = threading.Thread(target=sample)
    sampler.start()
    text, _ = process.communicate()
    seconds = time.perf_counter() - start
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {process.returncode}")
    return {"seconds": seconds, "largest_process_gib": max(largest.values()) / 2**30, "summary": json.loads(text)}


def children(pid: int) -> Iterator[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, found):
        yield child
        yield from children(child)


def anonymous(pid: int) -> int:
    """Bytes that no file backs."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(1024 * int(kilobytes) for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status))


def measure(folder: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    source, megatron, back = folder / "source", folder / "megatron", folder / "exported"
    if not source.exists():
        make(source, config)
    run("inspect", str(source))
    workers = ["--workers", str(os.cpu_count())]
    rows = []
    steps = (
        ("import", [source], megatron, ["import", str(source), str(megatron)]),
        ("export fp8, source's scales", [megatron, source], back,
         ["export", str(megatron), str(back), "--source", str(source)]),
        ("export fp8, fresh scales", [megatron], back, ["export", str(megatron), str(back), "--scales", "fresh"]),
    )  # fmt: skip
    for name, inputs, output, words in steps:
        back_memory()
        row: dict[str, Any] = {"what": name, **run(*words, *workers, *(["--overwrite"] if output.exists() else []))}
        row["bytes_read"], row["bytes_written"] = sum(map(size_of, inputs)), size_of(output)
        back_memory()
        row["copy_seconds"] = copy(files_of(*inputs), row["bytes_written"], folder / "copied")
        row["over_copy"] = row["seconds"] / row["copy_seconds"]
        rows.append(row)
        print({key: value for key, value in row.items() if key != "summary"}, flush=True)
    return rows


def main(path: Path, layers: int = 2, experts: int = 256, folder: str | None = None) -> None:
    config = few_layers(layers, experts)
    with tempfile.TemporaryDirectory(prefix="bench-offline-") as temporary:
        rows = measure(Path(folder or temporary), config)
    config = {**config, "cores": os.cpu_count()}
    record = {"environment": environment(), "model": __doc__, "config": config, "rows": rows}
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    out, *sizes = sys.argv[1:4]
    main(Path(out), *map(int, sizes), *sys.argv[4:])
