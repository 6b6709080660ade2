"""Attention over documents as an operator: the same as without it, and a graph that knows nothing of the documents."""

from __future__ import annotations

import torch

from qlora.model import compiled_attention, sink_attention
from qlora.model.attention_choice import LENGTHS, trial_batch
from qlora.model.compiled_attention import Scores
from qlora.model.document_attention import KERNELS, one_by_one
from qlora.model.document_mask import DocumentMask

KERNEL = "one by one"


def drawn() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, sum(LENGTHS), 16) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def test_output_and_gradients_are_those_of_the_kernel() -> None:
    assert KERNELS[KERNEL] is one_by_one
    for window in (None, 48):
        mask = DocumentMask(trial_batch(2), window)
        inputs = drawn()
        right = one_by_one(*inputs, mask, 0.3, None)
        wanted = torch.autograd.grad(right.square().sum(), inputs)
        found = compiled_attention.attend(KERNEL, *inputs, compiled_attention.behind(mask), Scores(0.3))
        assert torch.equal(found, right)
        for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), wanted, strict=True):
            assert torch.equal(one, other)


def test_masks_of_two_windows_are_kept_apart_and_the_last_one_counts() -> None:
    batch, other = trial_batch(2), trial_batch(3)
    whole, windowed = DocumentMask(batch, None), DocumentMask(batch, 8)
    first, second = compiled_attention.behind(whole), compiled_attention.behind(windowed)
    assert first != second and compiled_attention.behind(DocumentMask(other, None)) == first
    tensor = torch.ones(2)
    assert compiled_attention.behind(tensor) is tensor and compiled_attention.behind(None) is None


def test_the_operator_is_sound() -> None:
    """Its shapes on fake tensors, its gradient and its aliasing, as torch checks them."""
    query, key, value = drawn()
    stand_in = compiled_attention.behind(DocumentMask(trial_batch(2), None))
    for sinks in (None, torch.arange(4.0)):
        arguments = (query, key, value, KERNEL, stand_in.window, None, None, sinks)
        torch.library.opcheck(compiled_attention._attend, arguments)


def test_sinks_go_through_the_operator() -> None:
    mask, inputs, sinks = DocumentMask(trial_batch(2), 48), drawn(), torch.arange(4.0) - 1
    right = sink_attention.one_by_one(*inputs, mask, 0.3, sinks)
    wanted = torch.autograd.grad(right.square().sum(), inputs)
    found = compiled_attention.attend(KERNEL, *inputs, compiled_attention.behind(mask), Scores(0.3, None, sinks))
    assert torch.equal(found, right)
    for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), wanted, strict=True):
        assert torch.equal(one, other)
