"""Where tokens meet is seen without weights, and so is whether two computations are the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.model.tracing import POSITIONS, TOKENS, Trace, row_length

LENGTH = 13
WIDTH = 8


class Layer(nn.Module):
    """Weights that tests compute with, on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
        self.table = nn.Embedding(64, WIDTH, device="meta")
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, device="meta")
        self.requires_grad_(False)


def traced(compute: Callable[[Layer, Tensor, Tensor], Tensor], trace: Trace | None = None) -> Trace:
    """`compute` of a layer, of its hidden states (1, S, D) on meta, and of the row's positions."""
    layer, trace = Layer(), trace or Trace(LENGTH)
    hidden = torch.empty(1, LENGTH, WIDTH, device="meta")
    positions = torch.arange(LENGTH).unsqueeze(0)
    with torch.no_grad(), trace:
        trace.name_weights(layer)
        trace.name(hidden, "hidden", TOKENS)
        trace.name(positions, "positions", POSITIONS)
        trace.result = trace.number(compute(layer, hidden, positions))  # type: ignore[attr-defined]
    return trace


def scan(layer: Layer, x: Tensor, _: Tensor) -> Tensor:
    state = torch.zeros(1, WIDTH, device="meta")
    for at in range(LENGTH):
        state = 0.5 * state + x[:, at]
    return state


def written(layer: Layer, x: Tensor, _: Tensor) -> Tensor:
    """Tokens that come into other memory in place are tokens there."""
    room = torch.zeros(1, LENGTH, 2 * WIDTH, device="meta")
    room[..., :WIDTH] = x
    return room.cumsum(1)


EACH_BY_ITSELF: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {
    "linear": lambda layer, x, _: layer.linear(x),
    "norm": lambda layer, x, _: F.layer_norm(x, (WIDTH,)),
    "root mean square": lambda layer, x, _: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "heads": lambda layer, x, _: x.view(1, LENGTH, 2, 4).transpose(1, 2).softmax(-1),
    "halves": lambda layer, x, _: torch.cat((-x[..., 4:], x[..., :4]), dim=-1),
    "flat": lambda layer, x, _: layer.linear(x.reshape(-1, WIDTH)).view(1, LENGTH, WIDTH),
    "given positions": lambda layer, x, positions: x + layer.table(positions),
    "rotation": lambda layer, x, positions: x * positions[..., None].float().cos(),
    "kernel of one": lambda layer, x, _: F.conv1d(x.transpose(1, 2), layer.convolution.weight[..., :1]),
    "a bias": lambda layer, x, _: x + torch.ones(1, LENGTH, 1),
}
MEETING: dict[str, tuple[Callable[[Layer, Tensor, Tensor], Tensor], str]] = {
    "convolution": (lambda layer, x, _: layer.convolution(x.transpose(1, 2)), "convolves over tokens"),
    "scores": (lambda layer, x, _: x @ x.transpose(1, 2), "attends in code of its own"),
    "weighted": (lambda layer, x, _: torch.ones(1, LENGTH, LENGTH) @ x, "attends in code of its own"),
    "outer": (lambda layer, x, _: x[:, :, None] - x[:, None], "compares tokens with each other in code of its own"),
    "fused": (lambda layer, x, _: F.scaled_dot_product_attention(x, x, x), "attends in code of its own"),
    "sum": (lambda layer, x, _: x.cumsum(1), "sums over tokens (cumsum)"),
    "mean": (lambda layer, x, _: x - x.mean(1, keepdim=True), "sums over tokens (mean)"),
    "softmax": (lambda layer, x, _: x.softmax(1), "sums over tokens (_softmax)"),
    "all of it": (lambda layer, x, _: x / x.sum(), "sums over tokens (sum)"),
    "shift": (lambda layer, x, _: F.pad(x, (0, 0, 1, -1)), "shifts or pads tokens"),
    "roll": (lambda layer, x, _: x.roll(1, 1), "shifts or pads tokens"),
    "state": (lambda layer, x, _: torch.cat((torch.zeros(1, 2, WIDTH), x), dim=1), "shifts or pads tokens"),
    "pairs": (lambda layer, x, _: x[:, 1:] - x[:, :-1], "goes from token to token"),
    "written": (written, "sums over tokens (cumsum)"),
    "scan": (scan, "goes from token to token"),
    "norm over tokens": (lambda layer, x, _: F.layer_norm(x.transpose(1, 2), (LENGTH,)), "normalizes over tokens"),
    "places": (lambda layer, x, _: x + layer.table(torch.arange(LENGTH)), "counts positions by the place in the row"),
    "counted": (
        lambda layer, x, _: x + torch.ones(1, LENGTH).cumsum(1)[..., None],
        "counts positions by the place in the row",
    ),
    "part of a table": (
        lambda layer, x, _: x + layer.table.weight[:LENGTH],
        "counts positions by the place in the row",
    ),
    "unknown": (lambda layer, x, _: torch.fft.fft(x, dim=1).real, "does what is not known here (_fft_r2c)"),
}


