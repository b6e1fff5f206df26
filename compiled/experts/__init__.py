"""Products of a mixture of experts that are one launch for all experts."""

from compiled.experts.weight_gradients import add_weight_gradients

__all__ = ["add_weight_gradients"]
