"""Bytes of a file into buffers: what is adjacent in one call, however few bytes a call of the system hands over."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.huggingface import scatter_read as module
from bridge.huggingface.scatter_read import Read, scatter_read

DATA = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scatter") / "data"
    path.write_bytes(DATA.tobytes())
    return path


def reads_of(spans: list[tuple[int, int]]) -> tuple[list[np.ndarray], list[Read]]:
    """Buffers for spans (offset, nbytes), and the reads that fill them."""
    buffers = [np.zeros(nbytes, np.uint8) for _, nbytes in spans]
    return buffers, [Read(offset, memoryview(buffer)) for (offset, _), buffer in zip(spans, buffers, strict=True)]


@given(
    st.lists(st.tuples(st.integers(0, 2800), st.integers(0, 200)), max_size=12),
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.sampled_from([1, 7, 1000]),
    st.sampled_from([1, 3, 1024]),
)
@settings(max_examples=60, deadline=None)
def test_every_buffer_has_its_bytes(path, spans, lengths, at_once, buffers_at_once):
    """Spans anywhere and some that follow one another; calls that hand over `at_once` bytes or take few buffers."""
    starts = 500 + np.cumsum([0, *lengths])
    spans = spans + [(int(start), nbytes) for start, nbytes in zip(starts, lengths, strict=False)]
    buffers, reads = reads_of(spans)

    def few_bytes(file: int, views: list[memoryview], offset: int) -> int:
        data = os.pread(file, min(at_once, sum(map(len, views))), offset)
        count = len(data)
        for view in views:
            view[: len(data)], data = data[: len(view)], data[len(view) :]
            if not data:
                break
        return count

    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(module, "_MAX_BUFFERS", buffers_at_once)
        patch.setattr(module.os, "preadv", few_bytes)
        assert scatter_read(file.fileno(), reads)
    for (offset, nbytes), buffer in zip(spans, buffers, strict=True):
        assert np.array_equal(buffer, DATA[offset : offset + nbytes])


def test_adjacent_bytes_are_read_in_one_call(path, monkeypatch):
    calls = []

    def counted(file: int, views: list[memoryview], offset: int) -> int:
        calls.append((offset, len(views)))
        return preadv(file, views, offset)

    preadv = os.preadv
    monkeypatch.setattr(module.os, "preadv", counted)
    spans = [(1000, 10), (100, 50), (150, 70), (220, 0), (220, 5), (1010, 1), (1012, 4)]
    buffers, reads = reads_of(spans)
    with path.open("rb") as file:
        assert scatter_read(file.fileno(), reads)
        assert calls == [(100, 3), (1000, 2), (1012, 1)]
        for (offset, nbytes), buffer in zip(spans, buffers, strict=True):
            assert np.array_equal(buffer, DATA[offset : offset + nbytes])
        calls.clear()
        _, many = reads_of([(offset, 1) for offset in range(module._MAX_BUFFERS + 1)])
        assert scatter_read(file.fileno(), many)
        assert calls == [(0, module._MAX_BUFFERS), (module._MAX_BUFFERS, 1)]


@pytest.mark.parametrize("spans", [[(2990, 11)], [(3000, 1)], [(0, 10), (2900, 90), (2990, 11)]], ids=str)
def test_a_file_that_ends_before_is_told(path, spans):
    _, reads = reads_of(spans)
    with path.open("rb") as file:
        assert not scatter_read(file.fileno(), reads)
