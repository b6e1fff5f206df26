"""Attention over packed sequences and over context-parallel ranks: positions of the rotation, outputs, gradients.

Each token's heads, normed and rotated, are compared exactly on any host: with a projection that passes its input
through, everything before core attention is row by row. Outputs and gradients are measured against `transformers` on
each sequence alone, in float64: with Transformer Engine on GPUs; elsewhere with megatron-core's local core attention,
which is given one sequence at a time. (Start Python with NVIDIA_TF32_OVERRIDE=0 on GPUs, as `test_training.py` says.)
"""

from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from support.megatron_training import OneSequenceAtATime
from support.oracles import (
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
    disk_weights,
    hf_model,
    remove_float32_casts,
    to_disk_names,
)
from torch import Tensor, nn
from torch.multiprocessing import spawn

from bridge.model.attention import packed_positions
from bridge.model.build import build_gpt_model
from bridge.model.process_groups import model_parallel
from bridge.weights.param_mapping import model_rows, model_state
from reference.model_class import ModelClass
from reference.sharding import Parallelism, parameters, placements, shard, unshard
from reference.weights import MODEL_DIALECTS

CASE = Case(heads=8, groups=2, head_dim=64, rotary=32, hidden=96, width=24, experts=4, top_k=2, layers=1, vocab=64)
CONFIG = CASE.model_config()
LENGTHS = (16, 8, 40)  # in two halves for each of up to four context-parallel ranks
TOKENS = sum(LENGTHS)
CONTEXT = 2

GPUS = torch.cuda.device_count()
DEVICE = "cuda" if GPUS else "cpu"
DTYPES = [FLOAT32, BFLOAT16] if GPUS else [FLOAT32]
ALLOWED = 2.0  # times the error of the reference implementation, which is as long a chain of roundings

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def _groups():
    with model_parallel():
        yield


