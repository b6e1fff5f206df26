"""What a rank sends to others in one training step, in bytes, by the kind of parallelism that it is for.

Collectives over n ranks are counted as rings: a rank sends (n - 1) / n of an all-gathered or reduce-scattered tensor's
whole size. Of a stage's ranks all send equally much, with balanced routing; the stage is the one with most layers. Not
counted: numbers of some bytes a token (the norms' sums, the loss), the embedding's and the head's collectives, and the
gradients of weights that tensor-parallel ranks have alike.

Sources: megatron-core distributed.param_and_grad_buffer, tensor_parallel.layers, moe.token_dispatcher and
pipeline_parallel.schedules.
"""

from typing import NamedTuple

from reference.activations import Tokens, Workload, token_counts
from reference.config import ModelConfig
from reference.memory import holdings
from reference.parallelism import Parallelism


class Traffic(NamedTuple):
    """Bytes that one rank sends in a step.

    Args:
        data: gradients are reduce-scattered in float32, and parameters all-gathered as they are (the distributed
            optimizer), once a step.
        experts: rows to the experts' ranks and back, in bfloat16 and the router's weights in float32, forward and
            backward; with expert-tensor parallelism also among its ranks.
        tensor: all-gather into linear_qkv and reduce-scatter out of linear_proj; backward each the other, and the
            input of linear_qkv once more.
        pipeline: a microbatch's hidden states to the next stage, their gradients to the one before.
    """

    data: int
    experts: int
    tensor: int
    pipeline: int


def traffic(config: ModelConfig, parallelism: Parallelism, workload: Workload) -> Traffic:
    """A rank's traffic; full recomputation repeats what the forward pass sends inside of layers.

    Raises:
        ValueError: the layout does not divide the model or the workload (`Parallelism.check`, `Workload.check`).
    """
    parallelism.check(config)
    workload.check(config, parallelism)
    p, microbatches, layers = parallelism, workload.microbatches(parallelism), most_layers(config, parallelism)
    tokens = token_counts(config, p, workload)
    passes = microbatches * layers
    forward = 2 if workload.recompute == "full" else 1
    rows = tokens[Tokens.SHARE] * config.num_experts_per_tok
    there, back = rows * (2 * config.hidden_size + 4), rows * 2 * config.hidden_size
    among = rows * (p.expert_tp - 1) * (2 + 4) * config.hidden_size  # gathered in bfloat16, summed in float32
    hidden = 2 * tokens[Tokens.SEQUENCE] * config.hidden_size
    sent = 2 * tokens[Tokens.SHARE] * config.hidden_size
    held = max(holdings(config, p), key=lambda held: held.total)
    stage = p.tp * p.cp * p.dp
    dense = _ring(6 * held.dense + 8 * held.router, p.dp * p.cp)
    return Traffic(
        data=dense + _ring(6 * held.expert, stage // (p.expert_tp * p.ep)),
        experts=passes * (forward + 1) * (_ring(there + back, p.ep) + among),
        tensor=passes * (2 * forward + 3) * _ring(hidden, p.tp),
        pipeline=microbatches * sent * (2 * p.vpp - (1 if p.pp == 2 else 0)) if p.pp > 1 else 0,
    )


def most_layers(config: ModelConfig, parallelism: Parallelism) -> int:
    """Layers of the pipeline rank that has most of them."""
    stages = parallelism.stages(config)
    return max(sum(map(len, stages[stage :: parallelism.pp])) for stage in range(parallelism.pp))


def _ring(nbytes: int, ranks: int) -> int:
    """What a rank sends so that all of `ranks` ranks have, or have summed, a tensor of this size."""
    return nbytes * (ranks - 1) // ranks
