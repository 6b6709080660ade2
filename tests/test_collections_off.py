"""Stretches without Python's search for cycles: it is on again afterwards, where it was on, and has nothing young."""

from __future__ import annotations

import gc

import pytest

from qlora.collections_off import without_collections


def test_nothing_is_looked_for_inside_and_what_was_made_is_old_afterwards() -> None:
    looked: list[str] = []
    gc.unfreeze()  # what conftest.py has frozen
    gc.collect()
    gc.callbacks.append(lambda phase, _: looked.append(phase))
    try:
        with without_collections():
            made = [[number] for number in range(10_000)]  # a search for each 700 of them otherwise
            assert not looked and not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() == 0
        young = {id(one) for one in gc.get_objects(generation=0)}
        assert not young & set(map(id, made))
    finally:
        gc.callbacks.pop()
        gc.freeze()


def test_whoever_has_turned_it_off_or_frozen_objects_keeps_it_so() -> None:
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.freeze()
    try:
        with pytest.raises(KeyError), without_collections():
            raise KeyError
        assert gc.isenabled() and gc.get_freeze_count() > 0
    finally:
        gc.enable()
