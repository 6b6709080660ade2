"""Attention with sinks against transformers' eager one: every way in which it is computed, forth and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import numerics
from qlora.events import Recorder
from qlora.memory.trace import LiveBytes
from qlora.model import attention, attention_choice, sink_attention
from qlora.model.attention_choice import LENGTHS, Heads, settle, trial_batch, tried
from qlora.model.document_attention import KERNELS, has_varlen
from qlora.model.document_mask import DocumentMask
from qlora.model.family_facts import two_documents
from qlora.model.meta_model import choose_attention
from qlora.model.sink_attention import SinkKernel, by_definition, one_by_one, with_mask
from qlora.numerics import Numerics
from qlora.step.forward import CausalParts, hidden_states
from tests.mixtures import make_base, make_config
from tests.model.conftest import CPU, at, load

HEADS, SHARED, WIDTH = 8, 2, 16
CLOSE = 1e-6


def drawn() -> tuple[list[Tensor], Tensor]:
    """Query, key, value and sinks, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    length = sum(LENGTHS)
    shapes = [(1, HEADS, length, WIDTH), (1, SHARED, length, WIDTH), (1, SHARED, length, WIDTH), (HEADS,)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    return inputs, torch.randn(1, length, HEADS, WIDTH, generator=generator)


def transformers_own(inputs: list[Tensor], gradient: Tensor, mask: DocumentMask) -> list[Tensor]:
    """Output and gradients of query, key, value and sinks."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module: Any = SimpleNamespace(num_key_value_groups=HEADS // SHARED, sinks=inputs[3], training=False)
    unseen = torch.where(mask.as_tensor(), 0.0, torch.finfo(torch.float32).min)
    output = eager_attention_forward(module, *inputs[:3], unseen, WIDTH**-0.5)[0]
    return [output, *torch.autograd.grad(output, inputs, gradient)]


def under_a_mask(device_type: str) -> SinkKernel:
    return lambda q, k, v, mask, scale, sinks: with_mask(q, k, v, mask.as_tensor(), (scale, sinks), device_type)


# --- the GPU's kernels, by products, with the forms of tensors that torch documents -----------------------------------


def scores_of(q: Tensor, k: Tensor, starts: Tensor, left: int, scale: float | None) -> Tensor:
    """(heads, N, N) of (N, heads, D), what is not seen at -inf."""
    numbers = torch.arange(len(q))
    documents = torch.searchsorted(starts, numbers, right=True)
    behind = numbers[:, None] - numbers
    seen = (documents[:, None] == documents) & (behind >= 0)
    seen &= behind <= left if left >= 0 else seen
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen, -torch.inf)


def gone_back(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, scores: Tensor, total: Tensor, scale: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's backward pass (Dao 2022, algorithm 4): of L and the output, whatever they are made of."""
    groups = q.shape[1] // k.shape[1]
    wide_k, wide_v = (one.repeat_interleave(groups, dim=1) for one in (k, v))
    weights = torch.exp(scores - total[..., None])
    of_values = torch.einsum("hnm,nhd->mhd", weights, gradient)
    delta = (gradient * output).sum(dim=-1).t()[..., None]
    of_scores = weights * (torch.einsum("nhd,mhd->hnm", gradient, wide_v) - delta)
    of_scores = of_scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    of_keys = torch.einsum("hnm,nhd->mhd", of_scores, q)
    shared = [one.unflatten(1, (-1, groups)).sum(dim=2) for one in (of_keys, of_values)]
    return torch.einsum("hnm,mhd->nhd", of_scores, wide_k), shared[0], shared[1]


def _varlen_attn(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Any, most: int, __: int, causal: bool, scale: Any,
    window: list[int], gqa: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert causal == (window == [-1, 0]) and gqa and most == max(LENGTHS)
    scores = scores_of(q, k, starts, window[0], scale)
    wide = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), wide), scores.logsumexp(-1), torch.zeros(2)


def _varlen_attn_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, total: Tensor, starts: Tensor, _: Any,
    most: int, __: int, causal: bool, state: Tensor, scale: Any, window: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert causal == (window == [-1, 0]) and state.shape == (2,)
    return gone_back(gradient, q, k, v, output, scores_of(q, k, starts, window[0], scale), total, scale)


