"""Live models on four gloo ranks, at every kind of parallelism: each rank's parameters are its slices of the files.

The truth is `reference.sharding.shard` of whole tensors dequantised by `reference.fp8`, compared bit for bit. Exports
are compared with the files. Widths are such that slices start and end inside blocks.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.checkpoints import all_tensors
from support.ranks import run_ranks
from torch import Tensor, distributed

from bridge.huggingface.random_checkpoint import SMALL_CONFIG, make_checkpoint
from reference.fp8 import dequantize_blockwise
from reference.parallelism import spread_layers
from reference.sharding import Parallelism, parameters, shard
from reference.weights import Dialect

WORLD = 4
CONFIG = SMALL_CONFIG | {
    "vocab_size": 131,
    "hidden_size": 320,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "rotary_dim": 24,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
LAYOUTS = {
    "tp2": Parallelism(tp=2, dp=2),
    "tp2 ep2, padded": Parallelism(tp=2, ep=2, etp=1, dp=2, vocab_divisor=64),
    "tp4, 2 key heads": Parallelism(tp=4, ep=4, etp=1),
    "etp4": Parallelism(tp=4, etp=4),
    "pp2": Parallelism(pp=2, dp=2, etp=2, layers_per_stage=(2, 3)),
    "tp2 pp2 vpp2": Parallelism(tp=2, pp=2, vpp=2, ep=2, etp=1, layers_per_stage=spread_layers(5, 4)),
}
SAVED = ("tp2 ep2, padded", "tp4, 2 key heads", "tp2 pp2 vpp2")
Q = "model.layers.1.self_attn.q_proj.weight"
SCALES = "_scale_inv"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "source"
    make_checkpoint(folder, CONFIG, seed=5, mtp_layers=1, max_shard_bytes=2_000_000)
    return folder


def test_every_rank_is_loaded_with_its_slices_and_gives_them_back(checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(_on_rank, (_every_layout, str(tmp_path / "store"), str(checkpoint), str(tmp_path)), WORLD)


def test_errors_reach_every_rank(checkpoint: Path, tmp_path: Path) -> None:
    run_ranks(_on_rank, (_errors, str(tmp_path / "store"), str(checkpoint), str(tmp_path)), WORLD)


# ----------------------------------------------------------------------------------------------------- on every rank


def _on_rank(rank: int, test: Callable[..., None], store: str, *arguments: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    test(rank, *arguments)
    distributed.destroy_process_group()


@contextmanager
def _groups(layout: Parallelism) -> Iterator[None]:
    from bridge.model.process_groups import model_parallel

    sizes = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "context_parallel_size": layout.cp,
    }
    with model_parallel(**sizes):
        yield


def _every_layout(rank: int, folder: str, scratch: str) -> None:
    from bridge import MiniMaxM2Bridge

    disk = all_tensors(Path(folder))
    for name, layout in LAYOUTS.items():
        with _groups(layout), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
            stages = layout.layers_per_stage if name == "pp2" else None  # None: as equally as can be
            model = bridge.to_megatron_model(
                load_weights=False, vocab_divisor=layout.vocab_divisor, layers_per_stage=stages
            )
            _check_loading(rank, layout, bridge, model, disk)
            _check_exports(rank, layout, bridge, model, disk)
            if name in SAVED:
                _check_saving(rank, bridge, model, disk, Path(scratch, name))
            if name == "tp2":
                _check_roundtrip(bridge, Path(scratch, "proven"))
            if name == "etp4":
                _check_one_changed_weight(rank, bridge, model, disk)


def _check_loading(rank: int, layout: Parallelism, bridge, model, disk: dict[str, Tensor]) -> None:
    from bridge.weights import load, read_plan
    from bridge.weights.sharded_model import sharded_model

    before = bridge.checkpoint.files.bytes_read
    bridge.load_hf_weights(model)
    read = bridge.checkpoint.files.bytes_read - before
    live = sharded_model(model, bridge.config)
    loaded = {key: value.clone() for key, value in live.state.items()}
    small = patch.multiple(read_plan, SLICE_BYTES=5_000, BATCH_BYTES=20_000)
    with small, patch.object(load, "WINDOW", 2), torch.no_grad():
        for value in live.state.values():
            value.fill_(7)
        batches = read_plan.plan_batches(live, bridge.checkpoint.files, 128)
        slices = sum(len(group.slices) for batch in batches for group in batch.groups)
        assert slices > sum(len(mapping.hf_params) for mapping in live.registry)
        assert len(batches) > 10
        before = bridge.checkpoint.files.bytes_read
        bridge.load_hf_weights(model)
        planned = sum(
            part.nbytes + part.scale_bytes for batch in batches for group in batch.groups for part in group.slices
        )
        assert bridge.checkpoint.files.bytes_read - before == planned
    assert all(torch.equal(value, loaded[key]) for key, value in live.state.items()), "in small pieces"
    found, at = live.parallelism, layout.coordinates(rank)
    assert (found.coordinates(rank), found.stages(bridge.config)) == (at, layout.stages(bridge.config))
    held = parameters(bridge.config, layout, rank, Dialect.MEGATRON_LOCAL)
    assert live.state.keys() == {(parameter.chunk, parameter.name) for parameter in held}
    expected = 0
    whole = _dequantized(disk)
    for parameter in held:
        value = live.state[parameter.chunk, parameter.name]
        assert torch.equal(value, shard(parameter, whole).to(value.dtype)), (layout, rank, parameter.name)
        expected += sum(_bytes_of_rows(piece, disk) for piece in parameter.pieces if piece.source)
    assert read == expected, (layout, rank)


def _bytes_of_rows(piece, disk: dict[str, Tensor]) -> int:
    """Of the rows that a piece has elements of, and of the rows of scales whose blocks these touch: all whole."""
    nbytes = disk[piece.source][slice(*piece.rows)].nbytes
    if piece.source + SCALES in disk:
        first, last = piece.rows
        nbytes += disk[piece.source + SCALES][first // 128 : -(-last // 128)].nbytes
    return nbytes


def _dequantized(disk: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: dequantize_blockwise(value, disk[name + SCALES]) if name + SCALES in disk else value
        for name, value in disk.items()
        if not name.endswith(SCALES)
    }


def _check_exports(rank: int, layout: Parallelism, bridge, model, disk: dict[str, Tensor]) -> None:
    ours = [name for name in disk if name not in bridge.checkpoint.mtp_tensors]
    order = None
    for to in ("all", 1, "spread"):
        exported = list(bridge.export_hf_weights(model, "source", to=to))
        names = [name for name, _ in exported]
        if to == "all":
            order = names
            assert sorted(order) == sorted(ours)
        for name, value in exported:
            assert torch.equal(_raw(value), _raw(disk[name])), (layout, to, name)
        gathered: list = [None] * WORLD
        distributed.all_gather_object(gathered, names)
        if to == 1:
            assert gathered == [order if other == 1 else [] for other in range(WORLD)]
        elif to == "spread":
            assert sorted(name for names in gathered for name in names) == sorted(ours)
            assert all(names == [name for name in order if name in set(names)] for names in gathered)
            sizes = [sum(disk[name].nbytes for name in names) for names in gathered]
            assert layout.pp > 1 or max(sizes) < 1.2 * min(sizes), f"uneven: {sizes}"
    whole = _dequantized(disk)
    exported = dict(bridge.export_hf_weights(model, to=2))
    assert set(exported) == ({name for name in ours if not name.endswith(SCALES)} if rank == 2 else set())
    for name, value in exported.items():
        assert value.dtype == whole[name].dtype
        assert torch.equal(value, whole[name]), (layout, name)


def _check_saving(rank: int, bridge, model, disk: dict[str, Tensor], out: Path) -> None:
    """Files of every rank make up the source, MTP layers and other files included; bfloat16 has its values."""
    bridge.save_hf_pretrained(model, out, max_shard_bytes=400_000)
    bridge.save_hf_pretrained(model, out, max_shard_bytes=1_000_000, overwrite=True, quantization=None)
    plain = all_tensors(out)
    assert not any(name.endswith(SCALES) for name in plain)
    assert all(torch.equal(plain[name], value) for name, value in _dequantized(disk).items())
    distributed.barrier()
    bridge.save_hf_pretrained(model, out, max_shard_bytes=400_000, overwrite=True)
    saved = all_tensors(out)
    assert saved.keys() == disk.keys()
    assert all(torch.equal(_raw(saved[name]), _raw(value)) for name, value in disk.items())
    for path in ("config.json", *bridge.checkpoint.files.carried_files()):
        assert (out / path).read_bytes() == (bridge.checkpoint.files.folder / path).read_bytes()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")] == []
    distributed.barrier()


def _check_roundtrip(bridge, out: Path) -> None:
    """The proof of `minimax-m2 roundtrip`, with the vocabulary cut and filled up; all ranks know what holds."""
    from bridge.proof.reference_logits import random_tokens
    from bridge.proof.roundtrip import roundtrip

    def prove(length: int, **options: Any) -> list[bool | None]:
        tokens = random_tokens(bridge.config, length=length)
        return [finding.holds for finding in roundtrip(bridge, out, tokens, params_dtype=torch.float32, **options)]

    def fails() -> Tensor:
        assert distributed.get_rank() == 0
        raise ValueError("this model does not run")

    with pytest.raises(ValueError, match="7 tokens a sequence, expected a multiple of the 2 ranks"):
        prove(7)
    with pytest.raises(ValueError, match="this model does not run"):
        prove(8, others={"failing": fails})
    zero = torch.zeros(2, 8, bridge.config.vocab_size)
    assert prove(8, others={"wrong": lambda: zero}) == [True, False, True]


def _check_one_changed_weight(rank: int, bridge, model, disk: dict[str, Tensor]) -> None:
    """Rank 2 of four has rows 192 to 336 of q's 384, which start inside block 1; its first row changes."""
    mapping = bridge.mapping_registry(parallelism=LAYOUTS["etp4"], rank=rank).hf_to_megatron_lookup(Q)
    if rank == 2:
        assert mapping.parameter.pieces[0].rows == (192, 336)
        with torch.no_grad():
            model.get_parameter(mapping.megatron_param)[0, 300] += 1
    exported = dict(bridge.export_hf_weights(model, "fp8"))
    assert {n for n in exported if not torch.equal(_raw(exported[n]), _raw(disk[n]))} == {Q, Q + SCALES}
    changed = exported[Q + SCALES] != disk[Q + SCALES]
    assert changed.nonzero().tolist() == [[1, 2]]
    codes = (_raw(exported[Q]).view(384, 320) != _raw(disk[Q]).view(384, 320)).nonzero()
    assert codes[:, 0].min() >= 128
    assert codes[:, 0].max() < 256
    assert codes[:, 1].min() >= 256
    fresh = dict(bridge.export_hf_weights(model, "fp8", scales="fresh", to=0))
    if rank == 0:
        assert not torch.equal(fresh[Q + SCALES], exported[Q + SCALES])


