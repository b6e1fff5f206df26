"""The arguments, against Megatron-LM's own parser and what it makes of them."""

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import core_transformer_config_from_args
from support.checks import ROOT
from support.megatron_lm import NEEDS_A_GPU, cpu_words, parsed
from support.small_model import SMALL

from bridge.model.architecture import SIZES
from bridge.model.build import build_model
from bridge.model.config import ARCHITECTURE, transformer_config
from bridge.model.process_groups import model_parallel
from bridge.plugins.megatron_lm_arguments import (
    LEFT_OUT,
    RELEASED,
    SAID,
    LeftOut,
    Said,
    check_arguments,
    check_config,
    megatron_lm_arguments,
)
from reference.model_class import ModelClass
from reference.parallelism import Parallelism, hybrid_layer_pattern

CONFIGS = {"released": RELEASED, "small": replace(SMALL, rotary_dim=2, head_dim=98)}  # int(98 * (2 / 98)) is 1
CHECKED = [said for said in SAID if said.parsed and (not said.size or said.option.startswith("--rotary"))]


@pytest.fixture(scope="module")
def arguments() -> Namespace:
    """What is right for the released models."""
    return parsed(cpu_words(megatron_lm_arguments(RELEASED)))


def without(words: list[str], said: Said) -> list[str]:
    at = words.index(said.option.rstrip("="))
    return words[:at] + words[at + len(said.words(said.of(RELEASED))) :]


@pytest.mark.parametrize("kind", ModelClass)
@pytest.mark.parametrize("name", CONFIGS)
def test_megatron_lm_makes_our_config_of_the_words(name: str, kind: ModelClass) -> None:
    config = CONFIGS[name]
    found = parsed(cpu_words(megatron_lm_arguments(config, model=kind)))
    check_arguments(found, config)
    check_arguments(found)
    theirs = core_transformer_config_from_args(found)
    check_config(theirs)
    ours = transformer_config(config, model=kind, params_dtype=torch.float32, backend="local")
    for field in {*SIZES, *ARCHITECTURE, "is_hybrid_model", "transformer_impl"}:
        assert getattr(theirs, field) == getattr(ours, field), field
    assert int(theirs.kv_channels * found.rotary_percent) == config.rotary_dim
    assert (found.rotary_base, found.vocab_size) == (config.rope_theta, config.vocab_size)
    assert found.max_position_embeddings == config.max_position_embeddings
    pattern = hybrid_layer_pattern(config, Parallelism())
    assert found.hybrid_layer_pattern == (pattern if kind is ModelClass.HYBRID else None)


def test_grouped_products_are_asked_for_and_known_to_the_parser() -> None:
    words = megatron_lm_arguments(RELEASED)
    assert NEEDS_A_GPU in words
    assert parsed(words, validated=False).moe_grouped_gemm


def test_every_name_of_the_tables_is_megatron_lms(arguments: Namespace) -> None:
    fields = TransformerConfig.__dataclass_fields__
    for row in (*SAID, *LEFT_OUT):
        assert not row.parsed or hasattr(arguments, row.parsed), row.option
        assert not row.field or row.field in fields, row.option


@pytest.mark.parametrize("said", CHECKED, ids=lambda said: said.option.rstrip("="))
def test_a_missing_option_is_named(said: Said) -> None:
    """By what Megatron-LM makes of a command line without it."""
    words = without(cpu_words(megatron_lm_arguments(RELEASED)), said)
    found = parsed(words, validated=said.option != "--moe-router-score-function=")  # there the parser itself refuses
    option = said.option.rstrip("=")
    with pytest.raises(ValueError, match=rf"^{option}: found .*, expected .* for MiniMax-M2; pass {option}") as caught:
        check_arguments(found)
    assert len(str(caught.value).splitlines()) == 1


SIZED = [said for said in SAID if said.size and said.parsed]


