"""Runs of `bridge.training` on ranks, and the same run by `transformers` and torch in one process.

Ranks are gloo's, or with GPUs NCCL's, which then train Transformer Engine's layers.

The oracle is `MiniMaxM2ForCausalLM` and torch's AdamW, on the samples of the run. What `transformers` has not are the
load-balancing loss of a sigmoid router and the bias update, from `reference.moe`, and the learning rate, from here.
"""

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bridge.huggingface.byte_tokenizer import byte_tokenizer_files
from bridge.huggingface.random_checkpoint import SMALL_CONFIG, make_checkpoint
from bridge.training.settings import TrainJob
from reference.moe import load_balancing_loss, update_expert_bias
from support.checks import ROOT
from support.oracles import chosen_experts
from support.ranks import RankPool

TEXT = ROOT / "tests" / "data" / "alice.txt"
CONFIG: dict[str, Any] = SMALL_CONFIG | {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,
}
# Of what takes one or two, where no rank waits for another one for minutes; with GPUs ranks take long to start.
SECONDS = 120.0 if torch.cuda.is_available() else 60.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS: dict[str, Any] = {
    "steps": 10,
    "seq_length": 32,
    "global_batch_size": 4,
    "dtype": "fp32",
    "lr": 3e-3,
    "warmup_steps": 2,
    "epsilon": 1e-6,
    "bias_update_rate": 0.01,
}


def make_source(folder: Path, *, fp8: bool = True, **changes: Any) -> Path:
    """A checkpoint with a byte-level tokenizer; float32 weights of an FP8 one are not what bfloat16 holds of them."""
    config = {key: value for key, value in (CONFIG | changes).items() if fp8 or key != "quantization_config"}
    make_checkpoint(folder, config, mtp_layers=1, carried=byte_tokenizer_files(CHAT_TEMPLATE))
    return folder


def job_of(source: Path, out: Path, **changes: Any) -> TrainJob:
    return TrainJob(**{"model": str(source), "data": (str(TEXT),), "out": str(out)} | SETTINGS | changes)


def training_ranks(world: int) -> RankPool:
    """So many ranks for `run_job`; a test is skipped on a host of fewer GPUs."""
    gpus = torch.cuda.device_count()
    if not gpus:
        return RankPool(world)
    if gpus < world:
        pytest.skip(f"needs {world} GPUs")
    return RankPool(world, "nccl", environment={"NVIDIA_TF32_OVERRIDE": "0"})


def run_job(values: dict[str, Any]) -> dict[str, Any]:
    """One rank's part of a run."""
    from bridge.training.train import train

    return train(TrainJob(**values))._asdict()


def gathers_of_a_run(values: dict[str, Any]) -> list[int]:
    """How often the weights of each group of buckets were gathered."""
    from megatron.core.distributed import DistributedDataParallel

    seen: Counter[int] = Counter()
    real = DistributedDataParallel._start_bucket_group_param_sync

    def gather(self: Any, group: Any, **named: Any) -> Any:
        seen[id(group)] += 1
        return real(self, group, **named)

    with patch.object(DistributedDataParallel, "_start_bucket_group_param_sync", gather):
        run_job(values)
    return list(seen.values())


def values_of(job: TrainJob) -> dict[str, Any]:
    return asdict(job)


class Curve(NamedTuple):
    """Loss and gradient norm of each step."""

    losses: list[float]
    norms: list[float]


def samples_of(job: TrainJob, folder: Path) -> list[list[Tensor]]:
    """The sequences of each step, with the token after each: what the run is given."""
    from bridge.model.process_groups import model_parallel
    from bridge.training.data.batches import build_dataset
    from bridge.training.data.indexed import make_sources
    from bridge.training.data.tokenizer import Tokenizer

    with model_parallel():
        sources = make_sources(job.data, Tokenizer(job.model, CONFIG["vocab_size"]), CONFIG["vocab_size"], folder)
        dataset = build_dataset(job, sources, folder / "indices")
        found = [dataset[number] for number in range(job.steps * job.global_batch_size)]
    whole = [torch.cat([one["tokens"], one["labels"][-1:]]) for one in found]
    return [whole[n : n + job.global_batch_size] for n in range(0, len(whole), job.global_batch_size)]


