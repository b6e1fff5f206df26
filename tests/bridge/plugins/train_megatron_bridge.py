"""Training a small MiniMax-M2 by megatron-bridge's own entry points, `pretrain` and `finetune`, on two GPUs.

    torchrun --nproc-per-node 2 tests/bridge/plugins/train_megatron_bridge.py OUT [RUN…]

Starts from a Hugging Face folder that it makes in OUT, in float32 with Transformer Engine. A run is a row of `RUNS`:
unsharded (two data-parallel ranks), at TP 2, that resumed from the host's checkpoint, at TP 2 by the host's own bridge
for this model, and LoRA at TP 2; and at TP 2 in bfloat16 with the host's distributed optimizer, and that resumed.
OUT/record.json has losses and gradient norms of each step of each run, and how far the gradients of the first step are
from the unsharded run's. The exit status is 1 if something is not as it should be: the host's own bridge must show the
error in the gradients of queries and keys that ours does not have.

Two things stand in the way of megatron-bridge's training where its packages come from a registry, and neither is needed
here: it runs `make` for megatron-core's dataset index, which the wheel has built, without a Makefile; and it wants
nvidia-resiliency-ext, whose newest release there is too old for megatron-core (`support.no_async_saving`).
"""

# What the imports need is set between them.
# ruff: noqa: E402, I001

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[2]
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # else Transformer Engine's float32 products are TensorFloat-32
for folder in (TESTS.parent, TESTS, TESTS / "benchmarks"):
    sys.path.insert(0, str(folder))

import support.no_async_saving
import support.transformer_engine_names  # noqa: F401  # from here on the host can be imported
import torch
from bridge.plugins import megatron_bridge as plugin
from megatron.bridge import AutoBridge
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.models.minimax_m2.minimax_m2_bridge import MiniMaxM2Bridge as HostsBridge
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training import config as host
from megatron.bridge.training import initialize
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.finetune import finetune
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.utils import unwrap_model
from record import environment
from safetensors.torch import save_file
from torch import Tensor, distributed

from reference.parallelism import Parallelism
from reference.sharding import parameters, placements, unshard
from reference.weights import Dialect
from support.oracles import FLOAT32, Case, disk_weights

CASE = Case(heads=8, groups=2, head_dim=64, rotary=32, hidden=256, width=128, experts=8, top_k=2, layers=4, vocab=512)
SEQ, BATCH, STEPS, SAVED_AT, LEARNING_RATE = 64, 4, 6, 3, 1e-3
NO_CLIPPING = 1e9  # the norm is computed, and gradients stay as they are
# Float32 sums in another order, over a few layers. The host's error is a few percent.
EQUAL, WRONG = 1e-4, 1e-2
ROUNDED = 2**-8  # bfloat16's; Transformer Engine's attention adds in no fixed order
QUERIES_AND_KEYS = ("q_proj.weight", "k_proj.weight")


class Run(NamedTuple):
    """`resumed`: from the checkpoint of the run before."""

    tp: int
    hosts_bridge: bool = False
    resumed: bool = False
    lora: bool = False
    bf16: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else FLOAT32


RUNS = {
    "unsharded": Run(tp=1),
    "tp2": Run(tp=2),
    "resumed": Run(tp=2, resumed=True),
    "host": Run(tp=2, hosts_bridge=True),
    "lora": Run(tp=2, lora=True),
    "bf16": Run(tp=2, bf16=True),
    "bf16 resumed": Run(tp=2, bf16=True, resumed=True),
}


@dataclass
class RandomTokens(DatasetProvider):
    """Sequences by their number, the same in every run."""

    seq_length: int = SEQ
    dataloader_type: str = "single"
    num_workers: int = 0
    persistent_workers: bool = False
    skip_getting_attention_mask_from_dataset: bool = True

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, None, None]:
        return [self._sequence(number) for number in range(context.train_samples)], None, None

    def _sequence(self, number: int) -> dict[str, Tensor]:
        tokens = torch.randint(CASE.vocab, (self.seq_length + 1,), generator=torch.Generator().manual_seed(number))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.arange(self.seq_length),
        }


