"""Attention over documents against the mask of S × S: families, windows, caps, padding, shared keys, gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.layout import Layout
from qlora.data.loader import collate
from qlora.data.token_cache import PreparedSplit
from qlora.model import attention, document_attention
from qlora.model.attention_choice import KERNEL_TOLERANCE, Heads, trial_batch, tried
from qlora.model.base_folder import BaseFolder
from qlora.model.document_attention import KERNELS, flex, one_by_one
from qlora.model.document_mask import DocumentMask
from qlora.step.forward import CausalParts, hidden_states
from qlora.step.layerwise import set_gradient_checkpointing
from tests.data.cases import split_of
from tests.families import FAMILIES, WINDOW
from tests.model.conftest import load

# Rows of documents: one is longer than the window, one row is not full, one is a single document.
PACKS = [(0, 1, 2), (3,), (4, 5)]
LENGTHS = [5, 17, 10, 29, 26, 6]
assert max(LENGTHS) > WINDOW


def batch_of(layout: Layout) -> Batch:
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = [TokenRow(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in drawn]
    split = PreparedSplit(rows, LENGTHS, [n - 1 for n in LENGTHS], [""] * len(rows), [0] * len(rows))
    return collate(split, PACKS, 0, 48, layout)


def of_real_tokens(parts: CausalParts, batch: Batch, in_thread: bool = False) -> tuple[Tensor, Tensor]:
    """Hidden states of the tokens that are no padding, and the embedding's gradient of their squares."""
    counts = [sum(LENGTHS[row] for row in pack) for pack in PACKS]
    hidden_BSD = hidden_states(parts, batch)
    real_ND = torch.cat([hidden_BSD[row, :count] for row, count in enumerate(counts)])
    loss = real_ND.square().sum()
    parts.embedding.weight.grad = None
    if in_thread:  # as on a GPU, where layers are computed anew in a thread of autograd's own
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    else:
        loss.backward()  # type: ignore[no-untyped-call]
    assert parts.embedding.weight.grad is not None
    return real_ND.detach(), parts.embedding.weight.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_one_by_one_equal_the_mask(base_of: Callable[[str], BaseFolder], family: str) -> None:
    """Every family's states and gradients; and padding that goes on changes no token's before it."""
    with_mask = "eager" if family == "gemma2" else "sdpa"
    masked, by_documents = (load(base_of(family), "none", wanted).float() for wanted in (with_mask, "varlen"))
    assert attention.shown(masked) == with_mask
    assert attention.shown(by_documents) == "one by one"
    for model in (masked, by_documents):
        model.get_input_embeddings().weight.requires_grad_(True)
    right, gradient = of_real_tokens(CausalParts.of(masked), batch_of(Layout()))
    for recompute in (False, True):
        by_documents.train(recompute)
        set_gradient_checkpointing(by_documents, recompute, keep_random_state=False)
        for layout in (Layout(), Layout(16, continues=True, width=48, rows=4)):
            for model in (by_documents, masked) if layout.continues else (by_documents,):
                states, found = of_real_tokens(CausalParts.of(model), batch_of(layout), recompute)
                assert (states - right).abs().max() < 2e-5
                assert (found - gradient).norm() < 2e-6 * gradient.norm()


def test_a_lost_window_or_document_would_show(base_of: Callable[[str], BaseFolder]) -> None:
    model = load(base_of("mistral"), "none", "varlen").float()
    batch = batch_of(Layout())
    with torch.no_grad():
        right = hidden_states(CausalParts.of(model), batch)
        assert batch.input_ids_BS.shape == (3, 32)
        whole = Batch(*[getattr(batch, name) for name in BATCH_TENSORS], batch.cu_seqlens, (32, 32, 32))
        assert (hidden_states(CausalParts.of(model), whole) - right).abs().max() > 0.1, "documents"
        model.config.sliding_window = None
        assert (hidden_states(CausalParts.of(model), batch) - right).abs().max() > 0.1, "windows"


BATCH_TENSORS = ("input_ids_BS", "position_ids_BS", "document_ids_BS", "targets_BS", "loss_weights_BS", "trained_T")


