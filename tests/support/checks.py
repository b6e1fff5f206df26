"""How results are judged: calibrated error, relative error; and Pythons in which pytest's type checks are off or on."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Errors(NamedTuple):
    """The largest and the mean elementwise distance from the truth."""

    max: float
    mean: float


def errors(value: Tensor, truth: Tensor) -> Errors:
    """Elementwise |value - truth|, in float64."""
    assert value.shape == truth.shape
    difference = (value.detach().to(torch.float64) - truth.detach().to(torch.float64)).abs()
    return Errors(difference.max().item(), difference.mean().item())


def assert_calibrated(ours: Tensor, theirs: Tensor, truth: Tensor, name: str = "value") -> None:
    """Our error against float64 is at most twice the other implementation's own, in the largest element and the mean.

    Two evaluations of one formula in one dtype, which differ in the order of sums and in where they round, are two
    draws of the same error; two is what is allowed for the draw. Prints both: `pytest -s` reports them.
    """
    for kind, error, theirs_error in zip(Errors._fields, errors(ours, truth), errors(theirs, truth), strict=True):
        print(f"{name}: {kind} error {error:.2e}, the other's {theirs_error:.2e}")
        assert error <= 2 * theirs_error, f"{name}: {kind} error {error}, more than twice {theirs_error}"


def assert_relative(ours: Tensor, truth: Tensor, bound: float, name: str = "value") -> None:
    """The largest difference is at most `bound` of the largest true value; where all true values are 0, so are ours."""
    assert ours.dtype == truth.dtype
    difference, size = errors(ours, truth).max, truth.abs().max().item()
    assert difference <= bound * size, f"{name}: off by {difference}, values up to {size}"


def fresh_interpreter(code: str, *, typecheck: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python, which pytest's --jaxtyping-packages does not reach."""
    inherited = {name: value for name, value in os.environ.items() if name != "MINIMAX_M2_TYPECHECK"}
    environment = inherited | ({"MINIMAX_M2_TYPECHECK": "1"} if typecheck else {}) | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def succeeds_in_a_fresh_interpreter(code: str, **environment: str) -> None:
    """`code` ends without an exception there."""
    result = fresh_interpreter(code, **environment)
    assert result.returncode == 0, result.stderr


def succeeds_in_triton_s_interpreter(code: str) -> None:
    """`code` ends without an exception where Triton's kernels run on the CPU.

    Not asked where there is a GPU, which runs the kernels themselves: the interpreter of torch 2.11's Triton fails at
    loops with new versions of NumPy.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels themselves are tested")
    succeeds_in_a_fresh_interpreter(code, TRITON_INTERPRET="1")


def without_type_checks(module: str) -> ModuleType:
    """A second copy of a module as users run it: pytest's --jaxtyping-packages instruments the first one only."""
    spec = importlib.util.spec_from_file_location(
        f"unchecked.{module}", ROOT.joinpath(*module.split(".")).with_suffix(".py")
    )
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
