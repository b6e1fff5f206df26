"""Whether a model is one to fill with a checkpoint's weights, beyond their shapes: asked before the first is read."""

import warnings
from collections.abc import Sequence

from torch import nn

from bridge.jobs.ranks import is_rank_zero
from bridge.model.architecture import check_same_model
from bridge.model.process_groups import check_group_sizes
from bridge.weights.wrappers import unwrapped_chunks
from reference.config import ModelConfig


def check_fillable(model: nn.Module | Sequence[nn.Module], config: ModelConfig) -> None:
    """Refuse a model that would compute, or train, something else with the checkpoint's weights.

    Raises:
        ValueError: its settings or its rotation are not the checkpoint's (`bridge.model.architecture`), or its parallel
            sizes are not those of megatron-core's process groups.

    Warns:
        UserWarning: an optimizer has float32 copies of the weights already, which loading does not reach.
    """
    chunks = unwrapped_chunks(model)
    for chunk in chunks:
        check_same_model(chunk, config)
        check_group_sizes(chunk.config)
    copied = any(getattr(parameter, "main_param", None) is not None for x in chunks for parameter in x.parameters())
    if copied and is_rank_zero():
        warnings.warn(
            "an optimizer was made before the weights are loaded, and its first step would put back the float32 copies "
            "that it has of the old ones: call optimizer.reload_model_params() after load_hf_weights",
            stacklevel=3,
        )
