"""A micro-batch: its size, and all of it on one device."""

from __future__ import annotations

from dataclasses import fields

import torch

from qlora.data.loader import collate
from tests.data.cases import split_of


def test_rows_and_tokens_count_padding() -> None:
    batch = collate(split_of([3, 9]), [(0,), (1,)], 0, 16)
    assert (batch.rows, batch.tokens) == (2, 2 * 16)


def test_a_batch_moves_whole_and_leaves_the_first_where_it_is() -> None:
    batch = collate(split_of([3, 2]), [(0, 1)], 0, 8)
    moved = batch.to(torch.device("meta"))
    assert (moved.document_lengths, moved.single, moved.max_document) == ((3, 5), False, 5)
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if field.name == "host_ids_BS":
            assert before is None and after is batch.input_ids_BS, "moved, and still known on the host"
            continue
        if not isinstance(before, torch.Tensor):
            assert before is after
            continue
        assert after.is_meta and not before.is_meta, field.name
        assert (after.shape, after.dtype) == (before.shape, before.dtype), field.name
