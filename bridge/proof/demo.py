"""The proof on a small checkpoint made on the spot, for a machine that has none: `minimax-m2 demo`."""

from collections.abc import Mapping
from pathlib import Path

import torch

from bridge.huggingface.byte_tokenizer import byte_tokenizer_files
from bridge.huggingface.random_checkpoint import CARRIED_FILES, SMALL_CONFIG, make_checkpoint
from bridge.jobs.progress import Progress, no_progress
from bridge.jobs.ranks import is_rank_zero, raise_on_all_ranks
from bridge.minimax_m2_bridge import MiniMaxM2Bridge
from bridge.model.process_groups import model_parallel
from bridge.proof.reference_logits import random_tokens
from bridge.proof.roundtrip import Finding, roundtrip
from bridge.proof.transformers_logits import missing_packages, transformers_logits
from reference.model_class import DEFAULT_MODEL, ModelClass

SHARD_BYTES = 4_000_000  # small, so that there are several files


def demo(
    folder: Path,
    *,
    model: ModelClass | str = DEFAULT_MODEL,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    progress: Progress = no_progress,
) -> list[Finding]:
    """Make an FP8 checkpoint in `folder`/source, take it through megatron-core into `folder`/exported, compare the two.

    The model runs in float32, where equality of logits means most; `model` and `sizes` are those of `roundtrip`.

    Raises:
        ValueError: one of the two folders is there and not empty, or the model does not divide by `sizes`.
    """
    source, missing = folder / "source", missing_packages()
    with model_parallel(**(sizes or {})):
        with raise_on_all_ranks():
            if is_rank_zero():
                make_checkpoint(
                    source,
                    SMALL_CONFIG,
                    seed=seed,
                    mtp_layers=1,
                    max_shard_bytes=SHARD_BYTES,
                    carried=CARRIED_FILES | byte_tokenizer_files(),
                    progress=progress,
                )
        with raise_on_all_ranks():
            bridge = MiniMaxM2Bridge.from_hf_pretrained(source)
        with bridge:
            tokens = random_tokens(bridge.config, seed=seed)
            oracle = {"transformers MiniMaxM2ForCausalLM": lambda: transformers_logits(source, tokens)}
            others, target = {} if missing else oracle, folder / "exported"
            options = {"model": model, "params_dtype": torch.float32, "others": others}
            findings = roundtrip(bridge, target, tokens, **options, progress=progress)
            files = bridge.checkpoint.files
            made = Finding(
                "made an FP8 checkpoint",
                f"{len(files.tensors)} tensors in {files.num_files} files, "
                f"{files.nbytes / 1e6:.1f} MB, {len(bridge.checkpoint.mtp_tensors)} of them MTP",
                True,
            )
    if missing:
        note = f"not compared: {', '.join(missing)} not installed; pip install -e '.[test]' brings it"
        findings.append(Finding("logits: transformers = reference", note, None))
    return [made, *findings]
