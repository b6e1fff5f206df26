"""Garbage of the steps is collected, what was there before is not looked through, and nothing is kept afterwards."""

import gc
import weakref

from bridge.training.garbage import short_collections


class Circle:
    def __init__(self) -> None:
        self.itself = self


def test_only_what_is_made_inside_is_looked_through() -> None:
    there = Circle()
    with short_collections():
        assert not any(one is there for one in gc.get_objects())
        made = weakref.ref(Circle())
        gc.collect()
        assert made() is None
    old = weakref.ref(there)
    del there
    gc.collect()
    assert old() is None
