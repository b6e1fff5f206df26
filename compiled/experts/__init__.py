"""What a mixture of experts computes beside `torch.nn.functional.grouped_mm`, each in one launch for all experts."""

from compiled.experts.swiglu import weighted_swiglu
from compiled.experts.weight_gradients import add_weight_gradients

__all__ = ["add_weight_gradients", "weighted_swiglu"]
