"""Batches of the next step: made in a thread, taken in order, in one block; errors and the thread's end."""

from __future__ import annotations

import threading
from dataclasses import fields

import pytest
import torch

from qlora.batch import Batch
from qlora.data.ahead import Ahead, BlockBatch, in_one_block
from qlora.data.layout import Layout
from qlora.data.loader import collate
from tests.data.cases import split_of


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qlora-ahead")]


def test_what_was_prepared_is_taken_and_made_elsewhere() -> None:
    makers: dict[int, str] = {}

    def make(key: int) -> int:
        makers[key] = threading.current_thread().name
        return 10 * key

    with Ahead(make) as ahead:
        assert ahead.take(1) == 10
        ahead.prepare(2)
        assert ahead.take(2) == 20
        ahead.prepare(3)
        assert ahead.take(4) == 40, "memory ran out meanwhile: other micro-batches are wanted"
        assert ahead.take(3) == 30, "what was prepared for another key is forgotten"
    here = threading.current_thread().name
    assert makers[1] == makers[4] == here and makers[2].startswith("qlora-ahead") and not threads()


def test_it_is_made_while_the_present_one_is_used() -> None:
    begun = threading.Event()

    def make(key: int) -> int:
        begun.set()
        return key

    with Ahead(make) as ahead:
        ahead.prepare(1)
        assert begun.wait(10), "nobody has taken it yet"
        assert ahead.take(1) == 1


def test_errors_come_where_they_came_before() -> None:
    def make(key: int) -> int:
        raise OSError(f"row {key} cannot be read")

    with Ahead(make) as ahead:
        ahead.prepare(1)
        with pytest.raises(OSError, match="row 1"):
            ahead.take(1)
        ahead.prepare(2)  # never taken: the run ends before it
    assert not threads()


def test_the_thread_ends_with_the_run_that_fails() -> None:
    waiting = threading.Event()
    with pytest.raises(RuntimeError), Ahead(lambda key: waiting.wait(10)) as ahead:
        ahead.prepare(1)
        waiting.set()
        raise RuntimeError("the step failed")
    assert not threads()
    ahead.prepare(2)  # without a thread nothing is begun
    assert ahead.take(2) is True and not threads()


@pytest.mark.parametrize("layout", [Layout(), Layout(16, continues=True)])
def test_a_block_holds_the_same_batch(layout: Layout) -> None:
    batch = collate(split_of([3, 2, 7, 5]), [(0, 1), (2, 3)], 0, 24, layout)
    held = in_one_block(batch, torch.device("cpu"))
    assert isinstance(held, BlockBatch) and held.block is not None and held.block.dtype is torch.int64
    moved = held.to(torch.device("cpu"))
    assert type(moved) is Batch
    for field in fields(Batch):
        before, block, after = (getattr(one, field.name) for one in (batch, held, moved))
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, block) and torch.equal(before, after), field.name
            assert before.dtype is after.dtype and before.shape == after.shape
            assert after.untyped_storage().data_ptr() == held.block.data_ptr(), "one block, one copy"
        elif field.name == "host_ids_BS":
            assert before is block is None and after is held.input_ids_BS, "moved, and still known on the host"
        else:
            assert before == block == after
    assert all(getattr(held.to(torch.device("meta")), f).is_meta for f in ("input_ids_BS", "cu_seqlens"))


def test_one_copy_moves_it() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    held = in_one_block(collate(split_of([3, 2]), [(0, 1)], 0, 8), torch.device("cpu"))
    with Copies() as copies:  # type: ignore[no-untyped-call]
        held.to(torch.device("meta"))
    assert copies.count == 1


def test_a_batch_that_does_not_know_its_documents_stays_one() -> None:
    batch = collate(split_of([3, 2]), [(0, 1)], 0, 8)
    plain = Batch(*[getattr(batch, field.name) for field in fields(Batch)][:6])
    assert in_one_block(plain, torch.device("cpu")).to(torch.device("cpu")).cu_seqlens is None