def states_of(batch: Batch, heads: int, shared: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, length = batch.input_ids_BS.shape
    return [
        torch.randn(rows, count, length, width, generator=generator).requires_grad_()
        for count in (heads, shared, shared)
    ]


def textbook(query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scale: float, cap: float | None) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~mask.as_tensor(), float("-inf")).softmax(dim=-1)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, WINDOW, 64])
@pytest.mark.parametrize("kernel", [one_by_one, flex])
def test_kernels_that_a_cpu_has_equal_the_textbook(kernel: Any, window: int | None, softcap: float | None) -> None:
    batch = batch_of(Layout(16, continues=True))
    mask, states = DocumentMask(batch, window), states_of(batch, 4, 2, 16)
    if kernel is flex:  # which has no backward pass on a CPU
        states = [one.detach() for one in states]
    found, right = kernel(*states, mask, 0.3, softcap), textbook(*states, mask, 0.3, softcap)
    counts = [sum(LENGTHS[row] for row in pack) for pack in PACKS]
    pairs = [(found[row, :count], right[row, :count]) for row, count in enumerate(counts)]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in pairs)
    if kernel is one_by_one:
        ours, theirs = (torch.autograd.grad(sum(pair[at].square().sum() for pair in pairs), states) for at in (0, 1))
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("window", [None, 100])
def test_documents_of_like_length_share_a_call_of_the_efficient_kernel(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of their order into classes of length and back, gradients too; the kernel itself is a GPU's."""
    calls: list[tuple[int, ...]] = []

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: DocumentMask, starts: Tensor, longest: int, _: Any) -> Tensor:
        lengths = tuple(starts.diff().tolist())
        assert sum(lengths) == len(q) == int(starts[-1]) and starts.dtype is torch.int32 and longest == max(lengths)
        calls.append(lengths)
        fields = [getattr(mask.batch, name) for name in BATCH_TENSORS]
        own = DocumentMask(Batch(*fields, starts, lengths), mask.window)
        return one_by_one(*(one.transpose(0, 1)[None] for one in (q, k, v)), own, None, None)[0]

    monkeypatch.setattr(document_attention, "_by_starts", plain)
    split = split_of([300, 9, 140, 129, 20, 256, 600])
    batch = collate(split, [(0, 1, 2, 3, 4), (5, 6)], 0, 4096, Layout(16, continues=True))
    assert batch.document_lengths == (300, 9, 140, 129, 286, 256, 608)
    mask, states = DocumentMask(batch, window), states_of(batch, 4, 2, 16)
    found, right = (kernel(*states, mask, None, None) for kernel in (KERNELS["efficient"], one_by_one))
    assert calls == [(300, 286), (9,), (140, 129, 256), (608,)]
    assert torch.allclose(found, right, atol=1e-5)
    ours, theirs = (torch.autograd.grad(one.square().sum(), states) for one in (found, right))
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(ours, theirs, strict=True))
    KERNELS["efficient"](*states, DocumentMask(trial_of_one_class(batch)), None, None)
    assert calls[4:] == [(batch.tokens // 2,) * 2], "of one class: one call, in order"


def trial_of_one_class(batch: Batch) -> Batch:
    half = batch.tokens // 2
    starts = torch.tensor([0, half, 2 * half], dtype=torch.int32)
    return Batch(*[getattr(batch, name) for name in BATCH_TENSORS], starts, (half, half))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("windows", [(None,), pytest.param((None, 48), marks=pytest.mark.slow)])
def test_flex_is_compiled_a_few_times_for_all_widths(
    windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form that a GPU compiles: past 8 variants torch would go on uncompiled, with S × S scores."""
    compiled = []

    def counting(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(document_attention, "_compiles", lambda states: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counting))
    document_attention._flex_attention.cache_clear()
    masks = document_attention._create_block_mask
    masks.cache_clear()
    if len(windows) == 1:  # the mask's compilation takes most of the time
        monkeypatch.setattr(document_attention, "_create_block_mask", lambda compiled: masks(False))
    try:
        for width in (40, 120, 250, 380, 500, 630, 760, 890, 1020, 1150):
            batch = collate(split_of([width - 20, 9, width - 5]), [(0, 1), (2,)], 0, 4096, Layout(16, continues=True))
            states = [one.detach() for one in states_of(batch, 2, 1, 16)]
            for window in windows:
                found, right = (
                    kernel(*states, DocumentMask(batch, window), None, 30.0) for kernel in (flex, one_by_one)
                )
                assert torch.allclose(found[0, : width - 11], right[0, : width - 11], atol=1e-5)
                assert torch.allclose(found[1, : width - 5], right[1, : width - 5], atol=1e-5)
        assert 1 <= len(compiled) <= (3 if len(windows) == 1 else 12)
    finally:
        document_attention._flex_attention.cache_clear()
        masks.cache_clear()


def test_too_many_variants_fail_instead_of_going_on_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "MOST_VARIANTS", 10)
    doubled = torch.compile(lambda tensor: tensor * 2, backend=lambda graph, _: graph)
    with document_attention._many_variants(), pytest.raises(FailOnRecompileLimitHit):
        for rank in range(1, 12):
            doubled(torch.ones([1] * rank))


def test_a_call_that_a_kernel_lacks_is_computed_with_the_mask() -> None:
    """Dropout, odd heads, an attention that looks ahead: the mask as a tensor, and sdpa."""
    batch = batch_of(Layout())
    mask, module = DocumentMask(batch), torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    for width in (16, 12):
        states = states_of(batch, 4, 2, width)
        found, _ = attention.by_kernel(module, *states, mask, "one by one", scaling=0.3, is_causal=True)
        dropping, _ = attention.by_kernel(module, *states, mask, "varlen", scaling=0.3, dropout=1e-9)
        right = textbook(*states, mask, 0.3, None)[:, :29]
        assert torch.allclose(found[:, :29], right, atol=1e-5) and torch.allclose(dropping[:, :29], right, atol=1e-5)
    with pytest.raises(NotImplementedError):
        KERNELS["efficient"](*states_of(batch, 4, 2, 16), mask, 0.3, 2.0)
    with pytest.raises(NotImplementedError):
        KERNELS["varlen"](*states_of(batch, 4, 2, 16), mask, 0.3, 2.0)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's CUDA build (a card it does not need)")
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kernel", ["varlen", "efficient"])
def test_kernels_of_a_gpu_take_these_tensors(kernel: str, window: int | None) -> None:
    """Without a card: shapes, types and devices go through torch's own checks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        cuda = torch.device("cuda")
        batch = trial_batch(300).to(cuda)
        states = [torch.empty(1, count, batch.tokens, 64, dtype=torch.bfloat16, device=cuda) for count in (8, 2, 2)]
        output = KERNELS[kernel](*states, DocumentMask(batch, window), None, None)
    assert output.shape == (1, batch.tokens, 8, 64) and output.device.type == "cuda" and output.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_on_a_gpu_at_least_one_kernel_is_right(softcap: float | None) -> None:
    heads = Heads(8, 2, 128, windowed=True, softcap=softcap)
    kernels = ("varlen", "efficient") if softcap is None else ("flex",)
    reasons = [tried(kernel, heads, torch.device("cuda", 0)) for kernel in kernels]
    assert "" in reasons, (KERNEL_TOLERANCE, reasons)
