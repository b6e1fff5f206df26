"""megatron-core's distributed optimizer with Adam, whose step is one kernel, and waits for nothing.

megatron-core's step is three: it scales gradients by the clipping coefficient, moves float32 weights, and rounds them
to the model's; each reads again what the one before has written. Here `compiled.adam` does all three at once. Weights,
Adam's state, parameter groups and checkpoints are megatron-core's own, and so is all communication.

A step is not made if the norm of the gradient is not finite: the GPU itself sees to that, and the processor hears of it
when the step is on its way.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from bridge.model.layer_spec import default_backend

# What an optimizer of the chain must be, and what to set if it is not.
_NEEDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "the distributed optimizer": (
        lambda part: isinstance(part, DistributedOptimizer),
        "set use_distributed_optimizer=True",
    ),
    "weights of DistributedDataParallel": (
        lambda part: not part.ddp_config.use_megatron_fsdp,
        "set use_megatron_fsdp=False",
    ),
    "Transformer Engine, on a GPU": (lambda part: default_backend() == "transformer_engine", "install it there"),
    "Transformer Engine's Adam in float32, with decoupled weight decay": (
        lambda part: _is_adam(part.optimizer) and not part.config.use_precision_aware_optimizer,
        "set optimizer='adam', decoupled_weight_decay=True, optimizer_cpu_offload=False, optimizer_cuda_graph=False "
        "and use_precision_aware_optimizer=False",
    ),
    "no loss scale, so float32 or bfloat16": (
        lambda part: part.grad_scaler is None,
        "set bf16=True, and no loss_scale",
    ),
    "one norm of all gradients": (
        lambda part: not any(chunk.config.mtp_num_layers for chunk in part.model_chunks),
        "leave out multi-token prediction, whose gradients have a norm of their own",
    ),
    "parameters that are not quantized": (
        lambda part: not (part.ddp_config.fp8_param_gather or part.ddp_config.fp4_param_gather),
        "set fp8_param_gather=False and fp4_param_gather=False",
    ),
    "every finite gradient used, and nothing counted in it": (
        lambda part: math.isinf(part.config.grad_norm_skip_threshold) and not part.config.log_num_zeros_in_grad,
        "leave grad_norm_skip_threshold, and set log_num_zeros_in_grad=False",
    ),
    "weights that are gathered after the step, or by the next forward pass": (
        lambda part: not part.config.overlap_param_gather_with_optimizer_step,
        "set overlap_param_gather_with_optimizer_step=False",
    ),
}


def _is_adam(optimizer: Any) -> bool:
    from transformer_engine.pytorch.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    plain = isinstance(optimizer, FusedAdam) and not (optimizer.capturable or optimizer.master_weights)
    return plain and bool(optimizer.adam_w_mode) and all(group["bias_correction"] for group in optimizer.param_groups)


class FusedOptimizer(ChainedOptimizer):
    """What `megatron.core.optimizer.get_megatron_optimizer` returned, with a step that is one kernel for each group.

    It takes the place of the optimizer that it is made of, which must not be stepped any more.

    Raises:
        ValueError: one of the optimizers in it is not Adam as `compiled.adam` is; says which and what to set.
    """

    def __init__(self, optimizer: ChainedOptimizer) -> None:
        if not isinstance(optimizer, ChainedOptimizer):
            raise ValueError(
                f"optimizer: found {type(optimizer).__name__}, expected a ChainedOptimizer, which megatron-core makes "
                "with use_megatron_fsdp=False; set that, or keep megatron-core's optimizer as it is"
            )
        super().__init__(optimizer.chained_optimizers)
        self.parts: list[Any] = [
            part for part in self.chained_optimizers if not getattr(part, "is_stub_optimizer", False)
        ]
        for part in self.parts:
            for what, (holds, remedy) in _NEEDS.items():
                if not holds(part):
                    raise ValueError(
                        f"optimizer: found {type(part).__name__} of {type(part.optimizer).__name__}, and a step of one "
                        f"kernel needs {what}; {remedy}, or keep megatron-core's optimizer as it is"
                    )

    @torch.no_grad()
    def step(self, loss: Tensor | None = None) -> tuple[bool, float, None]:
        """As megatron-core's: whether a step was made, the norm of the gradient before it was clipped, and None.

        Gradients are left as they were, not clipped, and megatron-core's timers of the parts of a step are not called.
        If the norm or the loss is not finite, weights and their averages are not changed. What was before the step is
        not undone by that, such as the routers' bias, which `finalize_model_grads` moves.

        Args:
            loss: on the GPU, and the same on all ranks, which must come to the same end.
        """
        self.prepare_grads()
        device = torch.device("cuda", torch.cuda.current_device())
        norm = torch.as_tensor(self.get_grad_norm(), dtype=torch.float32, device=device).reshape(())
        finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        numbers = torch.stack([norm, finite.float()]).to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event()
        self._update(self._coefficient(norm).where(finite, torch.nan))
        arrived.synchronize()
        found, made = numbers.tolist()
        if not made:
            self._take_back()
        return bool(made), found, None

    def _take_back(self) -> None:
        """What the processor has noted of a step that the GPU did not make: its number, of the first also averages."""
        for part in self.parts:
            for group in part.param_groups:
                group["step"] -= 1
                if group["step"] == 0:
                    del group["step"]
                    for weight in group["params"]:
                        del part.optimizer.state[weight]

    def _coefficient(self, norm: Tensor) -> Tensor:
        """What clips the gradients, as in `megatron.core.optimizer.clip_grads`."""
        most = self.parts[0].config.clip_grad if self.parts else 0
        return (most / (norm + 1e-6)).clamp(max=1) if most > 0 else torch.ones_like(norm)

    def _update(self, scale: Tensor) -> None:
        """The experts' weights first: they take the GPU longest, and the processor prepares the others meanwhile."""
        for part in reversed(self.parts):
            pairs = zip(part.shard_fp32_from_float16_groups, part.shard_float16_groups, strict=True)
            rounded = dict(pair for groups in pairs for pair in zip(*groups, strict=True))
            for group in part.param_groups:
                _update_group(part.optimizer, group, rounded, scale)
            _copy_float32(part)
        if self.parts and not self.parts[0].ddp_config.overlap_param_gather:
            self.parts[0].start_param_sync_for_bucket_group_subset()  # of all weights; each of them would


def _update_group(optimizer: Any, group: dict[str, Any], rounded: dict[Tensor, Tensor], scale: Tensor) -> None:
    from compiled.adam import AdamTensors, adam_step  # it needs Triton, which hosts without a GPU may lack

    step = int(group.get("step", 0)) + 1  # also of no weights: other ranks may have some
    moved = []
    for weight in group["params"]:
        if not optimizer.state[weight]:
            optimizer.initialize_state(weight, False)
        if weight.grad is not None:
            state = optimizer.state[weight]
            row = AdamTensors(weight.grad, weight, state["exp_avg"], state["exp_avg_sq"], rounded.get(weight))
            moved.append(row)
    adam_step(moved, scale, step=step, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})
    group["step"] = step


def _copy_float32(part: Any) -> None:
    """To the model, what is float32 there, if it is not the same memory: `restore_from_cpu` gives it another."""
    for shards, weights in zip(part.shard_fp32_groups, part.model_fp32_groups, strict=True):
        for shard, weight in zip(shards, weights, strict=True):
            own = part._get_model_param_range_map(weight)["param"]
            of_model = weight.data.view(-1)[own.start : own.end]
            if of_model.data_ptr() != shard.data_ptr():
                of_model.copy_(shard)
