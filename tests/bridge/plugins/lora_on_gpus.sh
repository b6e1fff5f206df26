#!/usr/bin/env bash
# LoRA and packed sequences in ms-swift with the plug-in, on two GPUs, by hand: Transformer Engine's modules, which LoRA
# wraps, cannot be built on a CPU. Usage: lora_on_gpus.sh FOLDER, with what `test_ms_swift.py` makes in it: source/, an
# FP8 checkpoint with a tokenizer, and data.jsonl. Needs torch, transformer-engine, megatron-core, mcore-bridge, ms-swift
# with its dependencies, peft, and this project on PYTHONPATH.
set -euo pipefail
folder=${1:?folder with source/ and data.jsonl}; here=$(cd "$(dirname "$0")" && pwd); root=$(cd "$here/../../.." && pwd)
export NPROC_PER_NODE=2 HF_HUB_OFFLINE=1 USE_HF=1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
common=(--model "$folder/source" --model_type minimax_m2 --template dummy --dataset "$folder/data.jsonl"
  --external_plugins "$root/bridge/plugins/ms_swift.py" --torch_dtype bfloat16 --tensor_model_parallel_size 2
  --expert_model_parallel_size 2 --expert_tensor_parallel_size 1 --sequence_parallel true --micro_batch_size 1
  --global_batch_size 2 --train_iters 3 --max_length 64 --packing true --lr 1e-3 --save_steps 3 --logging_steps 1
  --no_save_optim true --no_save_rng true --finetune true --save_safetensors true --split_dataset_ratio 0
  --attention_backend fused --add_version false)
megatron sft "${common[@]}" --tuner_type full --output_dir "$folder/full"
megatron sft "${common[@]}" --tuner_type lora --target_modules linear_qkv linear_proj --merge_lora false \
  --output_dir "$folder/lora"
megatron sft "${common[@]}" --tuner_type lora --target_modules linear_qkv linear_proj --merge_lora true \
  --output_dir "$folder/merged"
# Only attention was trained in the last: experts, embeddings and norms must be the source's bytes.
minimax-m2 verify "$folder/source" "$folder/merged/checkpoint-3-merged" || true
