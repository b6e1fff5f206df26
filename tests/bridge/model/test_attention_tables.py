"""The tables of the rotation that are kept with the angles: once for all layers, and never those of other angles."""

from types import SimpleNamespace

import pytest
import torch
from support.checks import NO_GPU
from support.oracles import Case
from torch import Tensor

from bridge.model import attention
from bridge.model.attention import kept_tables
from bridge.model.build import build_gpt_model
from bridge.model.process_groups import model_parallel

CASE = Case(heads=4, groups=2, head_dim=16, rotary=8, hidden=64, width=32, experts=2, top_k=1, layers=3, vocab=32)


def angles_of(seed: int) -> Tensor:
    half = torch.rand(6, 1, 1, 4, generator=torch.Generator().manual_seed(seed))
    return torch.cat([half, half], -1)


def assert_are_of(tables: tuple[Tensor, Tensor], angles: Tensor, dtype: torch.dtype) -> None:
    half = angles[:, 0, 0, :4]
    assert torch.equal(tables[0], half.cos().to(dtype))
    assert torch.equal(tables[1], half.sin().to(dtype))


def test_kept_with_the_angles_until_they_change():
    angles = angles_of(0)
    first = kept_tables(angles, torch.float32)
    assert kept_tables(angles, torch.float32)[0] is first[0]
    assert_are_of(first, angles, torch.float32)
    assert_are_of(kept_tables(angles, torch.bfloat16), angles, torch.bfloat16)
    angles.copy_(angles_of(1))
    assert_are_of(kept_tables(angles, torch.bfloat16), angles, torch.bfloat16)
    assert_are_of(kept_tables(angles.clone(), torch.bfloat16), angles, torch.bfloat16)


def test_nothing_of_inference_mode_is_left_for_training():
    angles = angles_of(0)
    with torch.inference_mode():
        kept_tables(angles, torch.float32)
        born_there = angles_of(0)
    assert not kept_tables(angles, torch.float32)[0].is_inference()
    assert not kept_tables(born_there, torch.float32)[0].is_inference()


def test_a_model_makes_them_once_for_all_layers_and_steps(monkeypatch):
    made = []
    plain = attention._tables
    monkeypatch.setattr(attention, "_tables", lambda *args: made.append(args) or plain(*args))
    with model_parallel():
        model = build_gpt_model(CASE.model_config()).eval()
        tokens = torch.randint(0, 32, (2, 7), device=next(model.parameters()).device)
        positions = torch.arange(7, device=tokens.device).expand(2, -1)
        model.rotary_pos_emb.forward.cache_clear()
        losses = [model(tokens, positions, None, labels=tokens).sum().item() for _ in range(2)]
    assert losses[0] == losses[1]
    assert len(made) == 1


def test_each_sequence_of_a_batch_may_have_angles_of_its_own():
    """As megatron-core's rotation takes them: `[seq, batch, 1, rotary_dim]`."""
    with model_parallel():
        attend = build_gpt_model(CASE.model_config(), params_dtype=torch.float32).decoder.layers[0].self_attention
        device = attend.qk_norm.q_weight.device
        x = torch.randn(6, 2, CASE.hidden, generator=torch.Generator().manual_seed(0)).to(device)
        angles = [angles_of(seed).to(device) for seed in (0, 1)]
        together, _ = attend(x, None, rotary_pos_emb=torch.cat(angles, 1))
        for one in (0, 1):
            alone, _ = attend(x[:, one : one + 1], None, rotary_pos_emb=angles[one])
            torch.testing.assert_close(together[:, one : one + 1], alone)
        assert (together - attend(x, None, rotary_pos_emb=angles[0])[0]).abs().max() > 1e-3


@NO_GPU
@pytest.mark.gpu
def test_a_cuda_graph_reads_the_angles_at_each_replay():
    """Also where the warm-up has kept tables with them."""
    angles, work = angles_of(0).cuda(), SimpleNamespace(tables=None)

    def run() -> None:
        work.tables = kept_tables(angles, torch.bfloat16)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    angles.copy_(angles_of(1))
    graph.replay()
    assert_are_of(work.tables, angles, torch.bfloat16)