class ProcessGroupInfo:
    """What megatron-core asks a context-parallel group."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = (lambda: rank), (lambda: size)


def pack(lengths: tuple[int, ...], *, stored: tuple[int, ...] | None = None, **settings) -> PackedSeqParams:
    """`stored`: the lengths with padding."""
    starts, starts_stored = (
        None if sizes is None else torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=DEVICE)
        for sizes in (lengths, stored)
    )
    longest = max(stored or lengths)
    return PackedSeqParams(
        "thd", starts, starts, starts_stored, starts_stored, max_seqlen_q=longest, max_seqlen_kv=longest, **settings
    )


def rows_of_rank(lengths: tuple[int, ...], rank: int, size: int) -> list[int]:
    """Of every sequence, cut into 2 x size chunks, those that megatron-core gives a rank: one early and one late."""
    rows, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * size)
        rows += [*chunks[rank].tolist(), *chunks[2 * size - 1 - rank].tolist()]
        start += length
    return rows


def random_rows(width: int, dtype: torch.dtype, seed: int) -> Tensor:
    rows = torch.randn(TOKENS, 1, width, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)
    return rows.to(dtype)


# ------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("lengths", "stored"),
    [((8, 8), None), (LENGTHS, None), ((0, 16, 0, 8, 0), None), ((5, 1, 9), (8, 8, 16))],
    ids=["equal", "different", "empty ones", "padded"],
)
def test_positions_are_megatrons(lengths, stored, size):
    packed = pack(lengths, stored=stored)
    starts = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    every = torch.arange(packed.max_seqlen_q, device=DEVICE)
    for rank in range(size):
        sequences = [torch.empty((stop - start) // size) for start, stop in pairwise(starts.tolist())]
        expected = torch.cat([rope_utils._get_thd_freqs_on_this_cp_rank(rank, size, x, every) for x in sequences])
        found = packed_positions(packed, len(expected), ProcessGroupInfo(rank, size))
        assert torch.equal(found, expected)


def test_positions_follow_the_group_of_the_batch():
    """Dynamic context parallelism: a batch brings a group, or says that each rank has whole sequences."""
    for packed, ranks in [
        (pack(LENGTHS, cp_group=ProcessGroupInfo(1, 2), local_cp_size=2), ProcessGroupInfo(1, 2)),
        (pack(LENGTHS, local_cp_size=1), ProcessGroupInfo(0, 1)),
    ]:
        found = packed_positions(packed, TOKENS // ranks.size(), ProcessGroupInfo(3, 4))
        assert torch.equal(found, packed_positions(pack(LENGTHS), TOKENS // ranks.size(), ranks))


# ---------------------------------------------------------------------------------------- heads before core attention


class _PassOn(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


class _KeepHeads(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        self.heads = [x.view(-1, *x.shape[-2:]) for x in (query, key, value)]
        return query.flatten(-2)


def _heads(model, mixed_qkv: Tensor, angles: Tensor, packed: PackedSeqParams | None = None) -> list[Tensor]:
    attention = model.decoder.layers[0].self_attention
    attention.linear_qkv, attention.core_attention = _PassOn(), _KeepHeads()
    attention(mixed_qkv, None, rotary_pos_emb=angles, packed_seq_params=packed)
    return attention.core_attention.heads


@pytest.fixture
def on_host(monkeypatch):
    """Without a GPU: megatron-core's choice of a rank's angles goes through pinned memory."""
    if not GPUS:
        make = torch.tensor
        monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs))
        monkeypatch.setattr(Tensor, "cuda", lambda self, **kwargs: self)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["one sequence", "packed"])
def test_heads_are_those_of_each_sequence_alone(lengths, size, monkeypatch, on_host):
    mixed_qkv = random_rows((CASE.heads + 2 * CASE.groups) * CASE.head_dim, FLOAT32, seed=1).to(DEVICE)
    model = load_model(FLOAT32)
    attention = model.decoder.layers[0].self_attention
    torch.nn.init.normal_(attention.qk_norm.q_weight)
    torch.nn.init.normal_(attention.qk_norm.k_weight)
    rotary, sizes = model.rotary_pos_emb, lengths or (TOKENS,)
    alone = [_heads(model, x, rotary(len(x))) for x in mixed_qkv.split(sizes)]
    expected = [torch.cat(part) for part in zip(*alone, strict=True)]
    for rank in range(size):
        ranks, rows = ProcessGroupInfo(rank, size), rows_of_rank(sizes, rank, size)
        monkeypatch.setattr(attention.pg_collection, "cp", ranks)
        packed = pack(lengths) if lengths else None
        angles = rotary(max(sizes), packed_seq=bool(lengths), cp_group=ranks)
        for found, whole in zip(_heads(model, mixed_qkv[rows], angles, packed), expected, strict=True):
            assert torch.equal(found, whole[rows])


# --------------------------------------------------------------------------------------------- outputs and gradients


def held_by(model):
    """What `reference.sharding` says that the model holds, under the names of the layer spec it was built from."""
    dialect = next(iter(model_rows(list(model_state(model)), MODEL_DIALECTS[ModelClass.GPT])))
    return parameters(CONFIG, Parallelism(), 0, dialect)


def load_model(dtype: torch.dtype, **settings):
    model = build_gpt_model(CONFIG, params_dtype=dtype, **settings)
    state, weights = model_state(model), disk_weights(CASE, dtype=dtype)
    with torch.no_grad():
        for parameter in held_by(model):
            state[parameter.name].copy_(shard(parameter, weights))
    return model


def attend(model, x: Tensor, grad: Tensor, *, context: int = 1, packed: PackedSeqParams | None = None) -> Tensors:
    """The layer up to the attention's output, forward and backward; weights' gradients under on-disk names."""
    layer, x = model.decoder.layers[0], x.to(DEVICE).requires_grad_()
    longest = packed.max_seqlen_q if packed else len(x) * context
    angles = model.rotary_pos_emb(longest, packed_seq=packed is not None)
    model.zero_grad()
    y, _ = layer.self_attention(layer.input_layernorm(x), None, rotary_pos_emb=angles, packed_seq_params=packed)
    y.backward(grad.to(DEVICE))
    grads = {(0, 0, name): p.grad.cpu() for name, p in model_state(model).items() if p.grad is not None}
    held = placements({0: held_by(model)})
    places = {source: found for source, found in held.items() if (0, 0, found[0].name) in grads}
    on_disk = {source: unshard(found, grads) for source, found in places.items()}
    return {"output": y.detach().cpu(), "input gradient": x.grad.cpu(), **on_disk}


def attend_alone(attend_one, x: Tensor, grad: Tensor, lengths: tuple[int, ...]) -> Tensors:
    """Each sequence in a run of its own: rows put together, weights' gradients added up (in float64)."""
    runs = [attend_one(*sequence) for sequence in zip(x.split(lengths), grad.split(lengths), strict=True)]
    rows = ("output", "input gradient")
    return {
        name: torch.cat([run[name] for run in runs]) if name in rows else sum(run[name].double() for run in runs)
        for name in runs[0]
    }


