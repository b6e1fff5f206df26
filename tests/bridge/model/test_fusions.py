"""What the table of fusions says is so: fields, gains, what a model has of them; a fused loss is the plain one."""

import json
import warnings
from dataclasses import fields
from importlib.metadata import PackageNotFoundError
from typing import NamedTuple, get_args

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from support.checks import RESULTS
from support.small_model import DEVICE, SMALL
from torch import Tensor

from bridge.model import config, fusions
from bridge.model.build import build_model
from bridge.model.config import (
    default_fusions,
    leave_out_refused_fusions,
    transformer_config,
    transformer_config_fields,
)
from bridge.model.fusions import (
    CROSS_ENTROPY,
    FASTEST,
    FUSIONS,
    MODEL_DEFAULTS,
    RECORD,
    FusionName,
    check_fusions,
    chosen_settings,
    fusion_environment,
    fusion_settings,
)
from bridge.model.layer_spec import Backend
from bridge.model.process_groups import model_parallel
from bridge.model.safe_settings import check_settings


def test_the_table_is_of_megatrons_fields_and_what_settings_offer() -> None:
    known = {field.name for field in fields(TransformerConfig)}
    assert get_args(FusionName) == ("none", *FUSIONS)
    for fusion in FUSIONS.values():
        assert set(fusion.settings) <= known
        assert set(fusion.backends) <= set(get_args(Backend))


def test_the_fastest_are_all_but_the_other_cross_entropy() -> None:
    others = set(FUSIONS) - set(FASTEST)
    assert others | {CROSS_ENTROPY} == {"cross_entropy", "cross_entropy_te"}
    assert len(others) == 1
    assert CROSS_ENTROPY not in others
    assert tuple(name for name in FUSIONS if name not in others) == FASTEST
    assert set(MODEL_DEFAULTS) < set(FASTEST)


def test_no_fusion_is_megatrons_default() -> None:
    defaults = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    for fusion in FUSIONS.values():
        differs = any(getattr(defaults, field) != value for field, value in fusion.settings.items())
        assert differs or fusion.environment
    assert all(getattr(defaults, field) is value is False for field, value in fusion_settings(("none",)).items())
    assert chosen_settings(("none",)) == {}
    assert fusion_environment(("none",)) == {}


