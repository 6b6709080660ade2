"""Log-probabilities from blocks of a head's rows are those of the whole head, and so are their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.numerics import Numerics
from qlora.step import head_blocks
from qlora.step.head_blocks import rows_of, rows_of_run, send_by, token_logprobs
from qlora.step.loss import softcap
from qlora.step.loss import token_logprobs as of_whole_head

TRANSFORMS = {
    "plain": None,
    "capped": partial(softcap, cap=5.0, factor=2.0),
    "scaled": partial(torch.mul, other=0.25),
}


def head_of(vocabulary: int = 1000, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(32, vocabulary, bias=bias).requires_grad_(False)
    head.weight.mul_(3)
    return head


def asked(head: nn.Linear, targets: Tensor, transform: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the gradient of the hidden states for weights of both signs; in blocks, or whole: 0."""
    torch.manual_seed(1)
    hidden = torch.randn(len(targets), 32, dtype=head.weight.dtype, requires_grad=True)
    function = token_logprobs if rows else of_whole_head
    found = function(hidden, targets, head, transform, rows or 16)
    (found * torch.linspace(-1, 2, targets.numel()).view(targets.shape)).sum().backward()
    assert hidden.grad is not None
    return found.detach(), hidden.grad


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("shape", [(50,), (50, 3)], ids=["targets", "labels"])
@pytest.mark.parametrize("rows", [384, 1000, 128])
def test_they_are_the_whole_heads(
    transform: Any, shape: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a last block that is shorter, one block alone, and tiles of fewer tokens than there are."""
    monkeypatch.setattr(head_blocks, "TILE_TOKENS", 16)
    head, targets = (
        head_of(),
        torch.arange(shape[0] * (len(shape) == 1 or shape[1])).mul(37).remainder(1000).view(shape),
    )
    (logprobs, gradient), (wanted, right) = (asked(head, targets, transform, count) for count in (rows, 0))
    assert torch.allclose(logprobs, wanted, atol=2e-6) and (gradient - right).norm() <= 1e-6 * right.norm()


def test_in_16_bit_they_are_as_near_to_the_truth() -> None:
    """Each block's share is rounded to bf16 before it is added in fp32: of 8 blocks the error is 1.15 times that of one
    product with the whole head."""
    head, targets = head_of(bias=False), torch.arange(200).mul(37).remainder(1000)
    _, truth = asked(head, targets, None, 0)
    head = head.to(torch.bfloat16)
    torch.manual_seed(1)
    errors = [(asked(head, targets, None, rows)[1].float() - truth).norm() / truth.norm() for rows in (128, 0)]
    assert errors[0] <= 1.25 * errors[1]


def test_no_token_has_no_loss() -> None:
    hidden, targets = torch.empty(0, 32, requires_grad=True), torch.empty(0, dtype=torch.int64)
    found = token_logprobs(hidden, targets, head_of(), None, 128)
    found.sum().backward()
    assert found.shape == (0,)


def test_blocks_come_once_up_and_once_down_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last first on the way down; where nobody goes back, nothing is kept for it."""
    monkeypatch.setattr(head_blocks, "TILE_TOKENS", 16)
    head, told = head_of(300), list[tuple[bool, bool]]()

    class Sender:
        rows, device = 128, torch.device("cpu")

        def blocks(self, back: bool = False, again: bool = False) -> Iterator[Any]:
            told.append((back, again))
            starts = [0, 128, 256]
            for start in reversed(starts) if back else starts:
                sent.append(start)
                yield start, head.weight[start : start + 128], head.bias[start : start + 128]

    sent = list[int]()
    wanted = asked(head, torch.arange(100), None, 128)
    send_by(head, Sender())
    found = asked(head, torch.arange(100), None, 128)
    assert all(map(torch.equal, found, wanted))
    assert sent == [0, 128, 256, 256, 128, 0] and told == [(False, True), (True, False)]
    with torch.no_grad():
        token_logprobs(torch.zeros(3, 32, requires_grad=True), torch.arange(3), head, None, 128)
    assert told[2:] == [(False, False)]


def test_a_block_is_of_whole_tiles_and_64_mib() -> None:
    sizes = {(128_256, 4096): 8192, (128_256, 8192): 4096, (152_064, 3584): 8192, (256_000, 5120): 6528, (300, 64): 300}
    assert {shape: rows_of(*shape) for shape in sizes} == sizes


def test_a_run_keeps_the_rows_that_it_began_with() -> None:
    head = head_of()
    assert rows_of_run(head, None) == rows_of_run(head, Numerics()) == 0
    assert rows_of_run(head, Numerics(head_block=256)) == 256


def test_very_many_tokens_have_no_more_tiles() -> None:
    assert len([*head_blocks._tiles(1 << 22)]) == head_blocks.MOST_TILES
    assert [*head_blocks._tiles(3000)] == [slice(0, 2048), slice(2048, 3000)]
