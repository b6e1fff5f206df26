"""`minimax-m2 demo`, `roundtrip` and `bench`: proofs and measurements on this machine."""

import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from bridge.cli.common import (
    AsJson,
    CheckpointPath,
    Model,
    Overwrite,
    folder,
    progress_bars,
    reporting,
    say,
    say_json,
    say_notes,
)
from bridge.jobs.ranks import TorchrunRanks, launched_by_torchrun, raise_on_all_ranks, rank_and_world_size
from reference.model_class import DEFAULT_MODEL, ModelClass


class ModelDtype(StrEnum):
    """The dtype in which a model is built."""

    BF16 = "bf16"
    FP32 = "fp32"


TensorParallel = Annotated[
    int | None, typer.Option(min=1, help="Tensor parallel size under torchrun (default: all ranks of a stage).")
]
PipelineParallel = Annotated[int, typer.Option(min=1, help="Pipeline parallel size under torchrun.")]
ExpertParallel = Annotated[int, typer.Option(min=1, help="Expert parallel size under torchrun.")]


class Benchmark(StrEnum):
    """A script of tests/benchmarks."""

    NORM = "norm"
    LAYER = "layer"
    EXPERTS = "experts"
    ADAM = "adam"
    ROUTER = "router"
    FP8 = "fp8"
    LOAD = "load"
    TRAIN = "train"
    OFFLINE = "offline"


NEED_A_GPU = (Benchmark.NORM, Benchmark.LAYER, Benchmark.EXPERTS, Benchmark.ADAM, Benchmark.ROUTER)
RUN_BY_RANKS = (Benchmark.NORM, Benchmark.LAYER, Benchmark.LOAD, Benchmark.TRAIN)
STARTS_ITS_RANKS = (Benchmark.TRAIN,)  # and runs a tiny model by gloo where there is no GPU


def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Keep the two checkpoints in this folder (default: a temporary one).")
    ] = None,
    model: Model = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option(help="Seed of the weights and tokens.")] = 0,
    tp: TensorParallel = None,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    as_json: AsJson = False,
) -> None:
    """Make a small FP8 checkpoint, take it through a real megatron-core model and back, and prove it unchanged."""
    with reporting(), TorchrunRanks(models=True), folder(keep) as target, progress_bars() as progress:
        from bridge.proof.demo import demo as run

        findings = run(target, model=model, seed=seed, sizes=_sizes(tp, pp, ep), progress=progress)
    _conclude("Hugging Face FP8 -> megatron-core -> Hugging Face FP8", findings, as_json)


def roundtrip(
    path: CheckpointPath,
    out: Annotated[
        Path | None, typer.Option(help="Write the exported checkpoint here and keep it (default: a temporary folder).")
    ] = None,
    overwrite: Overwrite = False,
    model: Model = DEFAULT_MODEL,
    dtype: Annotated[ModelDtype, typer.Option(help="Dtype of the megatron-core model.")] = ModelDtype.BF16,
    tokens: Annotated[int, typer.Option(help="Length of the two random sequences whose logits are compared.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the tokens.")] = 0,
    tp: TensorParallel = None,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    as_json: AsJson = False,
) -> None:
    """The demo's proof on a checkpoint of yours.

    Under torchrun the model is spread over all ranks; the reference runs on rank 0, layer by layer. Memory: the ranks'
    shares of the model in --dtype, and one layer of it while the reference runs. Disk: as much as the checkpoint.
    """
    with reporting(), TorchrunRanks(models=True), folder(out and out.parent) as parent, progress_bars() as progress:
        import torch

        from bridge.minimax_m2_bridge import MiniMaxM2Bridge
        from bridge.proof.reference_logits import random_tokens
        from bridge.proof.roundtrip import roundtrip as run

        target = out or parent / "exported"
        params_dtype = {ModelDtype.BF16: torch.bfloat16, ModelDtype.FP32: torch.float32}[dtype]
        with raise_on_all_ranks():
            bridge = MiniMaxM2Bridge.from_hf_pretrained(str(path))
        with bridge:
            say_notes(bridge.checkpoint.notes)
            sample = random_tokens(bridge.config, length=tokens, seed=seed)
            findings = run(
                bridge,
                target,
                sample,
                model=model,
                params_dtype=params_dtype,
                sizes=_sizes(tp, pp, ep),
                overwrite=overwrite,
                progress=progress,
            )
    _conclude(f"{path} -> megatron-core -> {target if out else 'Hugging Face'}", findings, as_json)


