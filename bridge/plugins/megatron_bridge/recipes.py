"""Recipes for MiniMax-M2, M2.1, M2.5 and M2.7 in the form of megatron-bridge's, which has none for them.

Each returns a new `ConfigContainer`, to be changed as the caller likes, for `megatron.bridge.training.pretrain` and
`finetune`. Layouts are rows of `LAYOUTS`; `minimax-m2 plan` says that they fit on H100s of 80 GB, and activations are
recomputed layer by layer, so that what is left is enough for them. Settings are those that were seen to be right for
this model (`bridge/model/README.md`).

Experts are not cut by tensor parallelism and take no adapters: the host's adapters of experts are wrong on cut experts.
"""

# The host is not in the project's own environment.
# pyright: reportMissingImports=false

from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.data.builders import (
    GPTSFTDatasetConfig,
    HFDatasetSourceConfig,
    PromptCompletionSFTPreprocessingConfig,
)
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    GPTDatasetConfig,
    LoggerConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)

from bridge.plugins.megatron_bridge.provider import MiniMaxM2ModelProvider

HUB_ID = "MiniMaxAI/MiniMax-M2"
OUT = Path("nemo_experiments") / "minimax_m2"  # under the current folder, as the host's recipes have it


class Layout(NamedTuple):
    """GPUs and parallel sizes. Eight expert-parallel ranks are the GPUs of one host."""

    gpus: int
    tensor: int
    pipeline: int
    expert: int


LAYOUTS = {"pretrain": Layout(128, 2, 8, 8), "sft": Layout(128, 2, 8, 8), "peft": Layout(16, 2, 2, 8)}

MODEL_SETTINGS: dict[str, Any] = {
    "context_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": True,
    "moe_token_dispatcher_type": "alltoall",
    "pipeline_dtype": torch.bfloat16,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# A released model's choice of experts stays as it is; and an adapter's base must not change.
FROZEN_ROUTER_BIAS = {"moe_router_bias_update_rate": 0.0}


def minimax_m2_pretrain_128gpu_h100_bf16_config(hf_path: str = HUB_ID) -> ConfigContainer:
    """From random weights: TP 2, PP 8, EP 8 on 128 GPUs, on the host's mock data until `dataset.blend` is set.

    `hf_path`, a hub id or a folder, has the model's config.json and tokenizer.
    """
    dataset = GPTDatasetConfig(
        random_seed=1234,
        seq_length=4096,
        blend=None,
        blend_per_split=None,
        split="9999,8,2",
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
        dataloader_type="single",
        num_workers=8,
    )
    return ConfigContainer(
        model=_model(hf_path, LAYOUTS["pretrain"], dataset.seq_length),
        train=TrainingConfig(train_iters=300_000, global_batch_size=512, micro_batch_size=1),
        validation=ValidationConfig(eval_interval=2000, eval_iters=32),
        optimizer=_adam(lr=3e-4, min_lr=3e-5),
        scheduler=_cosine(warmup=2000),
        dataset=dataset,
        checkpoint=CheckpointConfig(save=_checkpoints(), load=_checkpoints(), save_interval=2000),
        **_common(hf_path, seed=1234),
    )


def minimax_m2_sft_128gpu_h100_bf16_config(hf_path: str = HUB_ID) -> ConfigContainer:
    """All weights: TP 2, PP 8, EP 8 on 128 GPUs, on SQuAD until `dataset` is set.

    `hf_path` is the Hugging Face checkpoint: the host takes weights from a local folder only, and refuses a hub id when
    it validates the configuration.
    """
    return _finetuning("sft", hf_path, lr=5e-6, global_batch_size=128)


def minimax_m2_peft_16gpu_h100_bf16_config(hf_path: str = HUB_ID) -> ConfigContainer:
    """LoRA on the attention: TP 2, PP 2, EP 8 on 16 GPUs, on SQuAD until `dataset` is set.

    `hf_path` is the Hugging Face checkpoint, a local folder, as for `minimax_m2_sft_128gpu_h100_bf16_config`.
    """
    config = _finetuning("peft", hf_path, lr=1e-4, global_batch_size=32)
    config.peft = LoRA(target_modules=["linear_qkv", "linear_proj"], dim=32, alpha=32)
    return config


def _finetuning(kind: str, hf_path: str, *, lr: float, global_batch_size: int) -> ConfigContainer:
    dataset = GPTSFTDatasetConfig(
        seq_length=2048,
        hf_dataset=HFDatasetSourceConfig(dataset_name="squad"),
        hf_validation_proportion=0.1,
        preprocessing=PromptCompletionSFTPreprocessingConfig(
            prompt_column="input", completion_column="output", separator=" "
        ),
        do_test=False,
        num_workers=1,
    )
    return ConfigContainer(
        model=_model(hf_path, LAYOUTS[kind], dataset.seq_length, **FROZEN_ROUTER_BIAS),
        train=TrainingConfig(train_iters=1000, global_batch_size=global_batch_size, micro_batch_size=1),
        validation=ValidationConfig(eval_interval=100, eval_iters=32),
        optimizer=_adam(lr=lr, min_lr=0.0),
        scheduler=_cosine(warmup=50),
        dataset=dataset,
        checkpoint=CheckpointConfig(
            pretrained_checkpoint=hf_path, save=_checkpoints(), load=_checkpoints(), save_interval=100
        ),
        **_common(hf_path, seed=5678),
    )


def _model(hf_path: str, layout: Layout, seq_length: int, **settings: Any) -> MiniMaxM2ModelProvider:
    provider = AutoBridge.from_hf_pretrained(hf_path).to_megatron_provider(load_weights=False)
    sizes = {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "expert_model_parallel_size": layout.expert,
    }
    for name, value in {**MODEL_SETTINGS, **sizes, **settings, "seq_length": seq_length}.items():
        setattr(provider, name, value)
    return provider


def _common(hf_path: str, *, seed: int) -> dict[str, Any]:
    """The tokenizer does not decide on the vocabulary's size: the model's is its checkpoint's."""
    return {
        "ddp": DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=True,
        ),
        "tokenizer": TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=hf_path),
        "logger": LoggerConfig(log_interval=10, tensorboard_dir=str(OUT / "tb_logs")),
        "rng": RNGConfig(seed=seed),
        "mixed_precision": "bf16_mixed",
        "env_vars": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    }


def _adam(*, lr: float, min_lr: float) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_eps=1e-8,
        weight_decay=0.1,
        clip_grad=1.0,
        use_distributed_optimizer=True,
    )


def _cosine(*, warmup: int) -> SchedulerConfig:
    return SchedulerConfig(
        lr_decay_style="cosine", lr_warmup_iters=warmup, start_weight_decay=0.1, end_weight_decay=0.1
    )


def _checkpoints() -> str:
    return str(OUT / "checkpoints")
