"""Which versions of a host a plug-in is tested with."""

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


def check_host(distribution: str, tested: str) -> None:
    """The host is installed, in a version in the range `tested`, such as ">=1.6.5,<1.7".

    A plug-in replaces classes of its host and relies on what they call; in another version that may have changed
    without an error.

    Raises:
        ImportError: it is not installed.
        ValueError: it is of another version.
    """
    wanted = f"{distribution}{tested}"
    try:
        found = version(distribution)
    except PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed, and this is its plug-in: pip install '{wanted}'") from None
    if not SpecifierSet(tested).contains(found, prereleases=True):
        raise ValueError(
            f"{distribution} is {found}, but this plug-in is tested with {tested} only: pip install '{wanted}'"
        )
