"""megatron-bridge with the plug-in on two gloo ranks: weights bit for bit at every kind of parallelism, and gradients.

The truth of weights are the files: `reference.sharding.shard` of whole tensors dequantised by `reference.fp8`. That of
gradients is `transformers` in float64.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.forks import server_of
from support.megatron_bridge import (
    CONFIGS,
    build,
    check_export,
    check_files,
    check_parameters,
    forward_step,
    make_folder,
    plugin,
    provider_at,
    with_norms_of_the_host,
)
from support.oracles import (
    FLOAT32,
    FLOAT64,
    Case,
    disk_weights,
    hf_model,
    remove_float32_casts,
    settled_tokens,
    to_disk_names,
)
from support.ranks import RankPool
from support.sharded_models import groups_of, truth_of
from torch import Tensor, distributed

from reference.parallelism import Parallelism, spread_layers
from reference.sharding import Parameter, parameters, placements, unshard
from reference.weights import Dialect

pytestmark = pytest.mark.plugins

LAYOUTS = {
    "tp2": (Parallelism(tp=2, vocab_divisor=1), "two key heads"),
    "tp2, one key head": (Parallelism(tp=2, etp=1), "one key head"),
    "pp2": (Parallelism(pp=2, layers_per_stage=spread_layers(3, 2)), "two key heads"),
    "ep2": (Parallelism(ep=2, dp=2, etp=1), "two key heads"),
}


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with server_of("support.megatron_bridge"), RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("sources")
    return {name: str(make_folder(root / name.replace(" ", "_"), config)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_loaded_exported_and_saved_bit_for_bit(
    ranks: RankPool, folders: dict[str, str], tmp_path: Path, name: str
) -> None:
    """By our loops, and by the host's over our registry."""
    layout, config = LAYOUTS[name]
    ranks.call(_there_and_back, layout, folders[config], str(tmp_path / "saved"))
    check_files(tmp_path / "saved", truth_of(folders[config]))
    assert (tmp_path / "saved/config.json").read_text() == Path(folders[config], "config.json").read_text()


def _there_and_back(layout: Parallelism, folder: str, out: str) -> None:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge

    auto, rank, truth = AutoBridge.from_hf_pretrained(folder), distributed.get_rank(), truth_of(folder)
    assert isinstance(auto._model_bridge, plugin.MiniMaxM2Bridge)
    with groups_of(layout):
        models = build(auto, layout)
        check_parameters(models, auto, layout, rank)
        check_export(auto.export_hf_weights(models, show_progress=False), truth)
        auto.save_hf_pretrained(models, out, distributed_save=layout.tp > 1)  # else rank 0 writes

        with torch.no_grad():
            for model in models:
                for value in model.state_dict().values():
                    if isinstance(value, torch.Tensor):
                        value.fill_(7)
        MegatronModelBridge.load_weights_hf_to_megatron(auto._model_bridge, auto.hf_pretrained, models)
        check_parameters(models, auto, layout, rank)
        tasks = auto.get_conversion_tasks(models)
        check_export(auto.export_hf_weights(models, show_progress=False, conversion_tasks=tasks), truth)


# ----------------------------------------------------------------------------------------------------------- gradients

CASE = Case(heads=8, groups=2, head_dim=16, rotary=8, hidden=32, width=24, experts=4, top_k=2, layers=2, vocab=64)
TP2 = Parallelism(tp=2, etp=1)
SEQ, BATCH = 8, 2
# Sums are made in another order on each shard: errors of the size of transformers' own, not the same errors. The host's
# mistake is thousands of times as large.
ALLOWED = 2.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """A float32 checkpoint, tokens, and `transformers`' gradients in float32 and in float64."""
    folder, weights = tmp_path_factory.mktemp("float32"), disk_weights(CASE)
    config = CASE.released_config() | {"architectures": ["MiniMaxM2ForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    tokens = settled_tokens(hf_model(CASE, weights, FLOAT32), batch=BATCH, seq=SEQ + 1)

    def gradients(dtype: torch.dtype) -> dict[str, Tensor]:
        model = hf_model(CASE, {name: value.to(dtype) for name, value in weights.items()}, dtype)
        model(tokens, labels=tokens).loss.backward()
        return to_disk_names({name: parameter.grad for name, parameter in model.named_parameters()})

    theirs = gradients(FLOAT32)
    with pytest.MonkeyPatch.context() as patch:
        remove_float32_casts(patch)
        return str(folder), tokens, theirs, gradients(FLOAT64)


def test_gradients_at_tp_2_equal_those_of_one_process(ranks: RankPool, trained) -> None:
    folder, tokens, theirs, truth = trained
    found = _whole(ranks.call(_gradients, folder, tokens, False))
    assert found.keys() == truth.keys()
    worst = max(found, key=lambda name: _excess(name, found, theirs, truth))
    print(f"error over transformers' own: max {_excess(worst, found, theirs, truth):.2f} ({worst})")
    assert _excess(worst, found, theirs, truth) <= ALLOWED, worst


def test_the_norms_of_the_host_give_wrong_gradients_at_tp_2(ranks: RankPool, trained) -> None:
    """The same model with the host's own norms: the proof above must not pass with them."""
    folder, tokens, theirs, truth = trained
    found = _whole(ranks.call(_gradients, folder, tokens, True))
    off = {
        name: ((value - truth[name]).norm() / truth[name].norm()).item()
        for name, value in found.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "embed_tokens.weight"))
    }
    print({name: f"{share:.2%}" for name, share in off.items()})
    assert min(off[name] for name in off if "proj" in name) > 1e-3
    assert all(_excess(name, found, theirs, truth) > 100 * ALLOWED for name in off)


def _excess(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Our error over transformers' own, both against the truth, as norms; one rounding is granted to both."""
    granted = torch.finfo(FLOAT32).eps / 2 * truth[name].norm()
    error, own = ((side[name].double() - truth[name]).norm() + granted for side in (ours, theirs))
    return (error / own).item()


def _held(rank: int) -> list[Parameter]:
    return parameters(CASE.model_config(), TP2, rank, Dialect.MEGATRON_LOCAL)


def _whole(ranks: list[dict[tuple[int, str], Tensor]]) -> dict[str, Tensor]:
    """Gradients put together from both ranks, under on-disk names; what a rank has none of is left out."""
    values = {(rank, *key): value for rank, grads in enumerate(ranks) for key, value in grads.items()}
    placed = placements({rank: _held(rank) for rank in range(2)})
    return {
        source: unshard(places, values)
        for source, places in placed.items()
        if all((place.rank, place.chunk, place.name) in values for place in places)
    }


def _gradients(folder: str, tokens: Tensor, hosts_norms: bool) -> dict[tuple[int, str], Tensor]:
    """This rank's gradients of the mean loss, by megatron-core's schedule and `finalize_model_grads`."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    settings = {
        "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": 0.0,
        "finalize_model_grads_func": partial(finalize_model_grads, force_all_reduce=True),
    }
    if hosts_norms:
        settings["transformer_layer_spec"] = with_norms_of_the_host
    with groups_of(TP2):
        provider = provider_at(AutoBridge.from_hf_pretrained(folder), TP2, **settings)
        (ddp,) = provider.provide_distributed_model(
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), use_cpu_initialization=True
        )
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([tokens]),
            model=[ddp],
            num_microbatches=1,
            seq_length=SEQ,
            micro_batch_size=BATCH,
        )
        found = {name: parameter.main_grad.clone() for name, parameter in ddp.module.named_parameters()}
        return {
            (held.chunk, held.name): found[held.name] for held in _held(distributed.get_rank()) if held.name in found
        }
