"""Models that Megatron-LM's own builders make of `--spec`, on four gloo ranks, train like `build_model`'s.

Its parser, its config and its builders are those in megatron-core's package; its scripts are not in a package
(`test_megatron_lm_scripts` runs them).
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.checks import assert_relative
from support.megatron_lm import built, cpu_words, megatron_lm_runs, parsed
from support.megatron_training import BATCH, CASE, SEQ, Setup, _build, _load, weights_of
from support.ranks import RankPool
from support.sharded_models import groups_of
from support.small_model import SMALL
from torch import distributed

from bridge.model.config import transformer_config
from bridge.plugins.megatron_lm import checked_backend, layer_spec, megatron_lm_namespace
from bridge.plugins.megatron_lm_arguments import megatron_lm_arguments
from reference.model_class import ModelClass
from reference.parallelism import Parallelism

WORLD = 4
MODULE = "bridge.plugins.megatron_lm"
SPECS = {ModelClass.GPT: "layer_spec", ModelClass.HYBRID: "hybrid_stack_spec"}
STAGES, TENSOR = Parallelism(pp=2, ep=2, dp=2), Parallelism(tp=2, pp=2, ep=2, etp=1)
TORCHS_NORM = 32 * torch.finfo(torch.float32).eps  # megatron-core's final norm is torch's then, which rounds elsewhere
CUT = {1: "*E*E", 2: "*E|*E"}  # the pattern of two layers, by pipeline size


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(WORLD) as pool:
        yield pool


@pytest.mark.parametrize("kind", ModelClass)
def test_what_the_spec_makes_trains_like_build_model(ranks: RankPool, kind: ModelClass) -> None:
    """Losses, every gradient, on every rank. Without Transformer Engine its final norm bars tensor parallelism."""
    ranks.call(_trains_like_build_model, kind, STAGES, "spec")


@pytest.mark.parametrize("kind", ModelClass)
def test_what_the_model_provider_makes_trains_like_build_model(ranks: RankPool, kind: ModelClass) -> None:
    ranks.call(_trains_like_build_model, kind, TENSOR, "provider")


def test_a_wrong_option_is_refused_when_the_model_is_built(ranks: RankPool) -> None:
    """By the config alone where the process is not Megatron-LM's; else also by what only its arguments say."""
    said = ranks.call(_refusals)
    assert all(of_rank == said[0] for of_rank in said)
    swiglu, rotary, implementation = said[0]
    assert swiglu.startswith("--swiglu: found False, expected True for MiniMax-M2; pass --swiglu")
    assert rotary.startswith("--rotary-percent: found 1.0, expected 0.5 for MiniMax-M2; pass --rotary-percent 0.5")
    assert implementation.startswith("--transformer-impl: found 'inference_optimized', expected 'transformer_engine'")


def test_a_process_that_is_not_megatron_lms_has_no_arguments() -> None:
    assert megatron_lm_namespace() is None


# ----------------------------------------------------------------------------------------------------- on every rank


def _words(kind: ModelClass, layout: Parallelism) -> list[str]:
    words = cpu_words(megatron_lm_arguments(CASE.model_config(), model=kind))
    sizes = {"tensor-model": layout.tp, "pipeline-model": layout.pp, "expert-model": layout.ep, "expert-tensor": 1}
    for name, size in sizes.items():
        words += [f"--{name}-parallel-size", str(size)]
    words += ["--sequence-parallel"] if layout.tp > 1 else []
    if kind is ModelClass.HYBRID:
        words[words.index("--hybrid-layer-pattern") + 1] = CUT[layout.pp]
    return [*words, "--moe-aux-loss-coeff", "0", "--moe-router-bias-update-rate", "0"]


def _trains_like_build_model(kind: ModelClass, layout: Parallelism, how: str) -> None:
    from functools import partial

    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads

    from bridge.plugins.megatron_lm import model_provider
    from bridge.proof.judge.training import forward_backward, labelled_step, wrapped

    rank = distributed.get_rank()
    spec = ["--spec", MODULE, SPECS[kind]] if how == "spec" else []
    arguments = parsed([*_words(kind, layout), *spec], rank=rank, world=WORLD)
    arguments.padded_vocab_size = CASE.model_config().vocab_size  # pretrain() works it out
    setup = Setup(CASE, layout, kind)
    with groups_of(layout), megatron_lm_runs(arguments):
        ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        theirs = built(arguments) if how == "spec" else model_provider(*ends)
        (ours,) = _build(setup, torch.float32)
        theirs.config.finalize_model_grads_func = partial(finalize_model_grads, force_all_reduce=True)
        tokens = torch.randint(0, CASE.vocab, (2, BATCH, SEQ + 1), generator=torch.Generator().manual_seed(3))
        mine = tokens.chunk(layout.dp, 1)[layout.coordinates(rank).dp]
        microbatches = [(sequences[:, :-1], sequences[:, 1:]) for sequences in mine]
        found = []
        for model in (theirs, ours):
            _load([model], setup.held(rank), weights_of(CASE, torch.float32), drop_in=False)
            batch = BATCH // layout.dp
            loss = forward_backward(wrapped([model]), microbatches, labelled_step, seq=SEQ, batch=batch)
            found.append((loss, {name: value.main_grad.clone() for name, value in model.named_parameters()}))
        (loss, grads), (expected, truth) = found
        assert loss == expected
        assert (loss is None) == (not ends[1])
        assert grads.keys() == truth.keys()
        for name, value in truth.items():
            assert value.abs().max() > 0, name
            assert_relative(grads[name], value, TORCHS_NORM if (kind, how) == (ModelClass.GPT, "spec") else 0.0, name)


def _refusals() -> list[str]:
    from megatron.core.models.gpt import GPTModel

    from bridge.model.config import gpt_model_arguments

    said = []
    with groups_of(Parallelism(dp=WORLD)):
        wrong: list[dict[str, Any]] = [{"gated_linear_unit": False}, {}, {"transformer_impl": "inference_optimized"}]
        words = cpu_words(megatron_lm_arguments(SMALL))
        at = words.index("--rotary-percent")
        arguments = [None, parsed(words[:at] + words[at + 2 :]), None]
        for changes, namespace in zip(wrong, arguments, strict=True):
            config = transformer_config(SMALL)
            for name, value in changes.items():
                setattr(config, name, value)
            with megatron_lm_runs(namespace), pytest.raises(ValueError, match="for MiniMax-M2; pass") as caught:
                GPTModel(config, layer_spec, **gpt_model_arguments(SMALL))
            said.append(str(caught.value))
        assert checked_backend(transformer_config(SMALL)) == "local"
    return said
