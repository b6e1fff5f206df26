"""Parameters that are gathered while the forward pass runs, and CUDA graphs: what a processor can show of the two.

The hooks are megatron-core's own, of its `DistributedDataParallel`; only the capture needs a GPU.
"""

from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from support.overlap import train_steps
from support.ranks import RankPool
from support.small_model import SMALL
from support.training_runs import make_source
from torch import nn

from bridge.model.build import build_model
from bridge.model.config import transformer_config
from bridge.model.process_groups import model_parallel
from bridge.model.safe_settings import REFUSALS, check_settings
from bridge.training.cuda_graphs import CudaGraphs, without_gather_hooks
from bridge.training.optimizer import ddp_config

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="builds the local layers")
GATHERING = "CUDA graphs, gathering parameters"


def wrapped_model(*, overlap: bool) -> DistributedDataParallel:
    model = build_model(SMALL, params_dtype=torch.float32)
    return DistributedDataParallel(model.config, ddp_config(model.config, overlap=overlap), model)


def hooked(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module._forward_pre_hooks}


def test_hooks_are_off_for_a_capture_and_back_after_it() -> None:
    with model_parallel():
        wrapped = wrapped_model(overlap=True)
        before = hooked(wrapped.module)
        assert {"embedding.word_embeddings", "decoder.layers.0.self_attention.qk_norm"} <= before
        with without_gather_hooks([wrapped]) as any_hooked:
            assert any_hooked
            assert hooked(wrapped.module) == set()
        assert hooked(wrapped.module) == before
        with pytest.raises(RuntimeError, match="capture"), without_gather_hooks([wrapped]):
            raise RuntimeError("capture failed")
        assert hooked(wrapped.module) == before


def test_without_overlap_there_is_nothing_to_take_off() -> None:
    with model_parallel():
        wrapped = wrapped_model(overlap=False)
        with without_gather_hooks([wrapped]) as any_hooked:
            assert not any_hooked
        assert hooked(wrapped.module) == set()


def test_a_captured_layer_waits_for_all_of_its_parameters() -> None:
    """Before a replay it calls hooks for every module under the graphs that has parameters, ours among them."""
    with model_parallel():
        wrapped = wrapped_model(overlap=True)
        layer = wrapped.module.decoder.layers[0]
        layer.config.cuda_graph_modules = transformer_config(SMALL, **CudaGraphs.settings).cuda_graph_modules
        layer.setup_manual_hooks(wrapped._make_forward_pre_hook)
        waiting = {id(module) for _, (module,) in layer.cuda_graph_manual_hooks}
        captured = [layer.input_layernorm, layer.self_attention, layer.pre_mlp_layernorm, layer.mlp.router]
        held = {name for name, module in layer.named_modules() if id(module) in waiting}
        modules = [module for part in captured for module in part.modules()]
        owners = {id(one) for one in modules if next(one.parameters(recurse=False), None) is not None}
        assert waiting == owners
        assert {"self_attention.linear_qkv", "self_attention.qk_norm", "self_attention.linear_proj"} <= held
        assert {"mlp.router", "pre_mlp_layernorm"} <= held
        for hook, arguments in layer.cuda_graph_manual_hooks:
            hook(*arguments)


def test_overlapped_steps_are_the_same_and_go_on_after_a_capture(tmp_path: Path) -> None:
    """On two data-parallel ranks, bit for bit; what runs with the hooks off sees parameters that are not gathered."""
    source = make_source(tmp_path / "source", fp8=False, num_hidden_layers=2)
    with RankPool(2) as pool:
        plain, overlapped = (pool.call(train_steps, str(source), overlap) for overlap in (False, True))
    for rank in range(2):
        ours, theirs = overlapped[rank], plain[rank]
        assert ours["losses"] == theirs["losses"]
        assert all(torch.equal(value, theirs["weights"][name]) for name, value in ours["weights"].items())
        assert torch.equal(theirs["logits"][0], theirs["logits"][1])
        assert torch.equal(ours["logits"][1], theirs["logits"][1])
        assert not torch.equal(ours["logits"][0], ours["logits"][1])


def test_graphs_do_not_overlap_as_long_as_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = transformer_config(SMALL)
    graphs = transformer_config(SMALL, **CudaGraphs.settings)
    assert ddp_config(eager, overlap=True).overlap_param_gather
    found = ddp_config(graphs, overlap=True)
    assert (found.overlap_grad_reduce, found.overlap_param_gather) == (True, False)
    check_settings(graphs, found)
    refused = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    with pytest.raises(ValueError, match="hooks that gather their parameters"):
        check_settings(graphs, refused)
    monkeypatch.delitem(REFUSALS, GATHERING)
    assert ddp_config(graphs, overlap=True).overlap_param_gather