@pytest.mark.parametrize("kind", EACH_BY_ITSELF)
def test_what_keeps_each_token_by_itself_is_no_mixing(kind: str) -> None:
    assert traced(EACH_BY_ITSELF[kind]).mixings == []


@pytest.mark.parametrize("kind", MEETING)
def test_where_tokens_meet_is_written_down(kind: str) -> None:
    compute, what = MEETING[kind]
    found = [one.what for one in traced(compute).mixings]
    assert found and found[0] == what


def test_the_module_in_which_tokens_meet_is_named() -> None:
    class Mixer(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.cumsum(1)

    model, trace = nn.Sequential(nn.Identity(), Mixer()), Trace(LENGTH)
    hidden = torch.empty(1, LENGTH, WIDTH, device="meta")
    with torch.no_grad(), trace.watching(model), trace:
        trace.name(hidden, "hidden", TOKENS)
        model(hidden)
    assert [(one.path, one.kind) for one in trace.mixings] == [("1", "Mixer")]
    assert not model._forward_hooks and not model._forward_pre_hooks


SAME: list[tuple[Callable[[Layer, Tensor, Tensor], Tensor], Callable[[Layer, Tensor, Tensor], Tensor], bool]] = [
    (lambda layer, x, _: layer.linear(x), lambda layer, x, _: layer.linear(x), True),
    (lambda layer, x, _: layer.linear(x), lambda layer, x, _: layer.linear(layer.linear(x)), False),
    (lambda layer, x, _: layer.linear(x), lambda layer, x, _: layer.linear(x).double().clone(), True),
    (lambda layer, x, _: layer.linear(x) * 0.25, lambda layer, x, _: layer.linear(x) / 4, True),
    (lambda layer, x, _: layer.linear(x) * 0.25, lambda layer, x, _: layer.linear(x / 4), True),
    (lambda layer, x, _: layer.linear(x) * 0.25, lambda layer, x, _: layer.linear(x) / 3, False),
    (lambda layer, x, _: x.tanh() * 2, lambda layer, x, _: (x * 2).tanh(), False),
    (lambda layer, x, _: x * 1.0, lambda layer, x, _: x[:, :LENGTH], True),
    (lambda layer, x, _: x.clone().mul_(x), lambda layer, x, _: x.clone(), False),
    (lambda layer, x, p: x + p[..., None], lambda layer, x, p: x + (p + 1)[..., None], False),
    (lambda layer, x, _: x + layer.table.weight[0], lambda layer, x, _: x + layer.table.weight[1], False),
]


@pytest.mark.parametrize(("one", "other", "same"), SAME)
def test_equal_numbers_are_equal_computations(
    one: Callable[[Layer, Tensor, Tensor], Tensor], other: Callable[[Layer, Tensor, Tensor], Tensor], same: bool
) -> None:
    first, second = (traced(compute).result for compute in (one, other))  # type: ignore[attr-defined]
    assert (first == second) is same


def test_a_row_is_as_long_as_no_size_of_the_model() -> None:
    assert row_length(set(), 12) == 13
    assert row_length({26, 64}, 12) == 17
    assert row_length({17, 13 * 5}, 12) == 19
