"""An error that one rank meets while it loads, exports or saves a live model: every rank raises it, in the same words.

Four gloo ranks, all tensor-parallel or in two pipeline stages; nothing is left of an output.
"""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from support.checkpoints import SCALE, Q
from support.ranks import RankPool
from support.sharded_models import groups_of
from torch import distributed

from reference.parallelism import Parallelism

WORLD = 4
NAN_CODE = (Q, 200 * 320 + 7, 0x7F)
EXPERT = "decoder.layers.{}.mlp.experts.local_experts.1.linear_fc2"


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


class Setting(NamedTuple):
    """A model on this rank, without weights yet, and an empty folder that all ranks see."""

    rank: int
    bridge: Any
    model: Any
    scratch: Path


def _on_rank(layout: Parallelism, case: Callable[[Setting], None], folder: str, scratch: str) -> None:
    from bridge import MiniMaxM2Bridge

    with groups_of(layout), MiniMaxM2Bridge.from_hf_pretrained(folder) as bridge:
        model = bridge.to_megatron_model(load_weights=False)
        case(Setting(distributed.get_rank(), bridge, model, Path(scratch)))


def _expect(words: str, action: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=words) as error:
        action()
    messages: list = [None] * WORLD
    distributed.all_gather_object(messages, str(error.value))
    assert len(set(messages)) == 1, messages


@contextmanager
def _copied(setting: Setting, *changes: tuple[str, int, int]) -> Iterator[Any]:
    """The bridge of a copy; a change is a tensor's name, the position of a byte in it, and what that byte becomes."""
    from bridge import MiniMaxM2Bridge

    copy = setting.scratch / "copy"
    if setting.rank == 0:
        shutil.copytree(setting.bridge.checkpoint.files.folder, copy)
        for name, position, value in changes:
            info = setting.bridge.checkpoint.files.tensors[name]
            with (copy / info.file).open("r+b") as file:
                file.seek(info.offset + position)
                file.write(bytes([value]))
    distributed.barrier()
    with MiniMaxM2Bridge.from_hf_pretrained(copy) as bridge:
        yield bridge


def _assert_nothing_is_left(setting: Setting, name: str) -> None:
    distributed.barrier()
    assert not [path for path in setting.scratch.iterdir() if name in path.name]


def nan_code(setting: Setting) -> None:
    with _copied(setting, NAN_CODE) as damaged:  # a row of rank 2
        _expect(rf"{Q}: float8 code at \[200, 7\] is NaN", lambda: damaged.load_hf_weights(setting.model))


def bad_scale(setting: Setting) -> None:
    with _copied(setting, (Q + SCALE, 3, 0xFF)) as damaged:  # of rank 0's and 1's rows
        _expect(rf"{Q}_scale_inv: scale of block \[0, 0\]", lambda: damaged.load_hf_weights(setting.model))


def infinite_weight(setting: Setting) -> None:
    rank, bridge, model, scratch = setting
    bridge.load_hf_weights(model)
    with torch.no_grad():
        if rank == 3:
            model.get_parameter(f"{EXPERT.format(0)}.weight")[5, 5] = torch.inf
    words = r"experts.1.w2.weight: value at \[5, \d+\] is inf"
    _expect(words, lambda: list(bridge.export_hf_weights(model, "fp8")))
    _expect(words, lambda: bridge.save_hf_pretrained(model, scratch / "infinite"))
    _assert_nothing_is_left(setting, "infinite")


def no_room(setting: Setting) -> None:
    """On rank 2 the disk turns out to be full when a file is synced."""
    import bridge.huggingface.writer

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    rank, source, model, scratch = setting
    source.load_hf_weights(model)
    out, options = scratch / "full", {"quantization": None, "max_shard_bytes": 400_000}
    with patch.object(bridge.huggingface.writer.os, "fsync", full) if rank == 2 else nullcontext():
        _expect("No space left", lambda: source.save_hf_pretrained(model, out, **options), OSError)
    _assert_nothing_is_left(setting, "full")


def no_such_rank(setting: Setting) -> None:
    setting.bridge.load_hf_weights(setting.model)
    words = "to must be 'all', 'spread', or a rank from 0 to 3"
    _expect(words, lambda: setting.bridge.export_hf_weights(setting.model, to=4))


def truncated_meanwhile(setting: Setting) -> None:
    with _copied(setting) as copy:
        distributed.barrier()
        if setting.rank == 1:
            file = copy.checkpoint.files.folder / copy.checkpoint.files.tensors[Q].file
            file.write_bytes(file.read_bytes()[:-5000])
        distributed.barrier()
        _expect(r"changed while .* read", lambda: copy.load_hf_weights(setting.model))


def another_dtype(setting: Setting) -> None:
    rank, bridge, model, _ = setting
    name = f"{EXPERT.format(1)}.weight"
    weight = model.get_parameter(name)
    wide = torch.nn.Parameter(weight.double() if rank == 2 else weight)
    with patch.object(model.get_submodule(EXPERT.format(1)), "weight", wide):
        words = f"{name}: found torch.float64, expected torch.bfloat16 as on the others"
        _expect(words, lambda: bridge.load_hf_weights(model))


def no_state(setting: Setting) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("no state here")

    with patch.object(setting.model, "state_dict", fails) if setting.rank == 1 else nullcontext():
        _expect("no state here", lambda: setting.bridge.load_hf_weights(setting.model))


def nan_code_of_one_stage(setting: Setting) -> None:
    """Only the first stage reads it."""
    with _copied(setting, NAN_CODE) as damaged:
        _expect(rf"{Q}: float8 code at \[200, 7\] is NaN", damaged.to_megatron_model)


def layers_of_another_stage(setting: Setting) -> None:
    if setting.rank == 3:
        setting.model.decoder.layers[0].layer_number = 1
    words = r"pipeline stage 1: rank 3 holds layers \[0,"
    _expect(words, lambda: setting.bridge.load_hf_weights(setting.model))


ETP4 = Parallelism(tp=4, etp=4)
PP2 = Parallelism(pp=2, dp=2, etp=2, layers_per_stage=(2, 3))
CASES: list[tuple[Parallelism, Callable[[Setting], None]]] = [
    (ETP4, nan_code),
    (ETP4, bad_scale),
    (ETP4, infinite_weight),
    (ETP4, no_room),
    (ETP4, no_such_rank),
    (ETP4, truncated_meanwhile),
    (ETP4, another_dtype),
    (ETP4, no_state),
    (PP2, nan_code_of_one_stage),
    (PP2, layers_of_another_stage),
]


@pytest.mark.parametrize(("layout", "case"), CASES, ids=[case.__name__.replace("_", " ") for _, case in CASES])
def test_errors_reach_every_rank(
    ranks: RankPool, wide_checkpoint: Path, tmp_path: Path, layout: Parallelism, case: Callable[[Setting], None]
) -> None:
    ranks.call(_on_rank, layout, case, str(wide_checkpoint), str(tmp_path))