def _errors(rank: int, folder: str, scratch: str) -> None:
    import shutil

    from bridge import MiniMaxM2Bridge

    def expect(words: str, action: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=words) as error:
            action()
        messages: list = [None] * WORLD
        distributed.all_gather_object(messages, str(error.value))
        assert len(set(messages)) == 1, messages

    def damaged(name: str, damage: Callable[[Path], None]) -> Path:
        copy = Path(scratch, name)
        if rank == 0:
            shutil.copytree(folder, copy)
            damage(copy)
        distributed.barrier()
        return copy

    with _groups(LAYOUTS["etp4"]), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        model = bridge.to_megatron_model(load_weights=False)
        nan = damaged("nan", lambda copy: _set_byte(copy, Q, 200 * 320 + 7, 0x7F))  # a row of rank 2
        with MiniMaxM2Bridge.from_hf_pretrained(nan) as other:
            expect(rf"{Q}: float8 code at \[200, 7\] is NaN", lambda: other.load_hf_weights(model))
        scale = damaged("scale", lambda copy: _set_byte(copy, Q + SCALES, 3, 0xFF))  # of rank 0's and 1's rows
        with MiniMaxM2Bridge.from_hf_pretrained(scale) as other:
            expect(rf"{Q}_scale_inv: scale of block \[0, 0\]", lambda: other.load_hf_weights(model))
        bridge.load_hf_weights(model)
        with torch.no_grad():
            if rank == 3:
                model.get_parameter("decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight")[5, 5] = torch.inf
        infinite = r"experts.1.w2.weight: value at \[5, \d+\] is inf"
        expect(infinite, lambda: list(bridge.export_hf_weights(model, "fp8")))
        out = Path(scratch, "infinite")
        expect(infinite, lambda: bridge.save_hf_pretrained(model, out))
        distributed.barrier()
        assert not [path for path in Path(scratch).iterdir() if "infinite" in path.name]
        full = Path(scratch, "full")
        with _no_room(rank == 2):
            save = partial(bridge.save_hf_pretrained, model, full, quantization=None, max_shard_bytes=400_000)
            expect("No space left", save, OSError)
        distributed.barrier()
        assert not [path for path in Path(scratch).iterdir() if "full" in path.name]
        expect("to must be 'all', 'spread', or a rank from 0 to 3", lambda: bridge.export_hf_weights(model, to=4))
        cut = damaged("cut", lambda copy: None)
        with MiniMaxM2Bridge.from_hf_pretrained(cut) as other:
            distributed.barrier()
            if rank == 1:
                file = cut / bridge.checkpoint.files.tensors[Q].file
                file.write_bytes(file.read_bytes()[:-5000])
            distributed.barrier()
            expect(r"changed while .* read", lambda: other.load_hf_weights(model))
        name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc2.weight"
        wide = model.get_parameter(name).double() if rank == 2 else model.get_parameter(name)
        with patch.object(model.get_submodule(name.removesuffix(".weight")), "weight", torch.nn.Parameter(wide)):
            words = f"{name}: found torch.float64, expected torch.bfloat16 as on the others"
            expect(words, lambda: bridge.load_hf_weights(model))

        def fails(*args: Any, **options: Any) -> None:
            raise ValueError("no state here")

        with patch.object(model, "state_dict", fails) if rank == 1 else nullcontext():
            expect("no state here", lambda: bridge.load_hf_weights(model))
    with _groups(LAYOUTS["pp2"]), MiniMaxM2Bridge.from_hf_pretrained(nan) as bridge:  # only the first stage reads it
        expect(rf"{Q}: float8 code at \[200, 7\] is NaN", bridge.to_megatron_model)
        model = bridge.to_megatron_model(load_weights=False)
        if rank == 3:
            model.decoder.layers[0].layer_number = 1
        expect(r"pipeline stage 1: rank 3 holds layers \[0,", lambda: bridge.load_hf_weights(model))


@contextmanager
def _no_room(here: bool) -> Iterator[None]:
    """On this rank the disk turns out to be full when a file is synced."""
    import bridge.huggingface.writer

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with patch.object(bridge.huggingface.writer.os, "fsync", full) if here else nullcontext():
        yield


def _set_byte(folder: Path, name: str, position: int, value: int) -> None:
    from bridge.huggingface.safetensors_folder import SafetensorsFolder

    with SafetensorsFolder(folder) as checkpoint:
        info = checkpoint.tensors[name]
    with (folder / info.file).open("r+b") as file:
        file.seek(info.offset + position)
        file.write(bytes([value]))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
