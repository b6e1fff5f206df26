"""Names that a checkpoint of the model does not have: what they look like, and what would help."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from reference.config import ModelConfig
from reference.extras import MTP_MODULES, Extras, is_mtp_module, layer_of
from reference.findings import Findings
from reference.names import SCALE_SUFFIX, find
from reference.weights import Dialect

# Parts of names that PEFT's adapters and what they wrap have.
_ADAPTER = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|adapter[A-Za-z_]*|ia3_l|hada_w[12]_[ab])(\.|$)")
_DIGITS = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_MERGE = "merge the adapter into the weights first (merge_and_unload), then save_pretrained"
# What tools leave before every name, and what then helps.
_PREFIXES = {
    "base_model.model.": f"a save of a PEFT model: {_MERGE}",
    "module.": "a save of a wrapped model (DataParallel, DeepSpeed): save the inner model, or rename the tensors",
    "_orig_mod.": "a save of a compiled model: save the inner model, or rename the tensors",
    "_fsdp_wrapped_module.": "a save of an FSDP model: save the inner model, or rename the tensors",
}
_RENAME = "rename the tensors to the names of the released files"


def describe(extras: Extras, found: Mapping[str, object], config: ModelConfig, findings: Findings) -> bool:
    """Say what unexpected names are; True if they are the model's own under other names: then those are not missing."""
    for name in extras.beyond:
        findings.add("beyond", name, _beyond(layer_of(name), extras.beyond, config))
    renamed = False
    for name in extras.unknown:
        weight = name.removesuffix(SCALE_SUFFIX)
        start = prefix(_DIGITS.sub("0", weight))
        if _ADAPTER.search(name):
            renamed |= ".base_layer." in name
            findings.add("adapter", name, f"a part of an adapter (LoRA and the like); {_MERGE}")
        elif start is not None and (start.found or start.expected):
            renamed = True
            findings.add(start, name, start.remedy)
        elif weight != name and weight not in found:
            findings.add("scales", name, f"scales without their tensor {weight}; fetch the checkpoint again")
        elif (key := find(weight, Dialect.HF_DISK)) and key.expert < config.num_local_experts:
            pass  # the model's own: it was not looked for because too many are missing
        elif key is not None:
            what = f"unknown tensor: experts are 0 to {config.num_local_experts - 1}; correct num_local_experts"
            findings.add("expert", name, what)
        else:
            what = "unknown tensor, MiniMax-M2 has none of this name; remove it or correct config.json"
            findings.add(("unknown", _DIGITS.sub("#", name)), name, what)
    return renamed


def _beyond(layer: int, beyond: list[str], config: ModelConfig) -> str:
    layers, last = config.num_hidden_layers, max(map(layer_of, beyond))
    if any(map(is_mtp_module, beyond)):
        return (
            f"layer {layer}, past the {layers} of the model and the {config.num_mtp_modules} multi-token-prediction "
            "layers of num_mtp_modules; correct num_mtp_modules or num_hidden_layers"
        )
    return (
        f"layer {layer}, past the {layers} of num_hidden_layers, with nothing that makes it a multi-token-prediction "
        f"layer ({', '.join(MTP_MODULES)}): one of the model's, then; correct num_hidden_layers, which is at least "
        f"{last + 1}"
    )


class Prefix(NamedTuple):
    """What names begin with, and what the model's begin with in its place."""

    found: str
    expected: str

    @property
    def remedy(self) -> str:
        instead = f" instead of {self.expected!r}" if self.expected else ""
        said = f"begins with {self.found!r}{instead}" if self.found else f"lacks {self.expected!r} before it"
        return f"the model's name, but it {said}; {_PREFIXES.get(self.found, _RENAME)}"


@lru_cache
def prefix(name: str) -> Prefix | None:
    """How a name differs from one of the model's at its beginning; None if that is not all."""
    rest, found = name, ""
    while not found[:-1].rpartition(".")[2].isdecimal():
        for expected in ("", "model."):
            if any(find(expected + rest, dialect) for dialect in (Dialect.HF_DISK, Dialect.HF_MEMORY)):
                return Prefix(found, expected)
        part, dot, rest = rest.partition(".")
        if not dot:
            break
        found += part + dot
    return None
