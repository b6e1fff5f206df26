"""The proof on one checkpoint: Hugging Face -> megatron-core -> Hugging Face, and the logits on the way.

Bytes are compared exactly. Logits are compared by what arithmetic allows: with the same weights, the reference is run
in the model's dtype and in a wider one (float64 for float32, float32 for bfloat16), which serves as the truth. The
megatron-core model passes if its error against the truth is at most twice the reference's own. In float32 the error is
the root mean square over all logits. In bfloat16 it is that of the median token: now and then rounding sends a token to
another expert, in the one run or in the other, and that token's error says nothing.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor, distributed, nn

from bridge.huggingface.companions import companions
from bridge.huggingface.writer import replaces
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import all_gather_objects, is_rank_zero, raise_on_all_ranks, rank_and_world_size
from bridge.jobs.target import check_apart, check_target, real_path
from bridge.minimax_m2_bridge import MiniMaxM2Bridge
from bridge.model.build import group_parallelism
from bridge.model.context_parallel import own_part, whole_sequence
from bridge.model.process_groups import model_parallel
from bridge.proof.compare import Comparison, compare_checkpoints
from bridge.proof.reference_logits import reference_logits
from reference.model_class import DEFAULT_MODEL, ModelClass
from reference.parallelism import Parallelism


def root_mean_square(logits: Tensor) -> float:
    """Over all logits."""
    return logits.double().square().mean().sqrt().item()


def median_token(logits: Tensor) -> float:
    """The root mean square over the vocabulary, of the median token."""
    return logits.double().square().mean(-1).sqrt().median().item()


MEASURES = {torch.float32: root_mean_square, torch.bfloat16: median_token}
WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
ALLOWED_ERROR_RATIO = 2.0


class Finding(NamedTuple):
    """A claim, what was found, and whether the claim holds; None where it could not be looked at."""

    claim: str
    found: str
    holds: bool | None


class LogitTruth(NamedTuple):
    """The reference's logits in a wider dtype, how errors against them are measured, and its own error."""

    logits: Tensor
    measure: Callable[[Tensor], float]
    own_error: float


def logit_truth(
    bridge: MiniMaxM2Bridge, tokens: Tensor, *, params_dtype: torch.dtype, progress: Progress = no_progress
) -> LogitTruth:
    """Run the reference in `params_dtype` and in the wider dtype of `WIDER`, layer by layer, on the same weights.

    Raises:
        ValueError: `params_dtype` has no wider dtype here.
    """
    if params_dtype not in WIDER:
        raise ValueError(f"params_dtype must be one of {list(WIDER)}, found {params_dtype}")
    dtypes = (params_dtype, WIDER[params_dtype])
    own, truth = reference_logits(
        bridge.checkpoint, tokens, weight_dtype=params_dtype, compute_dtypes=dtypes, progress=progress
    )
    return LogitTruth(truth, MEASURES[params_dtype], MEASURES[params_dtype](own - truth))


def judge_logits(who: str, logits: Tensor, truth: LogitTruth) -> Finding:
    """Whether someone's logits are as near to the truth as the reference's own, up to `ALLOWED_ERROR_RATIO`."""
    error, size = truth.measure(logits - truth.logits), truth.measure(truth.logits)
    found = f"relative error {error / size:.1e}; the reference's own in this dtype {truth.own_error / size:.1e}"
    return Finding(f"logits: {who} = reference", found, error <= ALLOWED_ERROR_RATIO * truth.own_error)