def bench(
    what: Annotated[
        Benchmark,
        typer.Argument(
            help="norm: query and key norms; layer: whole layers; experts: their products; adam: the optimizer's step; "
            "router: its products; fp8: block scales; load: live load and export; train: training steps; "
            "offline: import and export."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Where the result goes (JSON, with hardware, versions and date).")],
    gpus: Annotated[
        int,
        typer.Option(help="Ranks, one a GPU: tensor parallel size of norm, layer and load, expert parallel of train."),
    ] = 1,
    model: Annotated[
        ModelClass | None,
        typer.Option(help=f"The class whose layers are measured by layer (default: {DEFAULT_MODEL})."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Of train: one more step of each row, profiled, for the GPU's idle share.")
    ] = False,
) -> None:
    """Run a benchmark of tests/benchmarks, with its baselines, here. norm, layer, experts, adam, router need a GPU."""
    import torch

    script = Path(__file__).parents[2] / "tests" / "benchmarks" / f"bench_{what}.py"
    with reporting():
        if launched_by_torchrun():
            raise ValueError("bench starts its own ranks: run it without torchrun, with --gpus")
        if not script.is_file():
            raise ValueError(f"{script}: not there; benchmarks run from a checkout, installed with pip install -e .")
        if model is not None and what is not Benchmark.LAYER:
            raise ValueError(f"--model {model}: bench {what} measures no layers; leave --model out")
        if profile and what is not Benchmark.TRAIN:
            raise ValueError(f"--profile: bench {what} makes no training steps; leave --profile out")
        if gpus > 1 and what not in RUN_BY_RANKS:
            raise ValueError(f"--gpus {gpus}: bench {what} runs in one process; leave --gpus out")
        found, needed = torch.cuda.device_count(), gpus if gpus > 1 or what in NEED_A_GPU else 0
        if found < needed and (found or what not in STARTS_ITS_RANKS):
            raise ValueError(
                f"bench {what} needs NVIDIA GPUs: {needed}, found {found}; run it on a machine that has them"
            )
    own = what in STARTS_ITS_RANKS
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)] if gpus > 1 and not own else []
    ranks = ["--ranks", str(gpus), "--ep", str(gpus)] if own else []
    arguments = [str(out), *([] if model is None else [str(model)]), *ranks, *(["--profile"] if profile else [])]
    raise typer.Exit(subprocess.run([sys.executable, *launcher, str(script), *arguments], check=False).returncode)


def _sizes(tp: int | None, pp: int, ep: int) -> dict[str, int]:
    """megatron-core's parallel sizes. Without `tp`, all ranks of a stage; an expert is cut over what `ep` leaves.

    Raises:
        ValueError: the ranks do not divide by them.
    """
    _, world = rank_and_world_size()
    stage = world // pp
    tp = tp or max(1, stage)
    expert_tp = max(1, tp // ep)
    if not stage or world % pp or stage % tp or stage % (ep * expert_tp):
        raise ValueError(
            f"--tp {tp} --pp {pp} --ep {ep}: the number of ranks, over {pp} stages, must be a multiple of {tp}, and of "
            f"{ep} experts' ranks x {expert_tp} for each expert; found {world}; choose other sizes or torchrun "
            "--nproc-per-node"
        )
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": expert_tp,
    }


def _conclude(title: str, findings: list, as_json: bool) -> None:
    """Say what was proven; leave with status 1 if anything does not hold."""
    if as_json:
        say_json({"findings": findings})
    else:
        marks = {True: ("holds", "green"), False: ("FAILS", "red"), None: ("skipped", "yellow")}
        rows = [(finding.claim, finding.found, Text(*marks[finding.holds])) for finding in findings]
        say(title, rows, columns=("claim", "found", ""))
    if any(finding.holds is False for finding in findings):
        raise typer.Exit(1)
