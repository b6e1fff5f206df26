"""Tensors to the host: what lies together is copied as one, and arrives in order and apart."""

import pytest
import torch
from support.checks import NO_GPU
from torch import Tensor

from bridge.weights import to_host


def rounds(device: str) -> list[list[tuple[str, Tensor]]]:
    """Stacks of matrices and their scales in turns, halves of parameters, gaps, strides, single numbers, nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 6, 40), (5, 2, 3), (700,)
    codes, scales, other = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    both = [tensor for pair in zip(codes.bfloat16(), scales, strict=True) for tensor in pair]
    views = [other[350:], other[:350], other[1:100], codes[0].mT, codes[1, 2:4], other[:0], other[5]]
    sizes = [both, [], views, [torch.arange(3000, device=device)]]
    return [[(f"{i}.{j}", tensor) for j, tensor in enumerate(tensors)] for i, tensors in enumerate(sizes)]


def test_runs_are_the_bytes_of_their_tensors() -> None:
    counts = []
    for named in rounds("cpu"):
        tensors = [tensor for _, tensor in named]
        runs = list(to_host._runs(tensors))
        for run, members in runs:
            expected = [tensors[index].contiguous().view(-1).view(torch.uint8) for index in members]
            assert torch.equal(run, torch.cat(expected))
        held = [index for index, tensor in enumerate(tensors) if tensor.numel()]
        assert sorted(index for _, members in runs for index in members) == held
        counts.append(len(runs))
    assert counts[:2] == [2, 0], "all matrices in one run, all scales in another"


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("buffer_bytes", [64, 1000, 1 << 20])
def test_what_arrives(monkeypatch: pytest.MonkeyPatch, buffer_bytes: int) -> None:
    monkeypatch.setattr(to_host, "BUFFER_BYTES", buffer_bytes)
    expected = [named for tensors in rounds("cpu") for named in tensors]
    found = list(to_host.to_host(rounds("cuda")))
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, here), (_, there) in zip(found, expected, strict=True):
        assert (here.device.type, here.dtype) == ("cpu", there.dtype)
        assert torch.equal(here, there)
    held = [tensor.untyped_storage().data_ptr() for _, tensor in found if tensor.numel()]
    assert len(set(held)) == len(held), "memory of its own"