@torch.no_grad()
def megatron_logits(model: GPTModel | HybridModel, tokens: Tensor, vocab_size: int) -> Tensor:
    """Logits [batch, seq, vocab] of a megatron-core model, on every rank; megatron-core's schedule runs the stages.

    `model` is the rank's chunk: without virtual stages.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)

    def forward_step(_: None, chunk: nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
        return chunk(own_part(tokens), own_part(positions), None), lambda output, non_loss_data: output

    (batch, length), last = tokens.shape, distributed.get_world_size() - 1
    run: Callable[..., Any] = get_forward_backward_func()
    outputs = run(
        forward_step_func=forward_step,
        data_iterator=None,
        model=model.eval(),
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if outputs:  # the last stage's
        of_whole_vocabulary = gather_from_tensor_model_parallel_region(outputs[0])[..., :vocab_size]
        logits = whole_sequence(of_whole_vocabulary).contiguous()
    else:
        logits = torch.empty((batch, length, vocab_size), dtype=model.config.params_dtype, device=tokens.device)
    distributed.broadcast(logits, last)
    return logits


def roundtrip(
    bridge: MiniMaxM2Bridge,
    out: Path,
    tokens: Tensor,
    *,
    model: ModelClass | str = DEFAULT_MODEL,
    params_dtype: torch.dtype = torch.bfloat16,
    sizes: Mapping[str, int] | None = None,
    others: dict[str, Callable[[], Tensor]] | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[Finding]:
    """Import the bridge's checkpoint into a real megatron-core model, compare logits, export to `out`, compare bytes.

    `model` is the class, "gpt" or "hybrid". Under torchrun it is spread over the ranks by `sizes`, as in
    `bridge.model.process_groups.model_parallel`; all of them export and compare bytes, and all have the findings; the
    reference runs on rank 0. `others` are further models whose logits on the same tokens are judged likewise, by name;
    rank 0 calls them. The reference runs before the model is built, so that memory holds one layer and then one model.
    In a narrower `params_dtype` than the source's own (float32 norms into bfloat16) bytes differ, and the findings say
    so.

    Raises:
        ValueError: the checkpoint is damaged, `out` cannot be used, or the model does not divide by `sizes`. All ranks
            raise the same.
    """
    with model_parallel(**(sizes or {})):
        with raise_on_all_ranks():  # what can be wrong is found now, not after the reference has run
            files = bridge.checkpoint.files
            check_apart(out, [files.folder])
            carried = map(str, companions(files.folder).carried)
            check_target(real_path(out), replaces=replaces(carried) if overwrite else None)
            claim = f"megatron-core {ModelClass(model).class_name}"
            _check_layout(group_parallelism(bridge.config), tokens)
            logits, truth = {}, None
            if is_rank_zero():
                with _all_cores():
                    logits = {who: call() for who, call in (others or {}).items()}
                    truth = logit_truth(bridge, tokens, params_dtype=params_dtype, progress=progress)
        # The local spec: Transformer Engine's float32 products are TensorFloat-32, a thousand times less exact.
        chunk = bridge.to_megatron_model(model=model, params_dtype=params_dtype, backend="local", progress=progress)
        assert not isinstance(chunk, list), "`sizes` have no virtual stages"
        device = next(chunk.parameters()).device
        found = megatron_logits(chunk, tokens.to(device), bridge.config.vocab_size).cpu()
        logits = {claim: found, **logits}
        quantization = "fp8" if bridge.checkpoint.quantized else None
        bridge.save_hf_pretrained(chunk, out, quantization=quantization, overwrite=overwrite, progress=progress)
        same = compare_checkpoints(bridge.checkpoint.files.folder, out, progress=progress)
        with raise_on_all_ranks():
            judged = [] if truth is None else [judge_logits(who, theirs, truth) for who, theirs in logits.items()]
        return [*all_gather_objects(judged)[0], *_byte_findings(same)]


def _check_layout(layout: Parallelism, tokens: Tensor) -> None:
    if layout.vpp > 1:
        raise ValueError(f"found {layout.vpp} virtual stages a rank, expected 1: they need several micro-batches")
    if tokens.shape[1] % layout.tp:
        raise ValueError(
            f"{tokens.shape[1]} tokens a sequence, expected a multiple of the {layout.tp} ranks they are cut over"
        )


@contextmanager
def _all_cores() -> Iterator[None]:
    """While the other ranks wait, theirs too: torchrun gives each rank one thread."""
    if rank_and_world_size()[1] == 1:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _byte_findings(same: Comparison) -> list[Finding]:
    compared = f"{same.tensors} tensors, {same.nbytes / 1e6:.1f} MB, and {same.files} other files compared"
    findings = [Finding("bytes: exported = source", compared, not same.differences)]
    findings += [Finding("bytes differ", f"{name}: {what}", False) for name, what, *_ in same.differences[:10]]
    if len(same.differences) > 10:
        findings.append(Finding("bytes differ", f"{len(same.differences) - 10} more differences", False))
    return findings
