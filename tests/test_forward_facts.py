"""Which micro-batch a forward pass is of: in its thread, for its own positions, and only while it lasts."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from qlora.batch import Batch
from qlora.data.loader import collate
from qlora.forward_facts import in_forward, of_forward
from tests.data.cases import split_of


def test_it_is_known_inside_and_for_its_own_positions() -> None:
    batch = collate(split_of([3]), [(0,)], 0, 24)
    with pytest.raises(RuntimeError), in_forward(batch):
        assert of_forward() is batch and of_forward(batch.position_ids_BS) is batch
        assert of_forward(batch.position_ids_BS.clone()) is None, "a model made positions of its own"
        raise RuntimeError
    assert of_forward() is None


def test_another_thread_is_in_no_forward_pass() -> None:
    """A GPU's backward pass runs in one: nothing that layers need may be asked for there."""
    batch, seen = collate(split_of([3]), [(0,)], 0, 24), list[Batch | None]()
    with in_forward(batch):
        asking = threading.Thread(target=lambda: seen.append(of_forward()))
        asking.start()
        asking.join()
    assert seen == [None]


def test_a_batch_that_does_not_know_its_documents_is_not_asked() -> None:
    batch = replace(collate(split_of([3]), [(0,)], 0, 24), cu_seqlens=None)
    with in_forward(batch):
        assert of_forward() is None
