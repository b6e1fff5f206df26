"""Garbage of the steps is collected, what was there before is not looked through, and nothing is kept afterwards."""

import gc
import weakref

from bridge.training.garbage import short_collections


class Circle:
    def __init__(self) -> None:
        self.itself = self


def test_only_what_is_made_inside_is_looked_through() -> None:
    gc.unfreeze()
    there = Circle()
    with short_collections():
        assert not any(one is there for one in gc.get_objects())
        made = weakref.ref(Circle())
        gc.collect()
        assert made() is None
    assert gc.get_freeze_count() == 0
    old = weakref.ref(there)
    del there
    gc.collect()
    assert old() is None


def test_what_others_put_aside_stays_aside() -> None:
    gc.freeze()
    try:
        with short_collections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
