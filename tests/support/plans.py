"""Plans of the full model: one that fits, one that does not, and any other."""

from bridge.memory_plan.plan import Plan, layout, parse_memory, plan
from reference.config import ModelConfig

FULL = ModelConfig(rotary_dim=64)


def full_plan(gpus: int, memory: str = "80GB", distributed_optimizer: bool = True, **sizes: int) -> Plan:
    parallelism = layout(FULL, gpus=gpus, **sizes)
    return plan(FULL, parallelism, memory=parse_memory(memory), distributed_optimizer=distributed_optimizer)


def large() -> Plan:
    return full_plan(512, tp=8, pp=8, ep=8, etp=1)


def too_large() -> Plan:
    return full_plan(8, tp=2, pp=2, ep=2, etp=1)
