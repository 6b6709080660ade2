"""Documents packed into a row are computed as they are alone: every family, mode and mask that training meets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from qlora.errors import ModelError
from qlora.model import attention
from qlora.model.base_folder import BaseFolder
from tests.card import Card, rehearsal
from tests.families import FAMILIES, PAD_ID, WINDOW
from tests.model.conftest import load

# Row by row, the lengths of documents; the last is padding. The window is shorter than the longest document.
ROWS = ((5, 17, 9, 3), (20, 1, 2, 11))
assert max(map(max, ROWS)) > WINDOW and len({sum(row) for row in ROWS}) == 1


def rows_of(rows: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, position ids) of packed rows; the last document of each is padding, at positions from 0."""
    generator = torch.Generator().manual_seed(7)
    ids, positions = [], []
    for lengths in rows:
        row = torch.randint(4, 300, (sum(lengths),), generator=generator)
        row[-lengths[-1] :] = PAD_ID
        ids.append(row)
        positions.append(torch.cat([torch.arange(length) for length in lengths]))
    return torch.stack(ids), torch.stack(positions)


def packed_minus_alone(model: Any, rows: tuple[tuple[int, ...], ...], **settings: Any) -> float:
    """Largest difference in logits between packed documents and the same documents alone, padding left out."""
    input_ids, position_ids = rows_of(rows)
    arguments = {"attention_mask": None, "use_cache": False, **settings}
    packed = model(input_ids=input_ids, position_ids=position_ids, **arguments).logits
    worst = 0.0
    for row, lengths in enumerate(rows):
        start = 0
        for length in lengths[:-1]:
            part = slice(start, start + length)
            alone = model(input_ids=input_ids[row : row + 1, part], attention_mask=None, use_cache=False).logits
            worst = max(worst, (packed[row : row + 1, part] - alone).abs().max().item())
            start += length
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_computed_as_alone(base_of: Callable[[str], BaseFolder], family: str) -> None:
    model = load(base_of(family), "none", "auto" if family == "gemma2" else "sdpa").float()
    model.get_input_embeddings().weight.requires_grad_(True)  # something to checkpoint for
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else attention.NAME)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for training in (False, True):
            model.train(training)
            for rows in (ROWS, ROWS[:1], ROWS[1:]):
                assert packed_minus_alone(model, rows) < 1e-5, (checkpointing, training, len(rows))


@pytest.mark.parametrize("attention_name", ["sdpa", "eager"])
def test_windows_are_kept_under_both_attentions(base_of: Callable[[str], BaseFolder], attention_name: str) -> None:
    """With the window switched off the logits differ, so that the test above would see a lost window."""
    model = load(base_of("mistral"), "none", attention_name).float()
    input_ids = rows_of(ROWS[1:])[0]
    with torch.no_grad():
        windowed = model(input_ids=input_ids, use_cache=False).logits
        model.config.sliding_window = None
        whole = model(input_ids=input_ids, use_cache=False).logits
    assert packed_minus_alone(model, ROWS) < 1e-5
    assert torch.allclose(windowed[:, : WINDOW - 1], whole[:, : WINDOW - 1], atol=1e-5)
    assert (windowed - whole).abs().max() > 1e-2


def test_the_traps_are_real(base_of: Callable[[str], BaseFolder]) -> None:
    """Each condition that `attention.py` names: left out, documents leak into each other (so callers keep them)."""
    model = load(base_of("llama"), "none").float()
    ones = torch.ones(2, sum(ROWS[0]), dtype=torch.long)
    assert packed_minus_alone(model, ROWS) < 1e-5
    assert packed_minus_alone(model, ROWS, attention_mask=ones) > 0.1
    assert packed_minus_alone(model, ROWS, use_cache=True) > 0.1
    model.get_input_embeddings().weight.requires_grad_(True)
    model.train()
    assert packed_minus_alone(model, ROWS, use_cache=True) > 0.1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert packed_minus_alone(model, ROWS, use_cache=True) < 1e-5, "here transformers switches the cache off by itself"
    model.eval()
    assert packed_minus_alone(model, ROWS, use_cache=True) > 0.1


@pytest.mark.parametrize("masked", [False, True])
def test_shared_keys_equal_repeated_keys(masked: bool) -> None:
    """Our attention against the textbook, with queries of 8 heads on keys of 2, values and gradients."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 8, 21, 16, generator=generator, requires_grad=True)
    key = torch.randn(2, 2, 21, 16, generator=generator, requires_grad=True)
    value = torch.randn(2, 2, 21, 16, generator=generator, requires_grad=True)
    causal = torch.ones(21, 21, dtype=torch.bool).tril()
    apart = torch.arange(21)[:, None] // 7 == torch.arange(21) // 7
    mask = (causal & apart if masked else causal)[None, None].expand(2, 1, -1, -1)

    module = torch.nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    ours, _ = attention.attention(module, query, key, value, mask if masked else None, scaling=0.3, is_causal=True)
    scores = query @ key.repeat_interleave(4, dim=1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    textbook = (weights @ value.repeat_interleave(4, dim=1)).transpose(1, 2)
    assert torch.allclose(ours, textbook, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(ours.square().sum(), (query, key, value)),
        torch.autograd.grad(textbook.square().sum(), (query, key, value)),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_sdpa_is_refused_where_it_cannot_compute_the_model(base_of: Callable[[str], BaseFolder]) -> None:
    with pytest.raises(ModelError, match="caps attention scores"):
        load(base_of("gemma2"), "none", "sdpa")


def test_a_gpu_tries_its_kernels_in_the_order_that_the_estimate_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN, which comes first on Hopper if it is let, never computes; a CPU's choice is left alone."""
    orders: list[list[int]] = []

    def sees(*arguments: Any, **_: Any) -> torch.Tensor:
        orders.append(torch._C._get_sdp_priority_order())
        assert torch.backends.cuda.cudnn_sdp_enabled() == (len(orders) == 1)
        return arguments[0]

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", sees)
    states = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    attention.attention(torch.nn.Module(), *states, None)
    with rehearsal(monkeypatch, Card(total=1 << 30)):
        attention.attention(torch.nn.Module(), *states, None)
    wanted = [int(kernel) for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)]
    assert orders[1][:3] == wanted and torch._C._get_sdp_priority_order() == orders[0]
