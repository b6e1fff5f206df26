"""The logits of `transformers`' own MiniMaxM2ForCausalLM, which reads and dequantises the files by itself.

`transformers` is not needed to use the bridge; it is in the `test` extra, and the demo uses it when it is installed.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from packaging.version import Version
from torch import Tensor

NEEDED = {"transformers": "5.18", "accelerate": "1"}  # transformers 5.0 to 5.17 rotates every channel


def missing_packages() -> list[str]:
    """What must be installed before `transformers_logits` can be called, or is older than it must be."""
    return [f"{name} >= {least}" for name, least in NEEDED.items() if not _installed(name, least)]


def _installed(name: str, least: str) -> bool:
    try:
        return Version(version(name)) >= Version(least)
    except PackageNotFoundError:
        return False


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits [batch, seq, vocab] in float32, with weights dequantised to float32 by `transformers`.

    `transformers` dequantises only weights whose sizes are multiples of the block size.
    """
    from transformers import FineGrainedFP8Config, MiniMaxM2ForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it lists carried MTP tensors as unexpected
    logging.disable_progress_bar()
    model = MiniMaxM2ForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        attn_implementation="eager",
    )
    return model.float().eval()(tokens).logits
