"""Python's garbage collector, which looks through every object that there is: with a trainer's, 0.2 s at a time.

Each rank would do so in another step, and all others wait for it.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def short_collections() -> Iterator[None]:
    """Inside, collections look through what was made inside, and not through what was there before.

    Afterwards through everything, also what the caller put out of the collector's sight (`gc.freeze`) before.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
