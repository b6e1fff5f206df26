"""Which hosts the plug-ins for mcore-bridge and ms-swift accept, and that nothing else of ours imports a host."""

import ast
import runpy
from importlib import metadata
from pathlib import Path

import pytest
from support.checks import ROOT

PLUGINS = ROOT / "bridge" / "plugins"
HOSTS = ("mcore_bridge", "swift", "peft")


@pytest.mark.parametrize(
    ("file", "host", "found"),
    [("mcore_bridge.py", "mcore-bridge", version) for version in (None, "1.6.4", "1.7.0", "2.0")]
    + [("ms_swift.py", "ms-swift", version) for version in (None, "4.5.9", "4.7.0")],
)
def test_another_version_or_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, file: str, host: str, found: str | None
) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name != host:
            return installed(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    here = f"{host} is not installed" if found is None else f"{host} {found} is installed"
    with pytest.raises(ImportError, match=rf"^{here}, and this plug-in was written against {host}.*: pip install '"):
        runpy.run_path(str(PLUGINS / file))


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_only_plugins_import_a_host() -> None:
    importers = {
        file.relative_to(ROOT)
        for package in ("bridge", "compiled", "reference")
        for file in (ROOT / package).rglob("*.py")
        if imported(file) & set(HOSTS)
    }
    assert {Path("bridge/plugins/mcore_bridge.py"), Path("bridge/plugins/adapters.py")} <= importers
    assert all(file.is_relative_to("bridge/plugins") for file in importers)
    assert not any(
        "bridge.plugins" in file.read_text() for file in (ROOT / "bridge").rglob("*.py") if not _plugin(file)
    )


def _plugin(file: Path) -> bool:
    return file.is_relative_to(PLUGINS)
