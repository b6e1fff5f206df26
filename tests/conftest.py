"""For all tests: one thread for each process, and which file is first.

The tensors here are small, and the ranks that tests start share the machine's cores.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every process that tests start

import support.shapes  # noqa: F401  jaxtyping looks for it in `support`, and does not import it


def pytest_collection_modifyitems(items: list) -> None:
    """The file that takes longest is first: a process has a file to itself, and would have it when all others end."""
    items.sort(key=lambda item: item.path.name != "test_readmes.py")
