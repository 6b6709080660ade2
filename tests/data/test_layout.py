"""Rows of tensors for a GPU: padding that goes on, one shape for all steps; and for a CPU, as ever."""

from __future__ import annotations

import pytest
import torch

from qlora.data.layout import GPU_MULTIPLE, ON_CPU, Layout
from qlora.data.loader import collate
from tests.card import MIB, Card, rehearsal
from tests.data.cases import split_of

ON_GPU = Layout(GPU_MULTIPLE, continues=True)


def test_a_cpu_has_the_layout_that_its_numbers_depend_on() -> None:
    assert Layout.on(torch.device("cpu")) == ON_CPU == Layout(8, continues=False, width=0, rows=0)
    assert ON_CPU.steady([40, 41]) == ON_CPU and ON_CPU.of_rows(2, 4) == ON_CPU


def test_a_card_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card(total=64 * MIB)):
        assert Layout.on(torch.device("cpu")) == ON_GPU


def test_padding_goes_on_with_the_last_document() -> None:
    split = split_of([3, 2, 4])
    batch = collate(split, [(0, 1), (2,)], 9, 64, ON_GPU)
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1, 2, *[3] * 10], [0, 1, 2, *[3] * 13]]
    assert batch.document_lengths == (3, 13, 16) and batch.max_document == 16
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, 3, 16, 32]
    assert batch.cu_seqlens.dtype is torch.int32
    # What is trained, and what NEFTune counts as a document, is as on a CPU.
    as_ever = collate(split, [(0, 1), (2,)], 9, 16)
    assert as_ever.cu_seqlens is not None and as_ever.cu_seqlens.tolist() == [0, 3, 8, 16]
    for name in ("input_ids_BS", "document_ids_BS", "targets_BS", "loss_weights_BS"):
        ours, theirs = getattr(batch, name), getattr(as_ever, name)
        assert torch.equal(ours[:, :5], theirs[:, :5]) and torch.equal(ours[:, 7:8], theirs[:, 7:])
    assert int(batch.trained_T.numel()) == int(as_ever.trained_T.numel()) == 6


@pytest.mark.parametrize(
    ("lengths", "packs", "layout", "single"),
    [
        ([8, 8], [(0,), (1,)], ON_CPU, True),
        ([8, 7], [(0,), (1,)], ON_CPU, False),  # its padding is a document by its positions
        ([8, 7], [(0,), (1,)], ON_GPU, True),
        ([8, 3, 4], [(0,), (1, 2)], ON_GPU, False),
        ([8], [(0,)], Layout(8, continues=True, rows=2), True),
    ],
)
def test_a_row_is_single_by_its_positions(
    lengths: list[int], packs: list[tuple[int, ...]], layout: Layout, single: bool
) -> None:
    batch = collate(split_of(lengths), packs, 0, 16, layout)
    width = batch.input_ids_BS.shape[1]
    goes_on = torch.arange(width).clamp(max=max(lengths) - 1 if layout.continues else width)
    assert batch.single == single == bool((batch.position_ids_BS == goes_on).all())
    assert sum(batch.document_lengths) == batch.tokens


@pytest.mark.parametrize("packs", [[(0, 1, 2)], [(0,), (1, 2)], [(2,)]])
def test_padding_has_no_position_beyond_the_longest_document(packs: list[tuple[int, ...]]) -> None:
    """Nor have rows of nothing: Phi-3 takes its factors for long rows by the highest position of a micro-batch."""
    split = split_of([3, 7, 5])
    batch = collate(split, packs, 0, 64, Layout(GPU_MULTIPLE, continues=True, width=48, rows=3))
    assert batch.input_ids_BS.shape == (3, 48)
    assert int(batch.position_ids_BS.max()) == max(split.lengths[row] for members in packs for row in members) - 1


@pytest.mark.parametrize(("max_length", "width"), [(64, 16), (12, 12), (16, 16)])
def test_a_gpus_row_is_whole_sixteens_within_max_length(max_length: int, width: int) -> None:
    batch = collate(split_of([9]), [(0,)], 0, max_length, ON_GPU)
    assert batch.input_ids_BS.shape == (1, width) and int(batch.position_ids_BS.max()) == 9 - 1


def test_one_width_where_it_adds_little() -> None:
    assert ON_GPU.steady([500, 512, 490]).width == 512
    assert ON_GPU.steady([1100] * 3).width == 1104, "the longest pack's, not max_length"
    assert ON_GPU.steady([512, 16, 16]) == ON_GPU and ON_GPU.steady([]).width == 0
    assert GPU_MULTIPLE == 16


def test_full_micro_batches_where_only_an_epochs_end_has_less() -> None:
    steady = ON_GPU.steady([512])
    assert steady.of_rows(2, 4).rows == 2 and steady.of_rows(2, 5) == steady and ON_GPU.of_rows(2, 4) == ON_GPU
    batch = collate(split_of([9]), [(0,)], 7, 64, steady.of_rows(2, 4))
    assert batch.input_ids_BS.shape == (2, 64) and batch.document_lengths == (64, 64)
    assert batch.input_ids_BS[1].unique().tolist() == [7] and float(batch.loss_weights_BS[1].sum()) == 0
    assert int(batch.trained_T.max()) < 64
