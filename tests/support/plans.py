"""Plans of the full model: one that fits, one that does not, and any other."""

from typing import Any

from bridge.memory_plan.plan import Plan, layout, parse_memory, plan
from reference.activations import Workload
from reference.config import ModelConfig

FULL = ModelConfig(rotary_dim=64)


def full_plan(
    gpus: int,
    memory: str = "80GB",
    distributed_optimizer: bool = True,
    workload: Workload | None = None,
    **sizes: Any,
) -> Plan:
    parallelism, limit = layout(FULL, gpus=gpus, **sizes), parse_memory(memory)
    return plan(FULL, parallelism, memory=limit, distributed_optimizer=distributed_optimizer, workload=workload)


def large() -> Plan:
    return full_plan(512, tp=8, pp=8, ep=8, etp=1)


def working() -> Plan:
    """The large one with its activations."""
    workload = Workload(seq_length=4096, global_batch_size=512)
    return full_plan(512, tp=8, pp=8, ep=8, etp=1, workload=workload)


def too_large() -> Plan:
    return full_plan(8, tp=2, pp=2, ep=2, etp=1)
