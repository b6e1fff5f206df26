"""Import and export without a model, each into several files, and what comes of it by the reference."""

from pathlib import Path

import torch
from torch import Tensor

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, ExportSummary, export_checkpoint
from reference.fp8 import FP8, dequantize_blockwise

UNIT_BYTES, SHARD_BYTES = 100_000, 150_000
SCALE = "_scale_inv"
Q = "model.layers.1.self_attn.q_proj.weight"
W2 = "model.layers.0.block_sparse_moe.experts.3.w2.weight"


def imported_from(source: Path, out: Path, **options) -> Path:
    job = ImportJob(str(source), str(out), **{"unit_bytes": UNIT_BYTES} | options)
    import_checkpoint(job)
    return out


def export(megatron: Path, out: Path, **options) -> ExportSummary:
    return export_checkpoint(ExportJob(str(megatron), str(out), **{"max_shard_bytes": SHARD_BYTES} | options))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """By the reference; what is not quantised as it is."""
    found = {}
    for name, value in tensors.items():
        if value.dtype == FP8:
            found[name] = dequantize_blockwise(value, tensors[name + SCALE], dtype=dtype)
        elif not name.endswith(SCALE):
            found[name] = value
    return found


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(bits(found[name]), bits(value)), name
