"""On a GPU: a checkpoint that we import loads into Transformer Engine's model, and what that saves is exported."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from support.checkpoints import EDGY_CONFIG
from torch.distributed.checkpoint import FileSystemReader

from bridge.convert.hf_to_torch_dist import ImportJob, import_checkpoint
from bridge.convert.torch_dist_to_hf import ExportJob, export_checkpoint
from bridge.huggingface.checkpoint import HuggingFaceCheckpoint
from bridge.huggingface.random_checkpoint import make_checkpoint
from bridge.model.build import build_model
from bridge.model.process_groups import model_parallel
from bridge.proof.compare import compare_checkpoints
from bridge.weights.param_mapping import model_state
from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.sharding import parameters, shard
from reference.weights import MODEL_DIALECTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and Transformer Engine"),
]

# Transformer Engine wants sizes that are multiples of 16.
CONFIG = {**EDGY_CONFIG, "head_dim": 64, "rotary_dim": 32, "num_local_experts": 4, "intermediate_size": 80}


def keys_of(folder: Path) -> set[str]:
    """Of tensors and objects, as torch reads them."""
    return set(FileSystemReader(folder).read_metadata().state_dict_metadata)


@pytest.mark.parametrize("kind", ModelClass)
def test_there_and_back(tmp_path: Path, kind: ModelClass) -> None:
    source, megatron, saved, back = (tmp_path / name for name in ("source", "megatron", "saved", "back"))
    make_checkpoint(source, CONFIG, mtp_layers=1)
    import_checkpoint(ImportJob(str(source), str(megatron), model=kind))
    weights = HuggingFaceCheckpoint(source)
    with model_parallel():
        model = build_model(weights.config, model=kind, backend="transformer_engine")
        state = dist_checkpointing.load(model.sharded_state_dict(), str(megatron / "iter_0000001"))
        model.load_state_dict({name: value for name, value in state.items() if name in model.state_dict()})
        live = model_state(model)
        for parameter in parameters(weights.config, Parallelism(), 0, MODEL_DIALECTS[kind][0]):
            tensors = {name: weights.read_weight(name, dtype=torch.bfloat16) for name in parameter.sources}
            assert torch.equal(live[parameter.name].cpu(), shard(parameter, tensors)), parameter.name
        saved.mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(saved))
    assert keys_of(megatron / "iter_0000001") == keys_of(saved)  # Transformer Engine's extra states among them
    summary = export_checkpoint(ExportJob(str(saved), str(back), source=str(source)))
    assert summary.requantised == 0
    assert compare_checkpoints(source, back).differences == []
