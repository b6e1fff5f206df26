"""Whole MiniMax-M2 decoder layers, forward and backward: what the query and key norm costs in a training step.

Layers of true width, fewer experts, Transformer Engine spec, bfloat16. Routing is forced to be balanced, at random; in
one turn all variants route alike. Rows differ in the attention alone: the model with no norm and Transformer Engine's
fused rotation, which is the measure; ours (norm, split and rotation in one kernel each way); ours, the rotation left
to Transformer Engine; and two norms in the slots of megatron-core's own attention, ours and megatron-bridge's.

Model of the difference: ours reads and writes qkv once each way, which the fused rotation and megatron-core's split do
too, so nothing. Norms in the slots read and write it once more, some 300 us a layer at TP 1, under 1 % of it.

    python tests/benchmarks/bench_layer.py OUT.json                                  one GPU, GPTModel
    python tests/benchmarks/bench_layer.py OUT.json hybrid                           one GPU, HybridModel
    torchrun --nproc-per-node 2 tests/benchmarks/bench_layer.py OUT.json             TP 2 x EP 2
"""

import itertools
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec

from bridge.model.attention import MiniMaxM2SelfAttention
from bridge.model.config import gpt_model_arguments, hybrid_model_arguments, transformer_config
from bridge.model.layer_spec import minimax_m2_hybrid_spec, minimax_m2_layer_spec
from bridge.model.process_groups import model_parallel
from bridge.model.qk_norm import FullDimKNorm, FullDimQNorm
from reference.config import ModelConfig
from reference.model_class import DEFAULT_MODEL, ModelClass

sys.path.insert(0, str(Path(__file__).parent))
from record import environment, median_ms

LAYERS, EXPERTS, SEQ, BATCH = 4, 32, 4096, 4
WARM_UP, RUNS = 6, 120


class RotatedByTransformerEngine(MiniMaxM2SelfAttention):
    """The norm alone is ours: megatron-core's `forward` keeps the rotation."""

    forward = SelfAttention.forward


def with_attention(spec: ModuleSpec, attention: type) -> ModuleSpec:
    spec.submodules.self_attention.module = attention
    return spec


def with_norms(spec: ModuleSpec, q_norm: type, k_norm: type) -> ModuleSpec:
    """In the slots of megatron-core's attention."""
    slots = spec.submodules.self_attention.submodules
    slots.q_layernorm, slots.k_layernorm = q_norm, k_norm
    return with_attention(spec, SelfAttention)


def with_peer_norms(spec: ModuleSpec) -> ModuleSpec:
    from megatron.bridge.models.minimax_m2 import minimax_m2_provider as peer

    return with_norms(spec, peer.FullDimQNorm, peer.FullDimKNorm)


BASE = "no norm, TE's fused RoPE"
VARIANTS = {
    BASE: lambda spec: with_norms(spec, IdentityOp, IdentityOp),
    "ours": lambda spec: spec,
    "ours, TE's fused RoPE": lambda spec: with_attention(spec, RotatedByTransformerEngine),
    "ours, in the norm slots": lambda spec: with_norms(spec, FullDimQNorm, FullDimKNorm),
    "megatron-bridge": with_peer_norms,
}


def build(variant: str, kind: ModelClass, world: int) -> GPTModel | HybridModel:
    model = ModelConfig(rotary_dim=64, num_hidden_layers=LAYERS, num_local_experts=EXPERTS, vocab_size=8192)
    config = transformer_config(
        model,
        model=kind,
        backend="transformer_engine",
        tensor_model_parallel_size=world,
        expert_model_parallel_size=world,
        expert_tensor_parallel_size=1,
        sequence_parallel=world > 1,
        apply_rope_fusion=True,
        moe_permute_fusion=True,
        moe_router_fusion=True,
        moe_router_force_load_balancing=True,
    )
    if kind is ModelClass.HYBRID:
        stack = minimax_m2_hybrid_spec(config, "transformer_engine")
        VARIANTS[variant](stack.submodules.attention_layer)
        return HybridModel(config, stack, **hybrid_model_arguments(model, config) | {"max_sequence_length": SEQ}).cuda()
    spec = VARIANTS[variant](minimax_m2_layer_spec(config, "transformer_engine"))
    return GPTModel(config, spec, **gpt_model_arguments(model) | {"max_sequence_length": SEQ}).cuda()


