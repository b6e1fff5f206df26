"""What is judged: a name or an object, found and called on each rank, and what it turns out to be.

A target is `package.module:name` or an object that can be sent to another process. It is one of

    a function that returns a layer's spec, a block's, or a hybrid stack's; or a model
    such a spec
    a class for one part: a router (megatron-core's `Router`), an attention (its `Attention`), or, with `part`, anything

A function is called with what its parameters ask for by name (`offers`). The part alone is put into MiniMax-M2's layer:
everything else there is known to be right, so what is wrong is the part.
"""

import inspect
import os
import pickle
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple


class TargetError(ValueError):
    """A target that cannot be run, and why."""


class Slot(StrEnum):
    """A part of the layer that a target may be."""

    Q_NORM = "q_norm"
    K_NORM = "k_norm"
    ROUTER = "router"
    ATTENTION = "attention"


class Kind(StrEnum):
    """What a target makes."""

    LAYER = "layer spec"
    BLOCK = "block spec"
    HYBRID = "hybrid stack spec"
    MODEL = "model"
    PART = "part of the layer"


@dataclass(frozen=True)
class Target:
    """What is judged, so that it can be sent to other processes.

    Args:
        name: what it is called in reports; without `pickled`, `package.module:name`.
        pickled: the object, where it has no such name.
        file: where the module lies, for modules that cannot be imported by name, as test files.
        folder: where modules are looked for as well: the current folder.
        slot: the part of the layer that it is, where the user said so.
    """

    name: str
    pickled: bytes | None = None
    file: str | None = None
    folder: str = field(default_factory=os.getcwd)
    slot: Slot | None = None

    @classmethod
    def of(cls, target: Any, slot: Slot | str | None = None) -> "Target":
        """Of a name, a function, a class or a spec.

        Raises:
            TargetError: it is none of these, or it cannot be sent to other processes.
        """
        if slot is not None and slot not in tuple(Slot):
            raise TargetError(f"part is {slot!r}, expected {', '.join([*Slot][:-1])} or {[*Slot][-1]}")
        slot = None if slot is None else Slot(slot)
        if isinstance(target, str):
            module, colon, name = target.partition(":")
            if not (colon and module and name):
                raise TargetError(f"{target!r}: expected package.module:function, or a checkpoint's folder")
            return cls(target, slot=slot)
        if inspect.isfunction(target) or inspect.isclass(target):
            name = f"{target.__module__}:{target.__qualname__}"
            if "<" in target.__qualname__:
                raise TargetError(f"{name}: is made inside a function; put it at the top of a module: ranks import it")
            return cls(name, file=getattr(sys.modules[target.__module__], "__file__", None), slot=slot)
        try:
            return cls(type(target).__name__, pickle.dumps(target), slot=slot)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TargetError(
                f"{type(target).__name__}: cannot be sent to the ranks ({error}); give a function that makes it"
            ) from error

    def load(self) -> Any:
        """The object itself, in this process.

        Raises:
            TargetError: there is no such module or name.
        """
        if self.folder not in sys.path:
            sys.path.append(self.folder)
        if self.pickled is not None:
            return pickle.loads(self.pickled)
        module, _, name = self.name.partition(":")
        found: Any = self._module(module)
        for part in name.split("."):
            if not hasattr(found, part):
                raise TargetError(f"{self.name}: {module} has no {name}")
            found = getattr(found, part)
        return found

    def _module(self, name: str) -> Any:
        try:
            return import_module(name)
        except ImportError as error:
            if self.file is None or not Path(self.file).is_file():
                raise TargetError(f"{name}: cannot be imported: {type(error).__name__}: {error}") from error
        spec = spec_from_file_location(name, self.file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


class Made(NamedTuple):
    """What a target came to: its kind, the slot of a part, and the object."""

    kind: Kind
    value: Any
    slot: Slot | None = None


def make(target: Target, offers: dict[str, Any]) -> Made:
    """Load a target, call it if it is to be called, and look at what it is.

    Raises:
        TargetError: it cannot be called with `offers`, or makes something else; whatever the target itself raises.
    """
    found = target.load()
    if target.slot is not None:
        return Made(Kind.PART, found, target.slot)
    if inspect.isclass(found):
        slot = _slot_of_class(found)
        if slot is None:
            raise TargetError(
                f"{target.name}: is a class, neither a Router nor an Attention of megatron-core; say which part of the "
                f"layer it is: --part {' or '.join(Slot)}"
            )
        return Made(Kind.PART, found, slot)
    is_function = callable(found) and not _is_made(found)
    return _kind_of(target, _call(target, found, offers) if is_function else found)


def _is_made(found: Any) -> bool:
    """A spec and a model can be called too, and are not to be."""
    from megatron.core.transformer.spec_utils import ModuleSpec
    from torch import nn

    return isinstance(found, ModuleSpec | nn.Module)


def _call(target: Target, function: Callable[..., Any], offers: dict[str, Any]) -> Any:
    """With what its parameters ask for: by name, and the config for a first one of another name."""
    signature = inspect.signature(function)
    given: dict[str, Any] = {}
    positional = []
    for number, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        wanted = _offer(name, parameter, offers, first=number == 0)
        if wanted in offers:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(offers[wanted])
            else:
                given[name] = offers[wanted]
        elif parameter.default is parameter.empty:
            raise TargetError(
                f"{target.name}{signature}: has a parameter {name!r}, expected only {', '.join(offers)} and ones with "
                "defaults; wrap it in a function of (config). A norm is judged with --part q_norm or k_norm"
            )
    return function(*positional, **given)


def _offer(name: str, parameter: inspect.Parameter, offers: dict[str, Any], *, first: bool) -> str:
    """What of `offers` a parameter gets: by its annotation, its name, or because it is the first."""
    annotation = parameter.annotation
    if getattr(annotation, "__name__", annotation) == "ModelConfig":
        return "model_config"
    return "config" if first and name not in offers and parameter.default is parameter.empty else name


def _slot_of_class(found: type) -> Slot | None:
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.moe.router import Router

    return next(
        (slot for base, slot in ((Attention, Slot.ATTENTION), (Router, Slot.ROUTER)) if issubclass(found, base)), None
    )


def _kind_of(target: Target, made: Any) -> Made:
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer
    from torch import nn

    chunks = made if isinstance(made, list | tuple) else [made]
    if chunks and all(isinstance(chunk, nn.Module) for chunk in chunks):
        return Made(Kind.MODEL, list(chunks))
    if isinstance(made, TransformerBlockSubmodules):
        return Made(Kind.BLOCK, made)
    module = made.module if isinstance(made, ModuleSpec) else None
    if inspect.isclass(module):
        bases = {HybridStack: Kind.HYBRID, TransformerBlock: Kind.BLOCK, BaseTransformerLayer: Kind.LAYER}
        for base, kind in bases.items():
            if issubclass(module, base):
                return Made(kind, made)
        slot = _slot_of_class(module)
        if slot is not None:
            return Made(Kind.PART, made, slot)
    said = (
        f"a ModuleSpec of {getattr(module, '__name__', module)}" if module is not None else f"a {type(made).__name__}"
    )
    raise TargetError(
        f"{target.name}: makes {said}, expected the ModuleSpec of a TransformerLayer, of a HybridStack, of an "
        "Attention, a TransformerBlockSubmodules, or a model"
    )


# What Megatron-LM's arguments call what TransformerConfig calls otherwise.
ARGUMENTS = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
    "group_query_attention": "num_query_groups",
    "swiglu": "gated_linear_unit",
}


def training_arguments(config: Any, model_arguments: dict[str, Any]) -> Namespace:
    """Megatron-LM's `args` that say what a model is: the config's fields, `GPTModel`'s arguments, `ARGUMENTS`."""
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    renamed = {name: said[field] for name, field in ARGUMENTS.items()}
    more = {
        "padded_vocab_size": model_arguments["vocab_size"],
        "untie_embeddings_and_output_weights": True,
        "spec": None,
    }
    return Namespace(**said | model_arguments | renamed | more)
