"""The two classes of megatron-core that hold a MiniMax-M2."""

from enum import StrEnum


class ModelClass(StrEnum):
    """A class of megatron-core's."""

    GPT = "gpt"  # GPTModel: a layer is attention and experts
    HYBRID = "hybrid"  # HybridModel: attention and experts are a layer each, in the pattern `*E`

    @classmethod
    def _missing_(cls, value: object) -> "ModelClass":
        raise ValueError(f"model must be one of {', '.join(repr(str(one)) for one in cls)}, found {value!r}")

    @property
    def class_name(self) -> str:
        """As megatron-core calls it."""
        return {"gpt": "GPTModel", "hybrid": "HybridModel"}[self]


# HybridModel is the one that megatron-core goes on with. But overlapping the experts' communication with computation
# (`overlap_moe_expert_parallel_comm`) needs `build_schedule_plan`, which in megatron-core 0.19 only GPTModel has.
DEFAULT_MODEL = ModelClass.GPT
