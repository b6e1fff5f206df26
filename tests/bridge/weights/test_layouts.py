"""Live models on four gloo ranks, at every kind of parallelism: each rank's parameters are its slices of the files.

The truth is `reference.sharding.shard` of whole tensors dequantised by `reference.fp8`, compared bit for bit. Exports
are compared with the files. Widths are such that slices start and end inside blocks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.checkpoints import SCALE, Q, all_tensors
from support.ranks import RankPool
from support.sharded_models import Truth, groups_of, truth_of
from torch import Tensor, distributed

from bridge.huggingface.companions import companions
from reference.model_class import ModelClass
from reference.parallelism import Parallelism, spread_layers
from reference.sharding import parameters, shard
from reference.weights import Dialect

WORLD = 4
DIALECTS = {ModelClass.GPT: Dialect.MEGATRON_LOCAL, ModelClass.HYBRID: Dialect.HYBRID_LOCAL}
LAYOUTS = {
    "tp2": Parallelism(tp=2, dp=2),
    "tp2 ep2, padded": Parallelism(tp=2, ep=2, etp=1, dp=2, vocab_divisor=64),
    "tp4, 2 key heads": Parallelism(tp=4, ep=4, etp=1),
    "etp4": Parallelism(tp=4, etp=4),
    "pp2": Parallelism(pp=2, dp=2, etp=2, layers_per_stage=(2, 3)),
    "tp2 pp2 vpp2": Parallelism(tp=2, pp=2, vpp=2, ep=2, etp=1, layers_per_stage=spread_layers(5, 4)),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


@pytest.mark.parametrize("kind", ModelClass)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_rank_is_loaded_with_its_slices_and_gives_them_back(
    ranks: RankPool, wide_checkpoint: Path, tmp_path: Path, name: str, kind: ModelClass
) -> None:
    ranks.call(_load_and_give_back, name, kind, str(wide_checkpoint), str(tmp_path))


# ----------------------------------------------------------------------------------------------------- on every rank


def _load_and_give_back(name: str, kind: ModelClass, folder: str, scratch: str) -> None:
    from bridge import MiniMaxM2Bridge

    rank, layout, truth = distributed.get_rank(), LAYOUTS[name], truth_of(folder)
    with groups_of(layout), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        stages = layout.layers_per_stage if name == "pp2" else None  # None: as equally as can be
        model = bridge.to_megatron_model(
            model=kind, load_weights=False, vocab_divisor=layout.vocab_divisor, layers_per_stage=stages
        )
        assert {type(chunk).__name__ for chunk in (model if isinstance(model, list) else [model])} == {kind.class_name}
        _check_loading(rank, layout, DIALECTS[kind], bridge, model, truth)
        _check_exports(rank, layout, bridge, model, truth)
        if name in FURTHER:
            FURTHER[name](rank, bridge, model, truth, Path(scratch, "out"))
        if name in PROVEN:
            _check_roundtrip(layout, kind, bridge, Path(scratch, "roundtrip"))


def _check_loading(rank: int, layout: Parallelism, dialect: Dialect, bridge, model, truth: Truth) -> None:
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
    held = parameters(bridge.config, layout, rank, dialect)
    assert live.state.keys() == {(parameter.chunk, parameter.name) for parameter in held}
    expected = 0
    for parameter in held:
        value = live.state[parameter.chunk, parameter.name]
        assert torch.equal(value, shard(parameter, truth.whole).to(value.dtype)), (layout, rank, parameter.name)
        expected += sum(_bytes_of_rows(piece, truth.disk) for piece in parameter.pieces if piece.source)
    assert read == expected, (layout, rank)


def _bytes_of_rows(piece, disk: dict[str, Tensor]) -> int:
    """Of the rows that a piece has elements of, and of the rows of scales whose blocks these touch: all whole."""
    nbytes = disk[piece.source][slice(*piece.rows)].nbytes
    if piece.source + SCALE in disk:
        first, last = piece.rows
        nbytes += disk[piece.source + SCALE][first // 128 : -(-last // 128)].nbytes
    return nbytes


def _check_exports(rank: int, layout: Parallelism, bridge, model, truth: Truth) -> None:
    disk, whole = truth
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
    exported = dict(bridge.export_hf_weights(model, to=2))
    assert set(exported) == ({name for name in ours if not name.endswith(SCALE)} if rank == 2 else set())
    for name, value in exported.items():
        assert value.dtype == whole[name].dtype
        assert torch.equal(value, whole[name]), (layout, name)


def _check_saving(rank: int, bridge, model, truth: Truth, out: Path) -> None:
    """Files of every rank make up the source, MTP layers and other files included; bfloat16 has its values."""
    disk, whole = truth
    bridge.save_hf_pretrained(model, out, max_shard_bytes=400_000)
    bridge.save_hf_pretrained(model, out, max_shard_bytes=1_000_000, overwrite=True, quantization=None)
    plain = all_tensors(out)
    assert not any(name.endswith(SCALE) for name in plain)
    assert all(torch.equal(plain[name], value) for name, value in whole.items())
    distributed.barrier()
    bridge.save_hf_pretrained(model, out, max_shard_bytes=400_000, overwrite=True)
    saved = all_tensors(out)
    assert saved.keys() == disk.keys()
    assert all(torch.equal(_raw(saved[name]), _raw(value)) for name, value in disk.items())
    for path in ("config.json", *companions(bridge.checkpoint.files.folder).carried):
        assert (out / path).read_bytes() == (bridge.checkpoint.files.folder / path).read_bytes()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")] == []
    distributed.barrier()


def _check_roundtrip(layout: Parallelism, kind: ModelClass, bridge, out: Path) -> None:
    """The proof of `minimax-m2 roundtrip`, with the vocabulary cut and filled up; all ranks know what holds."""
    from bridge.proof.reference_logits import random_tokens
    from bridge.proof.roundtrip import roundtrip

    def prove(length: int, **options: Any) -> list[bool | None]:
        tokens = random_tokens(bridge.config, length=length)
        found = roundtrip(bridge, out, tokens, model=kind, params_dtype=torch.float32, **options)
        return [finding.holds for finding in found]

    def fails() -> Tensor:
        assert distributed.get_rank() == 0
        raise ValueError("this model does not run")

    if layout.vpp > 1:
        with pytest.raises(ValueError, match="found 2 virtual stages a rank, expected 1"):
            prove(8)
        return
    if layout.tp > 1:
        with pytest.raises(ValueError, match=f"7 tokens a sequence, expected a multiple of the {layout.tp} ranks"):
            prove(7)
    with pytest.raises(ValueError, match="this model does not run"):
        prove(8, others={"failing": fails})
    zero = torch.zeros(2, 8, bridge.config.vocab_size)
    assert prove(8, others={"wrong": lambda: zero}) == [True, False, True]


def _check_one_changed_weight(rank: int, bridge, model, truth: Truth, out: Path) -> None:
    """Rank 2 of four has rows 192 to 336 of q's 384, which start inside block 1; its first row changes."""
    from bridge.weights.sharded_model import sharded_model

    disk = truth.disk
    mapping = sharded_model(model, bridge.config).registry.hf_to_megatron_lookup(Q)
    if rank == 2:
        assert mapping.parameter.pieces[0].rows == (192, 336)
        with torch.no_grad():
            model.get_parameter(mapping.megatron_param)[0, 300] += 1
    exported = dict(bridge.export_hf_weights(model, "fp8"))
    assert {n for n in exported if not torch.equal(_raw(exported[n]), _raw(disk[n]))} == {Q, Q + SCALE}
    changed = exported[Q + SCALE] != disk[Q + SCALE]
    assert changed.nonzero().tolist() == [[1, 2]]
    codes = (_raw(exported[Q]).view(384, 320) != _raw(disk[Q]).view(384, 320)).nonzero()
    assert codes[:, 0].min() >= 128
    assert codes[:, 0].max() < 256
    assert codes[:, 1].min() >= 256
    fresh = dict(bridge.export_hf_weights(model, "fp8", scales="fresh", to=0))
    if rank == 0:
        assert not torch.equal(fresh[Q + SCALE], exported[Q + SCALE])


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


# What is done to a loaded model of some layouts besides.
FURTHER = {
    "tp2 ep2, padded": _check_saving,
    "tp4, 2 key heads": _check_saving,
    "etp4": _check_one_changed_weight,
    "tp2 pp2 vpp2": _check_saving,
}
PROVEN = ("tp2", "pp2", "tp2 pp2 vpp2")  # also by the proof of a round trip
