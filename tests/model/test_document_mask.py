"""Masks by documents: what transformers would make, asked of nothing but the micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.batch import Batch
from qlora.data.layout import Layout
from qlora.data.loader import collate
from qlora.forward_facts import in_forward, of_forward
from qlora.model.base_folder import BaseFolder
from qlora.model.document_mask import DocumentMask, by_documents
from qlora.step.forward import CausalParts, forward_backward, hidden_states
from qlora.step.layerwise import set_gradient_checkpointing
from qlora.step.loss import SupervisedObjective
from tests.data.cases import split_of
from tests.families import FAMILIES, WINDOW
from tests.model.conftest import load

MOST_HOST_READS = 0
aten = torch.ops.aten


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would wait for a GPU: values read back, and results whose size depends on values."""

    READS = (
        *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
        *(aten.is_nonzero.default, aten.repeat_interleave.Tensor, aten._unique2.default),
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is aten.index.Tensor and any(at is not None and at.dtype == torch.bool for at in args[1])
        if func in self.READS or by_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", ["sdpa", "varlen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_reads_nothing_back(base_of: Callable[[str], BaseFolder], family: str, wanted: str) -> None:
    """Forward, backward with recomputed layers, loss: with the mask as with documents."""
    model = load(base_of(family), "none", "auto" if (family, wanted) == ("gemma2", "sdpa") else wanted).float()
    model.get_input_embeddings().weight.requires_grad_(True)
    model.train()
    set_gradient_checkpointing(model, True, keep_random_state=False)
    for packs in ([(0, 1), (2,)], [(2,)]):
        batch = collate(split_of([3, 2, 16]), packs, 0, 24)
        batch.input_ids_BS.remainder_(300)
        batch.targets_BS.remainder_(300)
        with HostReads() as reads:
            forward_backward(CausalParts.of(model), batch, SupervisedObjective(), 1.0)
        assert len(reads.seen) <= MOST_HOST_READS, reads.seen


def test_without_facts_transformers_reads_back(base_of: Callable[[str], BaseFolder]) -> None:
    """The counter counts: a batch that says nothing of its documents is asked, once a kind of layer."""
    for family, masks in (("llama", 1), ("gemma3", 2)):
        model = load(base_of(family), "none")
        batch = collate(split_of([3, 2, 16]), [(0, 1), (2,)], 0, 24)
        plain = Batch(*[getattr(batch, name) for name in list(vars(batch))[:6]])
        with HostReads() as reads, torch.no_grad():
            hidden_states(CausalParts.of(model), plain)
            assert len(reads.seen) == masks
            hidden_states(CausalParts.of(model), batch)
        assert len(reads.seen) == masks


def asked_of(batch: Batch, **more: Any) -> dict[str, Any]:
    from types import SimpleNamespace

    from transformers.masking_utils import causal_mask_function

    rows, length = batch.input_ids_BS.shape
    config = SimpleNamespace(sliding_window=WINDOW, attention_chunk_size=None)
    asked = {"batch_size": rows, "q_length": length, "kv_length": length, "q_offset": 0, "kv_offset": 0}
    return {**asked, "mask_function": causal_mask_function, "config": config, "device": "cpu", **more}


def test_only_plain_masks_of_the_batch_are_by_documents() -> None:
    batch = collate(split_of([3, 2, 16]), [(0, 1), (2,)], 0, 24)
    assert isinstance(by_documents(**asked_of(batch)), torch.Tensor) or by_documents(**asked_of(batch)) is None
    with in_forward(batch):
        whole, windowed = by_documents(**asked_of(batch)), by_documents(**asked_of(batch, local_size=WINDOW))
        assert isinstance(whole, DocumentMask) and whole.window is None
        assert isinstance(windowed, DocumentMask) and windowed.window == WINDOW
        others: list[dict[str, Any]] = [
            *({"attention_mask": torch.ones(2, 16, dtype=torch.bool)}, {"use_vmap": True}, {"local_size": 5}),
            *({"kv_length": 20}, {"batch_size": 1}, {"q_offset": 1}),
        ]
        for more in others:
            assert not isinstance(by_documents(**asked_of(batch, **more)), DocumentMask), more
    assert of_forward() is None


@pytest.mark.parametrize("layout", [Layout(), Layout(16, continues=True)])
@pytest.mark.parametrize("window", [None, 4])
def test_the_tensor_is_what_transformers_makes(layout: Layout, window: int | None) -> None:
    from types import SimpleNamespace

    from transformers import masking_utils

    from qlora.model.attention import register

    batch = collate(split_of([9, 2, 6, 11]), [(0, 1, 2), (3,)], 0, 24, layout)
    config = SimpleNamespace(_attn_implementation=register(), sliding_window=window, is_causal=True)
    make = masking_utils.create_causal_mask if window is None else masking_utils.create_sliding_window_causal_mask
    embeds_BSD = torch.zeros(*batch.input_ids_BS.shape, 4)
    theirs = make(config, embeds_BSD, None, None, batch.position_ids_BS)
    ours = DocumentMask(batch, window).as_tensor()
    for row, count in enumerate((17, 11)):
        assert torch.equal(ours[row, :, :count], theirs[row, :, :count])
    if not layout.continues:
        assert torch.equal(ours, theirs)
