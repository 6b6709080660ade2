"""Stretches of work without Python's search for cycles among its objects, which it makes whenever it has some hundreds
more: a sixth of the processor time of importing torch and transformers, all of whose objects stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collections() -> Iterator[None]:
    """For what makes objects that stay, or a command that ends before cycles would matter. Not for long work: what a
    cycle holds is not freed. Whoever has turned the search off keeps it so.

    What was made counts as old at the end, so that no search for what is young goes through all of it.
    """
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            if gc.get_freeze_count() == 0:  # somebody's frozen objects stay so
                gc.freeze()
                gc.unfreeze()  # to the oldest generation (gcmodule.c, gc_unfreeze_impl)
            gc.enable()
