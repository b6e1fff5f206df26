"""Megatron-LM's own parser and builders, which megatron-core's package has as `megatron.training`."""

import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import patch

from torch import nn

# What a host without Transformer Engine and a GPU needs: the parser asks the GPU about grouped products.
WITHOUT_TE = {
    "--transformer-impl": "local",
    "--no-rope-fusion": None,
    "--no-persist-layer-norm": None,
    "--use-cpu-initialization": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-bias-swiglu-fusion": None,
    "--no-bias-dropout-fusion": None,
    "--moe-token-dispatcher-type": "allgather",
}
NEEDS_A_GPU = "--moe-grouped-gemm"


def cpu_words(words: list[str]) -> list[str]:
    """The words of the model and those of a host without a GPU."""
    added = [word for pair in WITHOUT_TE.items() for word in pair if word is not None]
    return [word for word in words if word != NEEDS_A_GPU] + added


def parsed(words: list[str], *, validated: bool = True, rank: int = 0, world: int = 1) -> Namespace:
    """What Megatron-LM makes of a command line, of a run of short sequences."""
    from megatron.training import arguments as parser

    run = ["--seq-length", "8", "--micro-batch-size", "1", "--global-batch-size", str(world)]
    line = patch("sys.argv", ["pretrain", *words, *run])
    ranks = patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": str(world)})
    gpu = patch.object(parser, "get_device_arch_version", lambda: 10)  # it asks the GPU about tensor parallelism
    with line, ranks, gpu, redirect_stdout(StringIO()):
        arguments = parser.parse_args()
        return parser.validate_args(arguments) if validated else arguments


@contextmanager
def megatron_lm_runs(arguments: Namespace) -> Iterator[None]:
    """As in a process of Megatron-LM's with these arguments."""
    from megatron.training import global_vars

    with patch.object(global_vars, "_GLOBAL_ARGS", arguments):
        yield


def built(arguments: Namespace) -> nn.Module:
    """What pretrain_gpt.py, or pretrain_hybrid.py where there is a pattern, builds on this rank; `--spec` included."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

    of_class: Any = gpt_config_from_args if arguments.hybrid_layer_pattern is None else hybrid_config_from_args
    config = of_class(arguments)
    builder = config.get_builder_cls()(config)
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups())
