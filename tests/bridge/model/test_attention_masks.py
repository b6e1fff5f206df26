"""Masks on megatron-core's local attention, of padding and whole ones, against `transformers` with the same padding.

Logits of real tokens, and every gradient of a sum over them: errors against `transformers` in float64 are at most twice
those of `transformers` in float32. megatron-core rotates by the place in the row, whatever the position ids, and so
does `transformers` without them.
"""

from functools import cache
from typing import Any

import pytest
import torch
from support.megatron_training import CASE, GPUS
from support.oracles import FLOAT32, FLOAT64, disk_weights, hf_model, remove_float32_casts, to_disk_names
from support.ranks import RankPool
from support.small_model import DEVICE
from torch import Tensor, nn

from bridge.model.attention_mask import check_not_ignored, merged_with_causal
from bridge.model.build import build_model
from bridge.model.process_groups import model_parallel
from bridge.proof.judge.training import TRAINING_SETTINGS
from bridge.weights.param_mapping import model_rows, model_state
from reference.model_class import ModelClass
from reference.parallelism import Parallelism
from reference.sharding import Parameter, parameters, placements, shard, unshard
from reference.weights import MODEL_DIALECTS

BATCH, LENGTH = 3, 10
TOKENS = torch.randint(CASE.vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
COTANGENT = torch.randn(BATCH, LENGTH, CASE.vocab, generator=torch.Generator().manual_seed(4), dtype=FLOAT64)
LENGTHS = torch.tensor([LENGTH, 6, 1])
PLACES = torch.arange(LENGTH)
REAL = {"right": LENGTHS[:, None] > PLACES, "left": LENGTHS[:, None] >= LENGTH - PLACES}
LATER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)

ONE = Parallelism()
Tensors = dict[str, Tensor]


@cache
def of_transformers(side: str, dtype: torch.dtype) -> Tensors:
    with pytest.MonkeyPatch.context() as patch:
        if dtype == FLOAT64:
            remove_float32_casts(patch)
        model = hf_model(CASE, {name: value.to(dtype) for name, value in disk_weights(CASE).items()}, dtype)
        logits = model(TOKENS, attention_mask=REAL[side].long()).logits
        (logits * COTANGENT.to(dtype))[REAL[side]].sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"logits": logits.detach()[REAL[side]], **to_disk_names(grads)}


def held_by(model: Any, kind: ModelClass, layout: Parallelism = ONE, rank: int = 0) -> list[Parameter]:
    dialect = next(iter(model_rows(list(model_state(model)), MODEL_DIALECTS[kind])))
    return parameters(CASE.model_config(), layout, rank, dialect)


def build(kind: ModelClass = ModelClass.GPT, layout: Parallelism = ONE, rank: int = 0, **settings: Any) -> Any:
    settings = {"params_dtype": FLOAT32, "backend": "local", **TRAINING_SETTINGS, **settings}
    model: Any = build_model(CASE.model_config(), model=kind, **settings)
    state, weights = model_state(model), disk_weights(CASE)
    with torch.no_grad():
        for parameter in held_by(model, kind, layout, rank):
            state[parameter.name].copy_(shard(parameter, weights))
    return model


def run(model: Any, kind: ModelClass, side: str, mask: Tensor | None) -> Tensors:
    """Logits of real tokens, and gradients under on-disk names."""
    model.zero_grad()
    positions = PLACES.expand(BATCH, -1).to(DEVICE)
    logits = model(TOKENS.to(DEVICE), positions, None if mask is None else mask.to(DEVICE)).cpu()
    (logits * COTANGENT.float())[REAL[side]].sum().backward()
    held = held_by(model, kind)
    grads = {(0, 0, name): value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}
    placed = {source: places for source, places in placements({0: held}).items() if (0, 0, places[0].name) in grads}
    found = {source: unshard(places, grads) for source, places in placed.items()}
    return {"logits": logits.detach()[REAL[side]], **found}


def masks(side: str) -> dict[str, Tensor]:
    """Of the same padding, in every form that is taken."""
    padding = ~REAL[side][:, None, None]
    return {"padding": padding, "whole": padding.expand(-1, 1, LENGTH, -1), "causal too": padding | LATER}


@pytest.mark.parametrize("form", ["padding", "whole", "causal too"])
@pytest.mark.parametrize("side", REAL)
@pytest.mark.parametrize("kind", ModelClass)
def test_padded_batches_are_those_of_transformers(kind: ModelClass, side: str, form: str) -> None:
    with model_parallel():
        ours = run(build(kind), kind, side, masks(side)[form])
    truth, theirs = of_transformers(side, FLOAT64), of_transformers(side, FLOAT32)
    assert ours.keys() == truth.keys()
    ratios = {}
    for name, exact in truth.items():
        granted = torch.finfo(FLOAT32).eps * exact.norm()
        ratios[name] = ((ours[name] - exact).norm() / ((theirs[name] - exact).norm() + granted)).item()
    worst = max(ratios, key=ratios.__getitem__)
    print(f"error over that of transformers: {ratios[worst]:.2f} ({worst})")
    assert ratios[worst] <= 2, ratios