def _padded(sums: Tensor, starts: Tensor, longest: int) -> Tensor:
    """(heads, N) as (documents, heads, longest, rounded up to 32), infinite behind a document's end."""
    ends = starts.tolist()
    room = torch.full((len(ends) - 1, len(sums), -(-longest // 32) * 32), torch.inf)
    for number, (first, last) in enumerate(pairwise(ends)):
        room[number, :, : last - first] = sums[:, first:last]
    return room


def _efficient_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: None, starts: Tensor, _: Any, longest: int, __: int, dropout: float,
    kind: int, sums: bool, *, scale: Any, window_size: int | None,
) -> tuple[Any, ...]:  # fmt: skip
    assert sums and kind == 1 and bias is None and not dropout
    scores = scores_of(q[0], k[0], starts, -1 if window_size is None else window_size - 1, scale)
    output = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v[0])[None]
    return output, _padded(scores.logsumexp(-1), starts, longest), torch.zeros(()), torch.zeros(()), longest, longest


def _efficient_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, output: Tensor, starts: Tensor, _: Any,
    longest: int, __: int, total: Tensor, dropout: float, seed: Tensor, offset: Tensor, kind: int, of_bias: bool, *,
    scale: Any, window_size: int | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert kind == 1 and bias is None and not of_bias and not dropout
    numbers = torch.arange(q.shape[1])
    documents = torch.searchsorted(starts, numbers, right=True) - 1
    flat = total[documents, :, numbers - starts[documents]].t()
    scores = scores_of(q[0], k[0], starts, -1 if window_size is None else window_size - 1, scale)
    found = gone_back(gradient[0], q[0], k[0], v[0], output[0], scores, flat, scale)
    return (*(one[None] for one in found), None)


@pytest.fixture
def card_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_varlen()  # which makes torch_attn's operators known
    for space, made in (
        (torch.ops.torch_attn, (_varlen_attn, _varlen_attn_backward)),
        (torch.ops.aten, (_efficient_attention_forward, _efficient_attention_backward)),
    ):
        for operation in made:
            monkeypatch.setattr(space, operation.__name__, operation)


WAYS = {
    "one by one": one_by_one,
    "by definition": by_definition,
    "a mask on a CPU": under_a_mask("cpu"),
    "a mask on a card": under_a_mask("cuda"),
    "varlen": sink_attention.varlen,
    "efficient": sink_attention.efficient,
}


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("card_kernels")
def test_output_and_gradients_are_those_of_transformers_eager(way: str, window: int | None) -> None:
    """In fp32, of sinks too: the kernel's own backward pass is handed the output and L with the sink in them."""
    mask = DocumentMask(trial_batch(2), window)
    inputs, gradient = drawn()
    right = transformers_own(inputs, gradient, mask)
    output = WAYS[way](*inputs[:3], mask, None, inputs[3])
    found = [output, *torch.autograd.grad(output, inputs, gradient)]
    for one, other in zip(found, right, strict=True):
        assert (one - other).norm() <= CLOSE * other.norm()


def test_a_mask_is_attended_under_in_blocks_and_for_one_token_alike() -> None:
    inputs, _ = drawn()
    mask = DocumentMask(trial_batch(2)).as_tensor()
    with torch.no_grad():
        whole = with_mask(*inputs[:3], mask, (None, inputs[3]), "cpu")
        parts = with_mask(*inputs[:3], mask, (None, inputs[3]), "cuda")
        last = with_mask(inputs[0][:, :, -1:], *inputs[1:3], None, (None, inputs[3]), "cpu")  # the next token's
        causal = with_mask(*inputs[:3], None, (None, inputs[3]), "cpu")
    assert sum(LENGTHS) > sink_attention.QUERIES_AT_ONCE
    assert (whole - parts).norm() <= CLOSE * whole.norm()
    assert (last - causal[:, -1:]).norm() <= CLOSE * last.norm()


def eager(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], sinks=sinks, training=False)
    return eager_attention_forward(module, query, key, value, None, 0.125)[0]


def bytes_beside(tokens: int, kernel: str) -> int:
    """What gpt-oss-20b's attention holds and takes at most, forth and back, on meta: beside query, key and value."""
    live = LiveBytes("cuda")
    with live, torch.enable_grad():
        shapes = [(1, heads, tokens, 64) for heads in (64, 8, 8)]
        states = [torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes]
        sinks = torch.empty(64, dtype=torch.bfloat16, device="meta")
        batch = two_documents((tokens,))
        starts = torch.empty(2, dtype=torch.int32, device="meta")
        named = vars(batch) | {"cu_seqlens": starts, "document_lengths": (tokens,), "single": True}
        mask = DocumentMask(type(batch)(**{**named, "input_ids_BS": batch.input_ids_BS.to("meta")}))
        before = sum(live.live.values())
        live.begin("attend")
        if kernel == "eager":
            output = eager(*states, sinks)
        elif kernel == "blocks":
            output = with_mask(*states, None, (None, sinks), "cuda")
        else:
            output = sink_attention.KERNELS[kernel](*states, mask, None, sinks)
        output.backward(torch.empty_like(output))
    return live.peaks["attend"].total - before


