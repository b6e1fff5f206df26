"""Forward and backward passes captured as CUDA graphs: replays on new inputs equal eager runs, bit for bit.

Captured are attention, with one sequence and with packed ones, alone and over two tensor-parallel ranks; and a whole
layer whose experts are padded to a fixed number of tokens (the usual number is known only once the router has run, and
megatron-core waits for it).
"""

import gc
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from torch.multiprocessing import spawn

from bridge.model.build import build_gpt_model
from bridge.model.process_groups import model_parallel
from reference.config import ModelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")]

CONFIG = ModelConfig(
    num_hidden_layers=1,
    hidden_size=256,
    vocab_size=64,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    rotary_dim=32,
    intermediate_size=128,
    num_local_experts=4,
    num_experts_per_tok=2,
)
SEQ, REPLAYS = 128, 3
STARTS = (0, 48, 64, 128)
EVERY_TOKEN_TO_EVERY_EXPERT = {  # those not chosen weigh 0
    "moe_expert_capacity_factor": CONFIG.num_local_experts / CONFIG.num_experts_per_tok,
    "moe_pad_expert_input_to_capacity": True,
}


class _Attention(nn.Module):
    def __init__(self, layer: nn.Module, packed: PackedSeqParams | None) -> None:
        super().__init__()
        self.attention, self.packed = layer.self_attention, packed

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        return self.attention(x, None, rotary_pos_emb=angles, packed_seq_params=self.packed)[0]


class _Layer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.layer(x, attention_mask=None, rotary_pos_emb=angles)[0]
        # megatron-core keeps it until the next pass, and with it this pass's backward nodes and their stream.
        self.layer.mlp.token_dispatcher.probs = None
        return y


def _build(what: str, **settings) -> tuple[nn.Module, Tensor]:
    """The module to capture and its angles."""
    model = build_gpt_model(CONFIG, **(EVERY_TOKEN_TO_EVERY_EXPERT if what == "layer" else {}), **settings)
    layer, packed, longest = model.decoder.layers[0], None, SEQ
    if what == "packed attention":
        starts = torch.tensor(STARTS, dtype=torch.int32, device="cuda")
        longest = 64
        packed = PackedSeqParams("thd", starts, starts, max_seqlen_q=longest, max_seqlen_kv=longest)
    angles = model.rotary_pos_emb(longest, packed_seq=packed is not None)
    return _Layer(layer) if what == "layer" else _Attention(layer, packed), angles


def _run(module: nn.Module, angles: Tensor, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x, grad = torch.randn(2, SEQ, 1, CONFIG.hidden_size, device="cuda", generator=generator).bfloat16()
    x.requires_grad_()
    module.zero_grad()
    y = module(x, angles)
    y.backward(grad)
    grads = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"output": y.detach().clone(), "input gradient": x.grad, **grads}


def _assert_replays_equal_eager(what: str, **settings) -> None:
    module, angles = _build(what, **settings)
    eager = [_run(module, angles, seed) for seed in range(REPLAYS)]
    sample = torch.zeros(SEQ, 1, CONFIG.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(module, (sample, angles))
    for seed, expected in enumerate(eager):
        found = _run(graphed, angles, seed)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert value.any(), name
            assert torch.equal(found[name], value), (what, name, (found[name] - value).abs().max())
    del module, graphed
    gc.collect()  # a graph with collectives must go before its process group, which waits for it


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Atomic additions in attention's backward pass would differ from run to run."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@pytest.mark.parametrize("what", ["attention", "packed attention", "layer"])
def test_replays_equal_eager(what):
    with model_parallel():
        _assert_replays_equal_eager(what)


def _rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=rank, world_size=2)
    with model_parallel(tensor_model_parallel_size=2):
        _assert_replays_equal_eager("attention", tensor_model_parallel_size=2)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_replays_equal_eager_on_two_ranks(tmp_path: Path):
    """The norm's all-reduces are captured too."""
    spawn(_rank, (str(tmp_path),), nprocs=2)