def run_transformers(weight_dtype: torch.dtype, dtype: torch.dtype, x: Tensor, grad: Tensor, lengths) -> Tensors:
    weights = disk_weights(CASE, dtype=weight_dtype)
    model = hf_model(CASE, {name: value.to(dtype) for name, value in weights.items()}, dtype).model
    layer = model.layers[0]

    def one(x: Tensor, grad: Tensor) -> Tensors:
        x = x.to(dtype).transpose(0, 1).detach().requires_grad_()
        length = x.shape[1]
        mask = torch.full((1, 1, length, length), -torch.inf, dtype=dtype).triu(1)
        model.zero_grad()
        y, _ = layer.self_attn(
            layer.input_layernorm(x), model.rotary_emb(x, torch.arange(length)[None]), attention_mask=mask
        )
        y.backward(grad.to(dtype).transpose(0, 1))
        named = {f"model.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"output": y.detach().transpose(0, 1), "input gradient": x.grad.transpose(0, 1), **to_disk_names(named)}

    return attend_alone(one, x, grad, lengths)


def truth_of(dtype: torch.dtype, x: Tensor, grad: Tensor, lengths) -> Tensors:
    with pytest.MonkeyPatch.context() as patch:
        remove_float32_casts(patch)
        return run_transformers(dtype, FLOAT64, x, grad, lengths)


def assert_as_exact(ours: Tensors, theirs: Tensors, truth: Tensors, dtype: torch.dtype) -> None:
    """Norms over each tensor, of the errors against the truth; one rounding of the tensor is granted to both."""
    assert ours.keys() == theirs.keys() == truth.keys()
    ratios = {}
    for name, exact in truth.items():
        granted = torch.finfo(dtype).eps / 2 * exact.norm()
        error, own = ((side[name].double() - exact).norm() + granted for side in (ours, theirs))
        ratios[name] = (error / own).item()
    worst = max(ratios, key=ratios.get)
    print(f"error over the reference's: mean {sum(ratios.values()) / len(ratios):.2f}, {ratios[worst]:.2f} ({worst})")
    assert ratios[worst] <= ALLOWED, ratios


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_attention_is_each_sequence_alone(dtype):
    x, grad = random_rows(CASE.hidden, dtype, seed=2), random_rows(CASE.hidden, dtype, seed=3)
    model = load_model(dtype)
    alone = attend_alone(lambda *sequence: attend(model, *sequence), x, grad, LENGTHS)
    if not GPUS:
        attention = model.decoder.layers[0].self_attention
        attention.core_attention = OneSequenceAtATime(attention.core_attention)
    packed = attend(model, x, grad, packed=pack(LENGTHS))
    truth = truth_of(dtype, x, grad, LENGTHS)
    assert_as_exact(packed, alone, truth, dtype)
    assert_as_exact(packed, run_transformers(dtype, dtype, x, grad, LENGTHS), truth, dtype)
    whole = truth_of(dtype, x, grad, (TOKENS,))  # what attention across the borders would give
    assert (whole["output"] - truth["output"]).norm() > 0.1 * truth["output"].norm()


def test_packed_sequences_without_transformer_engine_are_refused():
    x = random_rows(CASE.hidden, FLOAT32, seed=2)
    model = load_model(FLOAT32, backend="local")
    with pytest.raises(ValueError, match=r"qkv_format='thd'.* use the layer spec with backend='tr"):
        attend(model, x, x, packed=pack(LENGTHS))


# ---------------------------------------------------------------------------------------- context parallelism on GPUs

LAYOUTS = {"one sequence": (TOKENS,), "packed": LENGTHS}


def _rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("nccl", init_method=store, rank=rank, world_size=CONTEXT)
    x, grad = (random_rows(CASE.hidden, BFLOAT16, seed=seed) for seed in (2, 3))
    with model_parallel(context_parallel_size=CONTEXT):
        model = load_model(BFLOAT16, context_parallel_size=CONTEXT)
        for name, lengths in LAYOUTS.items():
            rows = rows_of_rank(lengths, rank, CONTEXT)
            packed = pack(lengths) if len(lengths) > 1 else None
            torch.save(attend(model, x[rows], grad[rows], context=CONTEXT, packed=packed), f"{folder}/{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < CONTEXT, reason="context parallelism needs Transformer Engine's attention and two GPUs")
def test_context_parallel_attention_is_that_of_one_rank(tmp_path: Path):
    """bfloat16: Transformer Engine has no context parallelism for float32."""
    x, grad = (random_rows(CASE.hidden, BFLOAT16, seed=seed) for seed in (2, 3))
    spawn(_rank, (str(tmp_path),), nprocs=CONTEXT)
    model = load_model(BFLOAT16)
    for name, lengths in LAYOUTS.items():
        alone = attend_alone(lambda *sequence: attend(model, *sequence), x, grad, lengths)
        ranks = [torch.load(tmp_path / f"{name}.{rank}.pt") for rank in range(CONTEXT)]
        order = torch.tensor([rows_of_rank(lengths, rank, CONTEXT) for rank in range(CONTEXT)]).flatten().argsort()
        found = {
            key: torch.cat([r[key] for r in ranks])[order]
            if key in ("output", "input gradient")
            else sum(r[key].double() for r in ranks)
            for key in ranks[0]
        }
        print(name, end=": ")
        assert_as_exact(found, alone, truth_of(BFLOAT16, x, grad, lengths), BFLOAT16)
