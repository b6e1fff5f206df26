"""The tests for megatron-bridge import it, so they are there where it is: see requirements_megatron_bridge.txt."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("megatron.bridge") else ["test_megatron_bridge*.py"]