class Recorder(Callback):
    """Losses and gradient norms of each step, and the gradients of the first, on rank 0 under on-disk names."""

    def __init__(self, run: Run, out: Path):
        self.run, self.out = run, out
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.grads: dict[str, Tensor] = {}

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.losses.append(float(context.loss_dict["lm loss"]))
        self.norms.append(float(context.grad_norm))
        if len(self.losses) == 1 and not self.run.lora and not self.run.bf16:
            self.grads = whole_gradients(unwrap_model(context.model)[0], self.run)
        if len(self.losses) == STEPS and self.run.lora:
            auto = AutoBridge.from_hf_pretrained(self.out / "checkpoint")
            auto.save_hf_adapter(context.model, self.out / "adapter", context.state.cfg.peft, show_progress=False)


def whole_gradients(model: torch.nn.Module, run: Run) -> dict[str, Tensor]:
    """The gradients in the buffers, put together; empty on ranks but the first."""
    layout = Parallelism(tp=run.tp, dp=2 // run.tp, etp=1)
    mine = {in_our_attention(name): value.main_grad.cpu() for name, value in model.named_parameters()}
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    if distributed.get_rank():
        return {}
    held = {rank: parameters(CASE.model_config(), layout, rank, Dialect.MEGATRON_TE) for rank in range(len(every))}
    values = {
        (rank, parameter.chunk, parameter.name): every[rank][parameter.name]
        for rank, found in held.items()
        for parameter in found
        if parameter.name in every[rank]  # not the router's bias, which is a buffer
    }
    return {
        source: unshard(places, values)
        for source, places in placements(held).items()
        if all((place.rank, place.chunk, place.name) in values for place in places)
    }


def in_our_attention(name: str) -> str:
    """The host's norms are in megatron-core's slots, cut as ours are."""
    return name.replace("q_layernorm.weight", "qk_norm.q_weight").replace("k_layernorm.weight", "qk_norm.k_weight")


def make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = CASE.released_config() | {"architectures": ["MiniMaxM2ForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(disk_weights(CASE), folder / "model.safetensors")


def configure(run: Run, name: str, out: Path) -> host.ConfigContainer:
    """The host's configuration of a run from the folder in `out`."""
    folder = out / "checkpoint"
    auto = AutoBridge.from_hf_pretrained(folder)
    maker = HostsBridge() if run.hosts_bridge else plugin.MiniMaxM2Bridge()
    provider = maker.provider_bridge(auto.hf_pretrained)
    provider.tensor_model_parallel_size, provider.sequence_parallel = run.tp, run.tp > 1
    provider.expert_tensor_parallel_size = 1
    provider.seq_length = SEQ
    provider.moe_aux_loss_coeff, provider.moe_router_bias_update_rate = 0.0, 0.0
    provider.gradient_accumulation_fusion = False  # that takes another extension
    provider.params_dtype, provider.bf16 = run.dtype, run.bf16
    saved = str(out / ("lora" if run.lora else "bf16" if run.bf16 else "megatron"))
    saves = SAVED_AT if name in ("tp2", "lora", "bf16") else None
    return host.ConfigContainer(
        model=provider,
        train=host.TrainingConfig(train_iters=STEPS, global_batch_size=BATCH, micro_batch_size=1),
        validation=host.ValidationConfig(eval_iters=0, eval_interval=1000),
        optimizer=host.OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            weight_decay=0.0,
            clip_grad=NO_CLIPPING,
            params_dtype=run.dtype,
            bf16=run.bf16,
            use_distributed_optimizer=run.bf16,
        ),
        scheduler=host.SchedulerConfig(
            lr_decay_style="constant", lr_decay_iters=STEPS, start_weight_decay=0.0, end_weight_decay=0.0
        ),
        ddp=host.DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=run.bf16),
        dataset=RandomTokens(),
        logger=host.LoggerConfig(log_interval=1),
        # Of two sizes the model's counts, if the tokenizer's is not the larger.
        tokenizer=host.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=CASE.vocab // 2),
        checkpoint=host.CheckpointConfig(
            pretrained_checkpoint=str(folder),
            load=saved if run.resumed else None,
            ckpt_step=SAVED_AT if run.resumed else None,
            save=saved if saves else None,
            save_interval=saves,
            ckpt_format="torch_dist",
            async_strategy="mcore",
        ),
        rng=host.RNGConfig(seed=1),
        peft=LoRA(target_modules=["linear_qkv", "linear_proj"], dim=8, alpha=16) if run.lora else None,
    )


def train(name: str, out: Path) -> Recorder:
    run = RUNS[name]
    recorder = Recorder(run, out)
    entry = finetune if run.lora or run.resumed else pretrain
    entry(configure(run, name, out), forward_step, callbacks=[recorder])
    return recorder


def off(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors, as norms."""
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    return {name: float((found[name] - exact).norm() / exact.norm()) for name, exact in truth.items()}


def apart(found: list[float], truth: list[float]) -> float:
    """The largest relative difference of a step."""
    return max(abs(value / other - 1) for value, other in zip(found, truth, strict=True))


def judge(done: dict[str, Recorder], out: Path) -> dict[str, Any]:
    """(value, whether it is as it should be) for each claim whose runs are done."""
    claims: dict[str, tuple[Any, bool]] = {}
    unsharded, tp2 = done.get("unsharded"), done.get("tp2")
    for name in {"tp2", "host"} & done.keys() if unsharded else ():
        errors = off(done[name].grads, unsharded.grads)
        worst = max(errors, key=errors.__getitem__)
        if name == "tp2":
            claims["gradients at TP 2 equal the unsharded"] = (f"{errors[worst]:.1e} {worst}", errors[worst] < EQUAL)
        else:
            wrong = [errors[key] for key in errors if key.endswith(QUERIES_AND_KEYS)]
            claims["the host's own bridge: wrong for queries and keys"] = (
                f"{min(wrong):.1%} to {max(wrong):.1%}", min(wrong) > WRONG)  # fmt: skip
    if unsharded and tp2:
        for what, ours, theirs in (("losses", tp2.losses, unsharded.losses), ("norms", tp2.norms, unsharded.norms)):
            claims[f"{what} at TP 2 equal the unsharded"] = (apart(ours, theirs), apart(ours, theirs) < 10 * EQUAL)
        claims["the loss is finite and moves"] = (tp2.losses, 0 < abs(tp2.losses[-1] - tp2.losses[0]) < 10)
    for first, second, bound in (("tp2", "resumed", EQUAL), ("bf16", "bf16 resumed", ROUNDED)):
        for what in ("losses", "norms") if {first, second} <= done.keys() else ():
            found, expected = (getattr(done[name], what) for name in (second, first))
            difference = apart(found, expected[SAVED_AT:])
            claims[f"{what} {second}"] = (difference, difference < bound)
    if "lora" in done:
        files = sorted(path.name for path in (out / "adapter").iterdir())
        saved = files == ["adapter_config.json", "adapter_model.safetensors"]
        claims["LoRA: the adapter is saved, the loss moves"] = (
            done["lora"].losses, saved and done["lora"].losses[0] != done["lora"].losses[-1])  # fmt: skip
    return {claim: {"found": found, "holds": bool(holds)} for claim, (found, holds) in claims.items()}


def main() -> int:
    out, names = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(RUNS)
    get_write_results_queue("fork")  # else its process is a fresh one, which imports all of the above again
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl")
    if distributed.get_world_size() != 2:
        raise SystemExit(f"two ranks are needed, found {distributed.get_world_size()}: torchrun --nproc-per-node 2")
    initialize.compile_helpers = lambda: None  # the wheel has them, and no Makefile
    if distributed.get_rank() == 0:
        make_folder(out / "checkpoint")
    distributed.barrier()
    done: dict[str, Recorder] = {}
    record: dict[str, Any] = {**environment(), "case": vars(CASE), "runs": {}}
    for name in names:
        start = time.monotonic()
        done[name] = train(name, out)
        record["runs"][name] = {
            "losses": done[name].losses,
            "gradient norms": done[name].norms,
            "seconds": round(time.monotonic() - start, 1),
        }
        if distributed.get_rank() == 0:
            record["claims"] = judge(done, out)
            (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    leader = distributed.get_rank() == 0
    distributed.destroy_process_group()
    if not leader:
        return 0
    print(json.dumps(record["claims"], indent=1))
    return 0 if all(claim["holds"] for claim in record["claims"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
