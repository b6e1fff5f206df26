"""MiniMax-M2 and its checkpoints as typed, pure functions: the definition that all other code is tested against.

Setting MINIMAX_M2_TYPECHECK=1 checks every shape and dtype in this package's signatures at run time (needs
typeguard 2.13.3). pytest does the same through `--jaxtyping-packages`; the variable is for processes that pytest's
flag does not reach: spawned ranks, `torchrun`, a user's own script.
"""

import os

if os.environ.get("MINIMAX_M2_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("reference", "typeguard.typechecked")
