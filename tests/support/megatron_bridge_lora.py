"""LoRA adapters of megatron-bridge on our model: trained on one rank of many, and what their gradients must be.

The truth is the chain rule over `transformers`' gradient of the merged weight: of W + alpha/rank x B A, dA is
alpha/rank x B^T dW, and dB is alpha/rank x dW A^T. Adapters and gradients are under the names of the host's export.
"""

import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from reference.parallelism import Parallelism
from support.megatron_bridge import forward_step, provider_at, with_norms_of_the_host
from support.sharded_models import groups_of

RANK, ALPHA = 4, 8
IN, OUT = ".lora_A.weight", ".lora_B.weight"
SEQ, BATCH, STEPS, LEARNING_RATE = 8, 2, 2, 0.05
ATTENTION, EXPERTS = ("linear_qkv", "linear_proj"), ("linear_fc1", "linear_fc2")
# What the host puts one adapter on, so that its A is one: the queries, keys and values, and an expert's gate and up.
SHARE_THEIR_INPUT = (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))


class Step(NamedTuple):
    """The adapters before a step of training, and their gradients in it."""

    adapters: dict[str, Tensor]
    grads: dict[str, Tensor]


def lora(targets: tuple[str, ...]) -> Any:
    from megatron.bridge.peft.lora import LoRA

    return LoRA(target_modules=list(targets), dim=RANK, alpha=ALPHA)


def build_with_adapters(auto: Any, layout: Parallelism, targets: tuple[str, ...], **fields: Any) -> list[nn.Module]:
    """This rank's chunks with random adapters, ready to train."""
    from megatron.core.distributed import DistributedDataParallelConfig

    provider = provider_at(auto, layout, **fields)
    provider.register_pre_wrap_hook(partial(lora(targets), training=True))
    models = provider.provide_distributed_model(
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), use_cpu_initialization=True
    )
    with torch.no_grad():
        for model in models:
            for name, parameter in adapters_of(model).items():
                parameter.copy_(_random(name, parameter, layout))
    return models


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".adapter." in name}


def _random(name: str, parameter: nn.Parameter, layout: Parallelism) -> Tensor:
    """Experts' adapters are the same on all ranks of their data-parallel group, others a part of their own."""
    tp, parts = distributed.get_rank() % layout.tp, layout.expert_tp if ".experts." in name else layout.tp
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {tp % parts}".encode()))
    return torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5 / 2


def train_adapters(
    folder: str,
    tokens: Tensor,
    layout: Parallelism,
    targets: tuple[str, ...],
    out: str | None = None,
    hosts_norms: bool = False,
) -> list[Step]:
    """Steps of gradient descent, by megatron-core's schedule and `finalize_model_grads`; then the adapter is saved."""
    from megatron.bridge import AutoBridge
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    settings = {
        "moe_aux_loss_coeff": 0.0,
        "moe_router_bias_update_rate": 0.0,
        "finalize_model_grads_func": partial(finalize_model_grads, force_all_reduce=True),
    }
    if hosts_norms:
        settings["transformer_layer_spec"] = with_norms_of_the_host
    auto, steps = AutoBridge.from_hf_pretrained(folder), []
    with groups_of(layout):
        (ddp,) = models = build_with_adapters(auto, layout, targets, **settings)
        adapters = adapters_of(ddp)
        for _ in range(STEPS):
            ddp.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter([tokens]),
                model=models,
                num_microbatches=1,
                seq_length=SEQ,
                micro_batch_size=BATCH,
            )
            values = {name: parameter.detach().clone() for name, parameter in adapters.items()}
            before = exported_adapters(auto, models)
            with torch.no_grad():
                for parameter in adapters.values():
                    parameter.copy_(parameter.main_grad)
                steps.append(Step(before, exported_adapters(auto, models)))
                for name, parameter in adapters.items():
                    parameter.copy_(values[name] - LEARNING_RATE * parameter.main_grad)
        if out is not None:
            auto.save_hf_adapter(models, out, lora(targets), show_progress=False)
    return steps


def exported_adapters(auto: Any, models: list[nn.Module]) -> dict[str, Tensor]:
    return {
        name: value.detach().clone()
        for name, value in auto.export_adapter_weights(models, cpu=True, show_progress=False)
    }


def merged(weights: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with the adapters' products added in float64."""
    result = dict(weights)
    for name, inner in adapters.items():
        if name.endswith(IN):
            base = name.removesuffix(IN)
            product = adapters[base + OUT].double() @ inner.double()
            result[base + ".weight"] = weights[base + ".weight"].double() + ALPHA / RANK * product
    return result


def adapter_gradients(adapters: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the chain rule, from gradients of the merged weights."""
    found: dict[str, Tensor] = {}
    for name in adapters:
        stem, _, module = name.removesuffix(IN).removesuffix(OUT).rpartition(".")
        sharing = next((group for group in SHARE_THEIR_INPUT if module in group), (module,))
        if name.endswith(OUT):
            inner = adapters[f"{stem}.{module}{IN}"].double()
            found[name] = ALPHA / RANK * grads[f"{stem}.{module}.weight"].double() @ inner.T
        else:
            parts = [(adapters[f"{stem}.{part}{OUT}"], grads[f"{stem}.{part}.weight"]) for part in sharing]
            found[name] = ALPHA / RANK * sum(outer.double().T @ grad.double() for outer, grad in parts)
    return found


def merge_and_export(folder: str, layout: Parallelism, targets: tuple[str, ...], out: str) -> dict[str, Tensor]:
    """The adapters of a model, which is saved merged."""
    from megatron.bridge import AutoBridge

    auto = AutoBridge.from_hf_pretrained(folder)
    with groups_of(layout):
        models = build_with_adapters(auto, layout, targets)
        auto.save_hf_pretrained(models, Path(out), show_progress=False)
        return exported_adapters(auto, models)