@pytest.mark.parametrize("said", SIZED, ids=lambda said: said.option.rstrip("="))
def test_another_size_is_named_with_both_values(arguments: Namespace, said: Said) -> None:
    found = getattr(arguments, said.parsed)
    other = Namespace(**vars(arguments) | {said.parsed: found / 2})
    option = said.option.rstrip("=")
    with pytest.raises(
        ValueError, match=rf"^{option}: found {found / 2}, expected {found}(\.0)? .*; pass {option} {found}"
    ):
        check_arguments(other, RELEASED)


WRONG: dict[Any, Any] = {False: True, None: 2, 1: [0, 1], "vanilla": "learnable"}


@pytest.mark.parametrize("row", LEFT_OUT, ids=lambda row: row.option)
def test_an_option_of_another_model_is_named(arguments: Namespace, row: LeftOut) -> None:
    other = Namespace(**vars(arguments) | {row.parsed: WRONG[getattr(arguments, row.parsed)]})
    with pytest.raises(ValueError, match=rf"^{row.option}: found .*, expected .* for MiniMax-M2; leave it out$"):
        check_arguments(other)


FIELDS = [row for row in (*SAID, *LEFT_OUT) if row.field and not getattr(row, "size", "")]


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.field)
def test_a_field_of_another_model_is_named_by_its_option(row: Said | LeftOut) -> None:
    config = transformer_config(SMALL)
    right = getattr(config, row.field)
    wrong = torch.nn.functional.gelu if callable(right) else WRONG.get(right, "another")
    setattr(config, row.field, wrong)
    shown = "gelu" if callable(right) else repr(wrong)
    with pytest.raises(ValueError, match=f"^{row.option.rstrip('=')}: found ") as caught:
        check_config(config)
    assert shown in str(caught.value)


def test_the_layers_experts_may_be_said_one_by_one(arguments: Namespace) -> None:
    check_arguments(Namespace(**vars(arguments) | {"moe_layer_freq": [1] * 62}))


def test_a_base_that_megatron_lm_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rope_theta is 10000\.5, .* whole numbers only"):
        megatron_lm_arguments(replace(SMALL, rope_theta=10000.5))


def test_a_config_json_gives_the_words(tmp_path: Path) -> None:
    sizes = {name: value for name, value in asdict(SMALL).items() if name not in ("quantization", "num_mtp_modules")}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(sizes | {"model_type": "minimax_m2"}))
    command = [sys.executable, "-m", "bridge.plugins.megatron_lm_arguments", str(file), "--model", "hybrid"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.replace("'", "").split() == megatron_lm_arguments(SMALL, model="hybrid")


SAVED = ["--bf16", "--save", "somewhere"]


@pytest.mark.parametrize(
    ("words", "possible"),
    [
        (SAVED, False),
        (["--fp16", "--save", "somewhere"], False),
        ([*SAVED, "--use-distributed-optimizer"], True),
        ([*SAVED, "--no-save-optim"], True),
        (["--bf16"], True),
        (["--save", "somewhere"], True),
    ],
)
def test_an_optimizer_that_megatron_core_cannot_save(words: list[str], possible: bool) -> None:
    found = parsed([*cpu_words(megatron_lm_arguments(RELEASED)), *words], validated=False)
    if possible:
        check_arguments(found)
    else:
        with pytest.raises(ValueError, match=r"--use-distributed-optimizer: found False, .* or --no-save-optim$"):
            check_arguments(found)


def test_megatron_core_still_cannot_save_it() -> None:
    """Else the refusal above is to go. It fails over the router's own group."""
    with model_parallel():
        model = build_model(SMALL, params_dtype=torch.bfloat16, backend="local")
        wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        config = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16)
        optimizer = get_megatron_optimizer(config, [wrapped])
        with pytest.raises(ValueError, match="does not match any model sharded param"):
            optimizer.sharded_state_dict(model.sharded_state_dict(), is_loading=True)