def test_a_mask_that_hides_nothing_changes_no_bit() -> None:
    with model_parallel():
        model = build()
        plain = run(model, ModelClass.GPT, "right", None)
        for shape in [(BATCH, 1, 1, LENGTH), (1, 1, LENGTH, LENGTH), (1, 1, 1, 1)]:
            masked = run(model, ModelClass.GPT, "right", torch.zeros(shape, dtype=torch.bool))
            assert [name for name, value in plain.items() if not torch.equal(value, masked[name])] == []


RECOMPUTATION: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "core attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
}


@pytest.mark.parametrize("name", RECOMPUTATION)
@pytest.mark.parametrize("kind", ModelClass)
def test_recomputed_masks_change_no_bit(kind: ModelClass, name: str) -> None:
    mask = masks("left")["padding"]
    with model_parallel():
        kept, recomputed = (run(build(kind, **more), kind, "left", mask) for more in ({}, RECOMPUTATION[name]))
    assert [key for key, value in kept.items() if not torch.equal(value, recomputed[key])] == []


def test_masks_are_traced() -> None:
    compiled = torch.compile(merged_with_causal, fullgraph=True, backend="eager")
    for mask in masks("left").values():
        assert torch.equal(compiled(mask, batch=BATCH, length=LENGTH), mask | LATER)


# ---------------------------------------------------------------------------------------------------------------- ranks


def logits_of_rank(mask: Tensor) -> Tensor:
    layout, rank = Parallelism(tp=2, etp=1), torch.distributed.get_rank()
    with model_parallel(tensor_model_parallel_size=2, expert_tensor_parallel_size=1):
        model = build(layout=layout, rank=rank)
        assert model.config.sequence_parallel
        with torch.no_grad():
            return model(TOKENS, PLACES.expand(BATCH, -1), mask)


@pytest.mark.skipif(GPUS > 0, reason="gloo ranks are for a host without GPUs")
def test_masks_with_sequence_parallelism(two: RankPool) -> None:
    """A rank has half of the tokens before attention, and all in it."""
    mask = masks("left")["padding"]
    with model_parallel():
        whole = run(build(), ModelClass.GPT, "left", mask)["logits"]
    parts = torch.cat(two.call(logits_of_rank, mask), -1)[REAL["left"]]
    assert ((parts - whole).norm() / whole.norm()).item() < 2e-6  # a few roundings, of sums in another order


# ------------------------------------------------------------------------------------------------------------- refusals

WRONG = {
    "of transformers": torch.ones(BATCH, LENGTH, dtype=torch.int64),
    "added to scores": torch.zeros(BATCH, 1, LENGTH, LENGTH),
    "two dimensions": torch.zeros(BATCH, LENGTH, dtype=torch.bool),
    "another length": torch.zeros(BATCH, 1, 1, LENGTH + 1, dtype=torch.bool),
    "another batch": torch.zeros(BATCH + 1, 1, 1, LENGTH, dtype=torch.bool),
    "heads": torch.zeros(BATCH, CASE.heads, LENGTH, LENGTH, dtype=torch.bool),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_mask_is_refused(name: str) -> None:
    found = rf"attention_mask is {WRONG[name].dtype} \[.*expected torch.bool, True where a key is not to be seen.*None"
    with model_parallel(), pytest.raises(ValueError, match=found):
        run(build(), ModelClass.GPT, "right", WRONG[name])


class Keeps(nn.Module):
    """Core attention that is not megatron-core's local one, and keeps the mask."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any) -> Tensor:
        self.mask = mask
        return query.flatten(-2)


def test_transformer_engine_is_given_no_padding() -> None:
    """What its attention does with a causal mask type is the same wherever it runs: it does not read the mask."""
    with model_parallel():
        model = build()
        kept = Keeps()
        for layer in model.decoder.layers:
            layer.self_attention.core_attention = kept
        for mask in (None, LATER[None, None].to(DEVICE), LATER.expand(BATCH, 1, -1, -1).to(DEVICE)):
            run(model, ModelClass.GPT, "right", mask)
            assert kept.mask is mask
        for mask in (masks("right")["padding"], REAL["right"]):
            with pytest.raises(
                ValueError, match=r"takes no padding mask, and would ignore it: give None .* at the end"
            ):
                run(model, ModelClass.GPT, "right", mask)


def test_static_masks_of_cuda_graphs_are_taken() -> None:
    """megatron-core makes one for the capture, and gives zeros at replay where there is none."""
    for shape in [(2, 1, 16, 16), (2, 1, 8, 16), (1, 1, 1, 1)]:
        check_not_ignored(torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("setting", [{"window_size": (4, 0)}, {"scaled_masked_softmax_fusion": True}], ids=str)
def test_local_attention_that_leaves_masks_out_is_refused(setting: dict[str, Any]) -> None:
    with model_parallel():
        model = build()
        softmax = model.decoder.layers[0].self_attention.core_attention.scale_mask_softmax
        for name, value in {"input_in_float16": True, **setting}.items():
            setattr(softmax, name, value)
        with pytest.raises(ValueError, match=r"leaves it out: set window_size=None and masked_softmax_fusion=False"):
            run(model, ModelClass.GPT, "right", masks("right")["padding"])