def learning_rate(job: TrainJob, step: int) -> float:
    """Linear warm-up from 0, then a cosine to `min_lr`; the first step is 1 and has the rate of 0 steps done."""
    done = step - 1
    if job.warmup_steps and done <= job.warmup_steps:
        return job.lr * done / job.warmup_steps
    ratio = (done - job.warmup_steps) / (job.steps - job.warmup_steps)
    return job.min_lr + (job.lr - job.min_lr) * 0.5 * (1 + math.cos(math.pi * ratio))


def train_transformers(job: TrainJob, steps: list[list[Tensor]], dtype: torch.dtype) -> Curve:
    """The run by `transformers`; in float64 with `support.oracles.remove_float32_casts`.

    Of a bfloat16 model the optimizer has float32 weights, as everybody's has.
    """
    model = oracle_model(Path(job.model), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weights = {p: p.detach().to(wide, copy=True) for p in model.parameters()}
    matrices = [weight for weight in weights.values() if weight.dim() > 1]
    vectors = [weight for weight in weights.values() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": job.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job.lr, betas=(job.beta1, job.beta2), eps=job.epsilon)
    losses, norms = [], []
    for number, sequences in enumerate(steps, 1):
        model.zero_grad()
        counts = [torch.zeros(CONFIG["num_local_experts"], dtype=torch.long) for _ in model.model.layers]
        total = 0.0
        for sequence in sequences:
            loss, aux = _losses(model, sequence, counts)
            ((loss + aux) / len(sequences)).backward()
            total += loss.item() / len(sequences)
        norm = torch.stack([p.grad.to(wide).norm() for p in weights if p.grad is not None]).norm()
        scale = min(1.0, job.clip_grad / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(job, number)
        with torch.no_grad():
            for parameter, weight in weights.items():
                weight.grad = None if parameter.grad is None else parameter.grad.to(wide) * scale
            for layer, count in zip(model.model.layers, counts, strict=True):
                bias = layer.mlp.e_score_correction_bias
                bias.copy_(update_expert_bias(bias, count, rate=job.bias_update_rate))
        optimizer.step()
        with torch.no_grad():
            for parameter, weight in weights.items():
                parameter.copy_(weight)
        losses.append(total)
        norms.append(norm.item())
    return Curve(losses, norms)


def oracle_model(source: Path, dtype: torch.dtype) -> Any:
    """`transformers`' model of a checkpoint, dequantised by the reference, in a dtype."""
    from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

    from support.oracles import to_memory_names
    from support.sharded_models import truth_of

    config = MiniMaxM2Config.from_pretrained(source)
    rotated = CONFIG["rotary_dim"] / CONFIG["head_dim"]  # what transformers before 5.18 reads
    config.rope_parameters = config.rope_parameters | {"partial_rotary_factor": rotated}
    model = MiniMaxM2ForCausalLM._from_config(
        config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    known = {name for name in truth_of(str(source)).whole if ".enorm" not in name and ".hnorm" not in name}
    weights = {name: value.to(dtype) for name, value in truth_of(str(source)).whole.items() if name in known}
    model.load_state_dict(to_memory_names(weights), strict=True)
    return model


def _losses(model: Any, sequence: Tensor, counts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of a sequence, and its load-balancing losses; adds to the tokens of each expert."""
    out = model(sequence[None, :-1], output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits[0], sequence[1:])
    experts, top_k = CONFIG["num_local_experts"], CONFIG["num_experts_per_tok"]
    aux = torch.zeros((), dtype=loss.dtype)
    for layer, logits, count in zip(model.model.layers, out.router_logits, counts, strict=True):
        chosen = chosen_experts(logits, layer.mlp.e_score_correction_bias, top_k)
        count += torch.bincount(chosen.flatten(), minlength=experts)
        aux = aux + load_balancing_loss(logits, top_k=top_k, coefficient=CONFIG["router_aux_loss_coef"])
    return loss, aux


def checkpoint_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a run's checkpoint, weights and optimizer's state, under its key."""
    from bridge.torch_dist.reader import TorchDistFolder

    files = TorchDistFolder(run / "checkpoints" / f"iter_{step:07d}")
    return {key: files.read(key, (0,) * len(shape), shape) for key, shape in files.shapes.items()}