def test_fusions_are_put_together_and_contradictions_found() -> None:
    two = {"moe_router_fusion": True, "moe_permute_fusion": True}
    assert chosen_settings(("router", "permute")) == two
    others = {"cross_entropy_loss_fusion": False, "gradient_accumulation_fusion": False}
    assert fusion_settings(("router", "permute")) == two | others
    with pytest.raises(ValueError, match=r"found none beside router; leave none out, or the others"):
        fusion_settings(("none", "router"))
    with pytest.raises(ValueError, match=r"want cross_entropy_fusion_impl to be 'native' and 'te'; choose one"):
        fusion_settings(("cross_entropy", "cross_entropy_te"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("backend", get_args(Backend))
@pytest.mark.parametrize("gpu", [True, False])
def test_a_model_has_the_fastest_where_they_are_recorded(
    gpu: bool, backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    recorded = gpu and backend == "transformer_engine" and dtype == torch.bfloat16
    assert default_fusions(backend, dtype) == (chosen_settings(MODEL_DEFAULTS) if recorded else {})
    fields = transformer_config_fields(SMALL, params_dtype=dtype, backend=backend)
    assert (chosen_settings(MODEL_DEFAULTS).items() <= fields.items()) == recorded


@pytest.mark.parametrize(
    ("installed", "chosen"), [("2.20.2", "te"), ("2.20", "te"), ("2.19.0", ""), ("2.9", ""), (None, "")]
)
def test_the_cross_entropy_is_transformer_engines_where_that_is_mended(
    installed: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only there megatron-core's warning of it is not shown."""

    def version(name: str) -> str:
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(fusions, "version", version)
    default = fusions.default_cross_entropy()
    assert default == ("cross_entropy_te" if chosen == "te" else "cross_entropy")
    monkeypatch.setattr(config, "CROSS_ENTROPY", default)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        transformer_config(SMALL, **chosen_settings(("cross_entropy_te",)))
    assert any("cross entropy" in str(one.message) for one in shown) == (chosen != "te")


@pytest.mark.parametrize("name", ["cross_entropy", "cross_entropy_te"])
def test_a_cross_entropy_that_is_a_default_gives_way_to_another_dtype(
    name: FusionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a host framework sets the dtype of a provider."""
    monkeypatch.setattr(config, "MODEL_DEFAULTS", (name,))
    megatron = transformer_config(SMALL, **chosen_settings((name,)))
    megatron.params_dtype, megatron.bf16, megatron.fp16 = torch.float16, False, True
    leave_out_refused_fusions(megatron)
    assert not megatron.cross_entropy_loss_fusion
    check_settings(megatron)


def test_a_default_gives_way_to_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is asked for itself does not: both are refused."""
    monkeypatch.setattr(config, "default_fusions", lambda *_: {"moe_router_fusion": True})
    assert transformer_config(SMALL).moe_router_fusion
    assert not transformer_config(SMALL, moe_enable_routing_replay=True).moe_router_fusion
    with pytest.raises(ValueError, match=r"moe_router_fusion=True, moe_enable_routing_replay=True: .*; set"):
        transformer_config(SMALL, moe_enable_routing_replay=True, moe_router_fusion=True)


def test_gains_are_those_of_the_record() -> None:
    """Milliseconds in which the GPU was busy, of the step with graphs alone less that with the fusion."""
    rows = json.loads((RESULTS / RECORD).read_text())["rows"]
    busy = {name: 1e3 * row["profiled"]["busy seconds"] for name, row in rows.items()}
    assert round(busy["graphs"]) == 250
    assert round(busy["fusions and graphs"]) == 204
    assert round(rows["fusions and graphs"]["x defaults"], 2) == 1.35
    for name, fusion in FUSIONS.items():
        saved = busy["graphs"] - busy[f"graphs, {name}"]
        assert fusion.gain.split()[0] == (f"{saved:.0f}" if saved > 1 else "none")


def test_what_a_backend_lacks_is_refused() -> None:
    check_fusions(("none",), "local")
    check_fusions(("cross_entropy",), "local")
    check_fusions(tuple(FUSIONS), "transformer_engine")
    with pytest.raises(ValueError, match=r"fusions: router, permute need Transformer Engine and a GPU, .*'local'"):
        check_fusions(("router", "cross_entropy", "permute"), "local")


class Losses(NamedTuple):
    """Losses, and the gradient of a weighted sum of them with respect to the logits."""

    values: Tensor
    gradient: Tensor


def losses_of(dtype: torch.dtype, **settings: object) -> tuple[Losses, Losses]:
    """As a model with the settings makes them, and torch's in float64 from the same logits."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 2, SMALL.vocab_size, generator=generator).to(DEVICE, dtype)
    labels = torch.randint(0, SMALL.vocab_size, (2, 7), generator=generator).to(DEVICE)
    weights = torch.randn(2, 7, generator=generator).to(DEVICE)
    exact = logits.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(exact.permute(1, 2, 0), labels, reduction="none")
    (true_gradient,) = torch.autograd.grad((truth * weights).sum(), exact)
    # Compiling takes longer than all of this: the same operations one by one.
    with model_parallel(), torch._dynamo.config.patch(disable=True):
        model = build_model(SMALL, params_dtype=dtype, backend="local")
        for name, value in settings.items():  # what is refused when it is built
            setattr(model.config, name, value)
        leaf = logits.clone().requires_grad_()
        losses = model.compute_language_model_loss(labels, leaf * 1)  # it is changed in place
        (gradient,) = torch.autograd.grad((losses * weights).sum(), leaf)
    return Losses(losses, gradient), Losses(truth, true_gradient)


FUSED = chosen_settings(("cross_entropy",))


def test_the_compiled_loss_and_its_gradient_are_torchs() -> None:
    """In bfloat16, in which float32 arithmetic is rounded once."""
    fused, truth = losses_of(torch.bfloat16, **FUSED)
    torch.testing.assert_close(fused.values.double(), truth.values, rtol=1e-6, atol=1e-6)
    unit = torch.finfo(torch.bfloat16).eps / 2
    torch.testing.assert_close(fused.gradient.double(), truth.gradient, rtol=1.01 * unit, atol=1e-7)


def test_the_compiled_loss_has_bfloat16_gradients_of_float32() -> None:
    """Why it is refused: the loss that is not fused has float32 ones."""
    fused, truth = losses_of(torch.float32, **FUSED)
    plain, _ = losses_of(torch.float32)
    torch.testing.assert_close(plain.gradient.double(), truth.gradient, rtol=1e-5, atol=1e-7)
    assert fused.gradient.dtype == torch.float32
    assert torch.equal(fused.gradient, fused.gradient.bfloat16().float())
    assert not torch.equal(plain.gradient, plain.gradient.bfloat16().float())
