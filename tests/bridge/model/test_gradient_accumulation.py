"""An embedding that adds to the sums of the rows that were looked up: megatron-core's own layer and wrapper, on gloo.

Its kernel is in `tests/compiled/test_embedding.py`, the rest of `bridge.model.gradient_accumulation` in
`test_fusions_gpu.py`.
"""

import pytest
import torch
from support.embedding_sums import not_wrapped, summed
from support.ranks import RankPool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its addition is for a host without a GPU")


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tp", [1, 2])
def test_sums_over_microbatches_and_ranks_are_those_of_autograd(two: RankPool, tp: int, overlap: bool) -> None:
    """Where the vocabulary is divided, they are autograd's."""
    ours, autograds = (two.call(summed, rows, tp, overlap) for rows in (True, False))
    for rank in range(2):
        assert torch.equal(ours[rank].output, autograds[rank].output)
        assert torch.equal(ours[rank].sums, autograds[rank].sums)
        assert ours[rank].sums.any()
        assert ours[rank].added == (tp == 1)
        assert not autograds[rank].added


def test_without_sums_it_is_autograds(two: RankPool) -> None:
    ours, autograds = (two.call(not_wrapped, rows) for rows in (True, False))
    for mine, theirs in zip(ours, autograds, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.any()
