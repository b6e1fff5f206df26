"""What a run writes down of each step: `metrics.jsonl`, one JSON object a line, and TensorBoard where it is installed.

Model FLOPs are those of the matrix products of the weights that a token goes through, and of attention over the half of
the sequence that is before it, three times for forward and backward; recomputation is not counted.
"""

import errno
import json
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from bridge.jobs.durable import write_bytes
from bridge.jobs.os_errors import os_errors_of
from bridge.jobs.ranks import is_rank_zero, raise_on_all_ranks
from bridge.training.settings import TrainJob
from bridge.training.step import StepResult
from reference.config import ModelConfig

NAME = "metrics.jsonl"
# Dense bfloat16 FLOP/s, by words of what CUDA calls the device; NVIDIA's data sheets, some of which say twice that.
PEAKS = {
    "A100": 312e12,
    "H100": 989.4e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def flops_per_token(config: ModelConfig, seq_length: int) -> float:
    """FLOPs of forward and backward for one token, its share of the head included."""
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = hidden * config.head_dim * (2 * heads + 2 * groups)
    scores = 2 * heads * config.head_dim * seq_length / 2
    experts = config.num_experts_per_tok * 3 * hidden * config.intermediate_size
    layer = attention + scores + experts + hidden * config.num_local_experts
    return 3 * 2 * (config.num_hidden_layers * layer + hidden * config.vocab_size)


def peak_flops() -> float | None:
    """Of this rank's GPU; None without one, or if it is not in the table."""
    if not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name())


def peak_of(device: str) -> float | None:
    """Of a device by its name; a part of one (MIG) is in no table."""
    words = set(device.replace("-", " ").split())
    known = [name for name in PEAKS if words >= set(name.split())]
    return PEAKS[max(known, key=len)] if known and "MIG" not in words else None


def memory_gb() -> float:
    """Peak of this rank in 10**9 bytes: torch's allocations on the GPU, or else the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def step_metrics(
    job: TrainJob, config: ModelConfig, step: int, result: StepResult, seconds: float, world: int
) -> dict[str, Any]:
    """A step's line."""
    tokens = job.global_batch_size * job.seq_length
    flops = flops_per_token(config, job.seq_length) * tokens / seconds / world
    peak = peak_flops()
    speed = {"tflops_per_gpu": flops / 1e12, "mfu": flops / peak} if peak else {}
    return {
        "step": step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "tokens": step * tokens,
        "trained_tokens": result.tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        **speed,
        "aux_loss": result.aux_loss,
        "expert_load": result.expert_load,
        "memory_gb": memory_gb(),
    }


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, by step; a last line that was cut off is left out.

    Raises:
        ValueError: the run has none, or a line is damaged.
    """
    path = run / NAME if run.is_dir() else run
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder of a run")
    found, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # a whole line ends with a newline
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            one = None
        if not isinstance(one, dict) or type(one.get("step")) is not int:
            raise ValueError(f"{path}: line {number} is not what was written of a step; delete that line")
        found.append(one)
    return found


class MetricsWriter:
    """Appends to a run's metrics, from the line after `step` on; what an interrupted run wrote beyond is dropped."""

    def __init__(self, run: Path, step: int):
        self._path = run / NAME
        if self._path.is_file():
            kept = [one for one in read_metrics(run) if one["step"] <= step] if step else []
            write_bytes(self._path, "".join(json.dumps(one) + "\n" for one in kept).encode())
        self._file = self._path.open("a")
        self._board = _tensorboard(run / "tensorboard", step)

    def write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            if not os.fstat(self._file.fileno()).st_nlink:  # bytes would go where nobody reads them
                raise FileNotFoundError(errno.ENOENT, "Was deleted while the run goes on")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        for name, value in line.items() if self._board else ():
            if name != "step":
                self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        with os_errors_of(self._path), self._file:
            os.fsync(self._file.fileno())
        if self._board:
            self._board.close()


class Reporter:
    """Metrics on rank 0, and what the caller does with each line; an error is kept until all ranks can raise it.

    For the length of a `with` block, which all ranks enter with the same arguments.
    """

    def __init__(self, run: Path, step: int, on_step: Callable[[dict[str, Any]], None]):
        self._on_step, self._failure = on_step, None
        with raise_on_all_ranks():
            self._writer = MetricsWriter(run, step) if is_rank_zero() else None

    @property
    def failed(self) -> bool:
        """Whether an error is kept on this rank."""
        return self._failure is not None

    def report(self, line: Callable[[], dict[str, Any]]) -> None:
        """Write the line of a step; on other ranks than 0 nothing happens, nor after an error."""
        if self._writer is None or self.failed:
            return
        try:
            made = line()
            self._writer.write(made)
            self._on_step(made)
        except Exception as error:
            self._failure = error

    def raise_failure(self) -> None:
        """Raise what is kept; all ranks must call it, and all raise the same."""
        with raise_on_all_ranks():
            if self._failure is not None:
                raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.raise_failure()
            with raise_on_all_ranks():
                self._close()
        else:
            with suppress(OSError):  # the first error is the one to tell
                self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _tensorboard(folder: Path, step: int) -> Any:
    """A writer that drops what is beyond the step; None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
