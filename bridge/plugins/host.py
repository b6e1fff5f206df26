"""Whether the framework that a plug-in is for is here, in a version that it was written against."""

from importlib import metadata

from packaging.requirements import Requirement


def require_host(requirement: str) -> None:
    """`requirement` is pip's, such as "megatron-bridge>=0.6.2,<0.7".

    Raises:
        ImportError: the package is missing or of another version; says what was found, and what to install.
    """
    wanted = Requirement(requirement)
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        found = None
    if found is not None and wanted.specifier.contains(found, prereleases=True):
        return
    here = f"{wanted.name} is not installed" if found is None else f"{wanted.name} {found} is installed"
    raise ImportError(f"{here}, and this plug-in was written against {wanted}: pip install '{wanted}'")
