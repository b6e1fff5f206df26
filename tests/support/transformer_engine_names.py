"""megatron-bridge where Transformer Engine cannot be installed: import this module, and then it.

megatron-bridge does not import without Transformer Engine, though nothing that runs here is of it. So while it is
imported, and no longer, the modules that it asks for are there, with classes that refuse to be built, as the real ones
do without a GPU. megatron-core is imported first, and finds out that there is no Transformer Engine.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import megatron.training.models  # noqa: F401  # and with it all of megatron-core that asks for Transformer Engine

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
    sys.modules.update(modules)
    try:
        import megatron.bridge  # noqa: F401
    finally:
        for name in modules:
            del sys.modules[name]


_import_host()
