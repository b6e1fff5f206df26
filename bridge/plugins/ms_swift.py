"""MiniMax-M2 in ms-swift's Megatron trainer; this file is what `--external_plugins` takes:

    megatron sft --external_plugins .../bridge/plugins/ms_swift.py ...

ms-swift builds and saves its models through mcore-bridge, so the plug-in is `bridge.plugins.mcore_bridge`. That file
itself must not be given to `--external_plugins`: ms-swift imports a file by its bare name, and Python would take the
installed mcore_bridge for it, without a word.
"""

import sys
from pathlib import Path

from bridge.plugins.host import require_host

require_host("ms-swift>=4.6,<4.7")

# ms-swift has put this folder first on the path, where mcore_bridge.py would stand in front of the installed package.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _HERE]

import bridge.plugins.mcore_bridge  # noqa: E402, F401  # registers
