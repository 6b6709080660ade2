"""Labels of rows in the tensors of a micro-batch: each at its trained token, in packs and beside plain rows."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest
import torch

from qlora.data.ahead import in_one_block
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit, RowLabels
from tests.data.cases import split_trained


def labels_of(tokens: int, first: int, places: int = 3) -> RowLabels:
    ids = numpy.arange(first, first + tokens * places, dtype=numpy.int32).reshape(tokens, places)
    logprobs = numpy.log(numpy.full((tokens, places), 0.25)).astype(numpy.float16)
    return RowLabels(ids, logprobs)


def mixed() -> PreparedSplit:
    """A row with labels between two without."""
    found = {1: labels_of(2, 100)}
    return replace(split_trained((4, 2), (5, 2), (3, 1)), labels=found.get)


def test_each_label_stands_at_its_token() -> None:
    batch = collate(mixed(), [(2, 1), (0,)], pad_id=0, max_length=16)
    assert batch.label_ids_TK is not None and batch.label_logprobs_TK is not None
    targets_T = batch.targets_BS.flatten()[batch.trained_T]
    assert batch.label_ids_TK.shape == (5, 3) and len(targets_T) == 5
    assert batch.label_ids_TK[1:3].tolist() == [[100, 101, 102], [103, 104, 105]]
    torch.testing.assert_close(batch.label_logprobs_TK[1:3].exp(), torch.full((2, 3), 0.25), rtol=1e-3, atol=0)
    plain = [0, 3, 4]
    assert batch.label_ids_TK[plain, 0].tolist() == targets_T[plain].tolist()
    assert batch.label_logprobs_TK[plain].exp().tolist() == [[1.0, 0.0, 0.0]] * 3


def test_a_micro_batch_without_labels_is_as_it_was() -> None:
    assert collate(mixed(), [(0, 2)], pad_id=0, max_length=16).label_ids_TK is None


def test_a_place_without_a_token_has_probability_nought() -> None:
    labels = labels_of(2, 100)
    labels.ids[0, 2], labels.logprobs[0, 2] = -1, -numpy.inf
    batch = collate(replace(mixed(), labels={1: labels}.get), [(1,)], pad_id=0, max_length=16)
    assert batch.label_ids_TK is not None and batch.label_logprobs_TK is not None
    assert bool((batch.label_ids_TK >= 0).all()) and batch.label_logprobs_TK[0, 2].item() == -torch.inf


def test_labels_go_with_the_block_that_is_copied_at_once() -> None:
    batch = collate(mixed(), [(2, 1), (0,)], pad_id=0, max_length=16)
    moved = in_one_block(batch, torch.device("cpu")).to(torch.device("cpu"))
    assert batch.label_ids_TK is not None and batch.label_logprobs_TK is not None
    assert moved.label_ids_TK is not None and moved.label_logprobs_TK is not None
    assert torch.equal(moved.label_ids_TK, batch.label_ids_TK)
    assert torch.equal(moved.label_logprobs_TK, batch.label_logprobs_TK)


def test_labels_of_another_number_of_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:2: labels of 3 tokens for 2"):
        collate(replace(mixed(), labels={1: labels_of(3, 0)}.get), [(1,)], pad_id=0, max_length=16)
