"""Tensors of a checkpoint that are not the model's and that a checkpoint may hold nevertheless.

Layers past the last one are multi-token-prediction (MTP) modules if something in them is found in such modules alone;
the model itself does not use them. Other tensors are values that a program computes anew (RoPE's frequencies) or scales
that calibration measured for a quantised cache or quantised activations: no weight depends on them. Both kinds go from
one checkpoint into the next as they are.

Sources: names in DeepSeek-V3-style files; vLLM's and SGLang's loaders for cache scales; llm-compressor, AMD Quark.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from reference.config import ModelConfig

# Modules of an MTP layer that no layer of the model has.
MTP_MODULES = ("enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens")

UNNEEDED: dict[str, str] = {  # what, and the end of its name
    "RoPE's frequencies": r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)",
    "scales of a calibrated cache": r"(k|v|q|kv|qkv|k_cache|v_cache|kv_cache)_scale(_inv)?",
    "scales of a calibrated attention": r"(prob|qk|softmax|attn)_scale(_inv)?",
    "scales of calibrated activations": r"((input|output)(_activation)?|act|activation)_scale(_inv)?",
}

_UNNEEDED = re.compile(rf"(?:^|.*\.)(?:{'|'.join(UNNEEDED.values())})")
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.")
_MTP = re.compile(rf"model\.layers\.[0-9]+\.(?:{'|'.join(MTP_MODULES)})\.")


class Extras(NamedTuple):
    """Names by what they are; `beyond` are those of layers past the last that are no MTP layers, or one too many."""

    mtp: list[str]
    unneeded: list[str]
    beyond: list[str]
    unknown: list[str]


def find_extras(names: Iterable[str], config: ModelConfig) -> Extras:
    """What each name is that is not one of the model's."""
    layers: dict[int, list[str]] = {}
    found = Extras([], [], [], [])
    for name in names:
        match = _LAYER.match(name)
        if match is not None and int(match[1]) >= config.num_hidden_layers:
            layers.setdefault(int(match[1]), []).append(name)
        elif _UNNEEDED.fullmatch(name):
            found.unneeded.append(name)
        else:
            found.unknown.append(name)
    for layer, members in layers.items():
        allowed = config.num_mtp_modules is None or layer < config.num_hidden_layers + config.num_mtp_modules
        kind = found.mtp if allowed and any(map(is_mtp_module, members)) else found.beyond
        kind += members
    return found


def layer_of(name: str) -> int:
    """The layer of a name that has one."""
    match = _LAYER.match(name)
    assert match is not None
    return int(match[1])


def is_mtp_module(name: str) -> bool:
    """Whether a name belongs to a module that only MTP layers have."""
    return _MTP.match(name) is not None