def step_of(model: torch.nn.Module) -> Callable[[], None]:
    tokens = torch.randint(0, 8192, (BATCH, SEQ), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    positions = torch.arange(SEQ, device="cuda").expand(BATCH, -1)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(tokens, positions, None, labels=tokens).float().mean().backward()

    return step


def measure(models: dict[str, torch.nn.Module]) -> dict[str, dict]:
    """The variants take turns, in every order: a step runs faster after one that left the GPU cooler."""
    steps = {variant: step_of(model) for variant, model in models.items()}
    rows = {variant: {"ms": [], "peak GiB": peak_gib(models[variant], step)} for variant, step in steps.items()}
    orders = list(itertools.permutations(steps))
    for turn in range(-WARM_UP, RUNS):
        for variant in orders[turn % len(orders)]:
            model_parallel_cuda_manual_seed(turn + WARM_UP, force_reset_rng=True)  # the same routing
            milliseconds = median_ms(steps[variant], warm_up=0, runs=1)
            if turn >= 0:
                rows[variant]["ms"].append(round(milliseconds, 3))
    base = rows[BASE]["ms"]
    for variant, row in rows.items():
        ratios = [mine / other for mine, other in zip(row["ms"], base, strict=True)]
        row["median ms"] = statistics.median(row["ms"])
        row["of the model without norm"] = statistics.median(ratios)
        row["quartiles of it"] = statistics.quantiles(ratios)[::2]
        row["kernels, ms a step"] = kernels(steps[variant])
        models[variant].zero_grad(set_to_none=True)
    return rows


def peak_gib(model: torch.nn.Module, step: Callable[[], None]) -> float:
    """Of a step of this model, its parameters included, those of the others not."""
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated() - sum(x.nbytes for x in model.parameters())
    step()
    model.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() - others) / 2**30


def kernels(step: Callable[[], None], *, most: int = 30) -> dict[str, float]:
    """The kernels that take the most GPU time in one step, and all of them together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spent = {event.key: event.self_device_time_total / 1e3 for event in profile.key_averages()}
    longest = sorted(spent, key=spent.get, reverse=True)[:most]
    return {"all": round(sum(spent.values()), 3)} | {name[:120]: round(spent[name], 3) for name in longest}


def main(out: Path, kind: ModelClass) -> None:
    warnings.simplefilter("ignore")
    world = int(os.environ.get("WORLD_SIZE", 1))
    sizes = {"tensor_model_parallel_size": world, "expert_model_parallel_size": world, "expert_tensor_parallel_size": 1}
    with model_parallel(**sizes):
        rows = measure({variant: build(variant, kind, world) for variant in VARIANTS})
        rank = torch.distributed.get_rank()
    if rank == 0:
        for variant, row in rows.items():
            print(
                f"{variant:28s} {row['median ms']:8.2f} ms  {row['of the model without norm']:6.3f} x "
                f"({' to '.join(f'{x:.3f}' for x in row['quartiles of it'])})  "
                f"kernels {row['kernels, ms a step']['all']:.2f} ms  peak {row['peak GiB']:.2f} GiB"
            )
        config = {
            "model": kind.class_name,
            "layers": LAYERS,
            "experts": EXPERTS,
            "tokens": SEQ * BATCH,
            "tp": world,
            "ep": world,
            "turns": RUNS,
        }
        out.write_text(json.dumps({**environment(), "config": config, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), ModelClass(sys.argv[2]) if len(sys.argv) > 2 else DEFAULT_MODEL)