@pytest.mark.parametrize("kernel", ["varlen", "efficient"])
def test_memory_is_linear_in_tokens(kernel: str) -> None:
    """2,048 and 8,192 tokens of one layer: eager's grows sixteenfold, to tens of GiB."""
    short, long = bytes_beside(2048, kernel), bytes_beside(8192, kernel)
    assert long <= 4.1 * short and long < 1 << 30
    assert bytes_beside(8192, "eager") > 24 << 30


def test_blocks_of_queries_hold_no_scores_of_all() -> None:
    """A mask of 8,192 * 8,192 bytes and 128 queries' scores, not 64 heads' of all."""
    assert bytes_beside(8192, "blocks") < 3 << 30


@pytest.fixture
def gpt_oss(tmp_path: Any) -> Callable[[], Any]:
    base = at(make_base("gpt_oss", tmp_path / "base"))
    return lambda: load(base, "none")


def test_a_model_s_hidden_states_are_those_of_eager_attention(gpt_oss: Callable[[], Any]) -> None:
    """Of rows of one document longer than the window, by a mask and by documents, with the embedding's gradient."""
    model = gpt_oss().float()
    assert attention.shown(model) == "sdpa"
    batch, found = trial_batch(300, (60,)), {}
    parts = CausalParts.of(model)
    parts.embedding.weight.requires_grad_(True)
    for name in ("eager", attention.SINKS, attention.name_of("one by one")):
        model.config._attn_implementation = name
        parts.embedding.weight.grad = None
        hidden_BSD = hidden_states(parts, batch)
        hidden_BSD.square().sum().backward()
        found[name] = (hidden_BSD.detach(), parts.embedding.weight.grad)
    for one in list(found.values())[1:]:
        for own, right in zip(one, found["eager"], strict=True):
            assert (own - right).norm() <= 1e-5 * right.norm()


def test_answers_with_a_cache_are_those_of_eager_attention(gpt_oss: Callable[[], Any]) -> None:
    model, ids = gpt_oss().float(), torch.arange(5, 45)[None]
    padded = torch.cat((torch.zeros_like(ids[:, :7]), ids), dim=1)
    seen = torch.cat((torch.zeros_like(ids[:, :7]), torch.ones_like(ids)), dim=1)
    answers = []
    for name in ("eager", attention.SINKS, attention.name_of("varlen")):
        model.config._attn_implementation = name
        with torch.no_grad():
            answers.append(model.generate(padded, attention_mask=seen, max_new_tokens=12, do_sample=False))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_kernels_are_tried_with_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(HEADS, SHARED, WIDTH, windowed=True, softcap=None, sinks=True)
    assert tried("one by one", heads, CPU) == ""
    forgotten = KERNELS["one by one"]
    monkeypatch.setitem(
        sink_attention.KERNELS, "one by one", lambda q, k, v, mask, scale, _: forgotten(q, k, v, mask, scale, None)
    )
    attention_choice._worst.cache_clear()
    assert "off by" in tried("one by one", heads, CPU)


def test_what_is_not_the_same_as_eager_is_not_taken(
    gpt_oss: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recorder = gpt_oss(), Recorder()

    def too_much(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, settings: Any, _: str) -> Tensor:
        return with_mask(q, k, v, mask, (None, settings[1] + 3), "cpu")

    monkeypatch.setattr(sink_attention, "with_mask", too_much)
    settle(model, "auto", CPU, recorder)
    assert attention.shown(model) == "eager"
    assert any("sinks beside a kernel" in event.as_dict()["message"] for event in recorder.of("notice"))


def test_a_run_that_began_with_eager_attention_goes_on_so() -> None:
    config = make_config("gpt_oss")
    assert choose_attention(config, "auto", "base") == attention.SINKS
    with numerics.in_force(Numerics(attention="eager")):
        assert choose_attention(config, "auto", "base") == "eager"
    with numerics.in_force(Numerics(attention=attention.SINKS)):
        assert choose_attention(config, "auto", "base") == attention.SINKS
    assert choose_attention(make_config("qwen3_moe"), "auto", "base") == attention.NAME
