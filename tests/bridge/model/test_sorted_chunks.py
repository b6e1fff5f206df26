"""Where all tokens come from one rank, megatron-core's sorting of them changes nothing; to the bit.

Of megatron-core's dispatchers `alltoall` sorts.
"""

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from support.small_model import SMALL, TOKENS
from torch import Tensor

from bridge import build_model, model_parallel
from bridge.model import build
from bridge.model.sorted_chunks import leave_sorted
from reference.model_class import ModelClass


def outputs_and_gradients(model_class: ModelClass) -> list[Tensor]:
    with model_parallel():
        model = build_model(SMALL, model=model_class, params_dtype=torch.float32, moe_token_dispatcher_type="alltoall")
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
        positions = torch.arange(TOKENS.shape[1] - 1, device=TOKENS.device).expand(2, -1)
        losses = model(TOKENS[:, :-1], positions, None, labels=TOKENS[:, 1:])
        return [losses.detach(), *torch.autograd.grad(losses.sum(), list(model.parameters()))]


def never(*_: object, **__: object) -> None:
    pytest.fail("what is in order was sorted")


@pytest.mark.parametrize(("ranks", "in_order"), [(1, True), (2, False)])
def test_the_chunks_of_one_rank_are_in_order(ranks: int, in_order: bool) -> None:
    """The order is megatron-core's formula; an expert without tokens among them."""
    leave_sorted(torch.nn.Identity())
    sizes = torch.tensor([3, 0, 5, 1] * ranks)
    order = torch.arange(4 * ranks).reshape(-1, 4).T.ravel()
    x, probs = torch.randn(int(sizes.sum()), 8), torch.rand(int(sizes.sum()))
    found = token_dispatcher.sort_chunks_by_idxs(x, sizes, order, probs=probs)
    assert [torch.equal(one, before) for one, before in zip(found, (x, probs), strict=True)] == [in_order] * 2
    assert token_dispatcher.sort_chunks_by_idxs(x, sizes, None, probs=probs) == (x, probs)


@pytest.mark.parametrize("model_class", list(ModelClass))
def test_what_is_in_order_need_not_be_sorted(model_class: ModelClass, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as stock:
        stock.setattr(build, "leave_sorted", lambda _: None)
        wanted = outputs_and_gradients(model_class)
    with monkeypatch.context() as watched:
        watched.setattr(token_dispatcher, "sort_chunks_by_idxs", never)  # it is wrapped when the model is built
        found = outputs_and_gradients(model_class)
    for one, exact in zip(found, wanted, strict=True):
        assert torch.equal(one, exact)
