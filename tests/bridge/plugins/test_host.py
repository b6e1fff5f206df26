"""A plug-in says in one sentence that its host is missing or of another version."""

import ast
import tomllib
from importlib import metadata
from importlib.util import find_spec

import pytest
from support.checks import ROOT, fresh_interpreter

from bridge.plugins.host import require_host


def test_a_version_in_the_range_passes():
    require_host(f"packaging>={metadata.version('packaging')},<10000")


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        (
            "packaging>=9999,<10000",
            f"packaging {metadata.version('packaging')} is installed, and this plug-in was written against "
            "packaging<10000,>=9999: pip install 'packaging<10000,>=9999'",
        ),
        (
            "no-such-host>=1",
            "no-such-host is not installed, and this plug-in was written against no-such-host>=1: "
            "pip install 'no-such-host>=1'",
        ),
    ],
)
def test_another_version_or_none_is_one_sentence(requirement, said):
    with pytest.raises(ImportError) as error:
        require_host(requirement)
    assert str(error.value) == said


@pytest.mark.skipif(find_spec("megatron.bridge") is not None, reason="megatron-bridge is installed here")
def test_without_megatron_bridge_the_plug_in_names_it():
    found = fresh_interpreter("import bridge.plugins.megatron_bridge")
    assert found.stderr.splitlines()[-1].startswith("ImportError: megatron-bridge is not installed, and this plug-in ")


def test_the_extra_installs_what_the_plug_in_wants():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tree = ast.parse((ROOT / "bridge/plugins/megatron_bridge/__init__.py").read_text())
    (host,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HOST"
    )
    assert extras["megatron-bridge"] == [host]
