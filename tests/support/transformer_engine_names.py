"""megatron-bridge where Transformer Engine cannot be installed: import this module, and then it.

megatron-bridge does not import without Transformer Engine, though nothing that runs here is of it. So while it is
imported, and no longer, the modules that it asks for are there, with classes that refuse to be built, as the real ones
do without a GPU. So are the classes of megatron-core's that are none without it, of which the host asks whether a
module is one. megatron-core is imported first, and finds out that there is no Transformer Engine.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import megatron.training.models  # noqa: F401  # and with it all of megatron-core that asks for Transformer Engine
from megatron.core.extensions import transformer_engine as in_megatron_core

MODULES = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.ops")


class Refuses:
    """A class of Transformer Engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{type(self).__name__} is Transformer Engine's, which is not installed here")


class _Names(ModuleType):
    """A module that has a class for every name."""

    __path__ = ()

    def __getattr__(self, name: str) -> type[Refuses]:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (Refuses,), {}))
        return getattr(self, name)


def _import_host() -> None:
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    modules = {name: _Names(name) for name in MODULES}
    for name, module in modules.items():
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
    theirs = {name: value for name, value in vars(in_megatron_core).items() if name.startswith("TE")}
    missing = [name for name, value in theirs.items() if not isinstance(value, type)]
    classes = {name: type(name, (Refuses,), {}) for name in missing}
    sys.modules.update(modules)
    try:
        with patch.multiple(in_megatron_core, **classes):
            import megatron.bridge  # noqa: F401
    finally:
        for name in modules:
            del sys.modules[name]


_import_host()
