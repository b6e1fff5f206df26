"""Which weights are written as float8 where the files that they come from do not say: the rule of config.json.

A checkpoint's own files decide how it is read: a weight is float8 where it is stored so (`reference.checkpoint`). This
rule is for writing weights that were not float8 before: all linear layers are quantised but for those that
`quantization_config.modules_to_not_convert` names.

Source: `transformers` quantizers_utils: should_convert_module, finegrained_fp8. There the experts of a layer are one
module, and names of the file format are translated first; here a name counts in both forms.
"""

import re
from functools import lru_cache

from reference.config import ModelConfig
from reference.names import find
from reference.weights import Dialect, Row, Storage, instances


def is_quantized(name: str, config: ModelConfig) -> bool:
    """Whether the rule stores the weight of this on-disk name as float8 with scales beside it.

    Raises:
        ValueError: a pattern of `modules_to_not_convert` is no regular expression.
    """
    key = find(name, Dialect.HF_DISK)
    return key is not None and _converts(key.row, key.part, key.layer, key.expert, config)


def quantized_names(config: ModelConfig) -> frozenset[str]:
    """The on-disk names of all weights that the rule stores as float8.

    Raises:
        ValueError: a pattern of `modules_to_not_convert` is no regular expression.
    """
    return frozenset(
        name
        for row, layer, expert in instances(config)
        for part, name in enumerate(row.format(Dialect.HF_DISK, layer, expert))
        if _converts(row, part, layer, expert, config)
    )


def is_excluded(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern names this module: its beginning up to a dot, or a regular expression for that, or its end.

    Raises:
        ValueError: a pattern is no regular expression.
    """
    return module.endswith(patterns) or any(beginning.match(module) for beginning in _beginnings(patterns))


def _converts(row: Row, part: int, layer: int, expert: int, config: ModelConfig) -> bool:
    if config.quantization is None or row.storage is not Storage.QUANTIZABLE:
        return False
    on_disk, in_memory = (row.format(dialect, layer, expert) for dialect in (Dialect.HF_DISK, Dialect.HF_MEMORY))
    own = in_memory[part] if len(in_memory) == len(on_disk) else in_memory[0]  # w1 and w3 are one parameter in memory
    patterns = config.quantization.modules_to_not_convert
    return not any(is_excluded(module, patterns) for module in {_module(on_disk[part]), _module(own)})


def _module(weight: str) -> str:
    """The module that a parameter belongs to: what stands before the last dot."""
    return weight.rpartition(".")[0]


@lru_cache
def _beginnings(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    found = []
    for pattern in patterns:
        try:
            found.append(re.compile(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))"))
        except re.error as error:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} is not a regular expression ({error}); write names of modules "
                "such as 'lm_head', or expressions such as 'model.layers.0.*' (for '*.gate' write 'gate')"
            ) from error
    return tuple(found)
