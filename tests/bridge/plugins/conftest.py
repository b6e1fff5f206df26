"""The tests of a plug-in run in an environment that has its host: see requirements.txt."""

from importlib.util import find_spec

collect_ignore_glob = []
if find_spec("megatron.bridge") is None:
    collect_ignore_glob += ["test_megatron_bridge*.py"]
else:
    import support.transformer_engine_names  # noqa: F401  # from here on the host can be imported
