"""Which kernel is taken: by trial, by the card's facts before it, and what is said where none passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora import numerics
from qlora.errors import ModelError
from qlora.events import Recorder
from qlora.model import attention, attention_choice, document_attention
from qlora.model.attention_choice import Heads, assumed, assumed_on_cpu, lack_of, settle, tried
from qlora.model.base_folder import BaseFolder
from qlora.numerics import Numerics
from tests import all_families, mixtures
from tests.card import Card, rehearsal
from tests.families import make_config
from tests.model.conftest import CPU, load

HEADS = Heads(4, 2, 16, windowed=True, softcap=None)


def settled(model: Any, wanted: str, kernels: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """`settle` on a card that has these kernels and no others; its tensors stay on the CPU."""

    def absent(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    for name in ("varlen", "efficient", "flex"):
        monkeypatch.setitem(document_attention.KERNELS, name, kernels.get(name, absent))
    recorder = Recorder()
    with rehearsal(monkeypatch, Card(total=1 << 30)):
        settle(model, wanted, CPU, recorder)
    return recorder


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: invalid configuration argument",
        "Triton Error [CUDA]: device kernel image is invalid",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_a_kernel_that_cuda_refuses_ends_no_run(
    base_of: Callable[[str], BaseFolder], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether in its own trial or in the model's: the next one is taken. What is asked for again is tried again."""
    refuses_from = [0]
    asked: list[int] = []

    def refused(*arguments: Any) -> Any:
        asked.append(1)
        if len(asked) > refuses_from[0]:
            raise RuntimeError(text)
        return document_attention.one_by_one(*arguments)

    model = load(base_of("llama"), "none", "sdpa")
    settled(model, "auto", {"varlen": refused, "efficient": document_attention.one_by_one}, monkeypatch)
    assert attention.shown(model) == "efficient"
    assert text[:100] in tried("varlen", HEADS, CPU) and len(asked) == 2
    model, refuses_from[0] = load(base_of("llama"), "none", "sdpa"), len(asked) + 1
    said = settled(model, "auto", {"varlen": refused}, monkeypatch).of("notice")
    assert attention.shown(model) == "sdpa" and text[:100] in str(said[0])


def test_a_gpu_that_is_lost_in_a_trial_ends_the_run(
    base_of: Callable[[str], BaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        settled(load(base_of("llama"), "none", "sdpa"), "auto", {"varlen": lost}, monkeypatch)


def shifted(*arguments: Any) -> Any:
    """A kernel whose windows are a token too wide."""
    query, key, value, mask, scale, cap = arguments
    window = None if mask.window is None else mask.window + 1
    return document_attention.one_by_one(query, key, value, type(mask)(mask.batch, window), scale, cap)


def leaking(*arguments: Any) -> Any:
    query, key, value, mask, scale, cap = arguments
    batch = attention_choice.trial_batch(9)
    whole = type(batch)(*[getattr(batch, name) for name in list(vars(batch))[:7]], (sum(attention_choice.LENGTHS),))
    return document_attention.one_by_one(query, key, value, type(mask)(whole, mask.window), scale, cap)


@pytest.mark.parametrize(
    ("family", "kernels", "chosen"),
    [
        ("llama", ("varlen", "efficient"), "varlen"),
        ("llama", ("efficient",), "efficient"),
        ("llama", (), "sdpa"),
        ("gemma2", ("flex",), "flex"),
        ("gemma2", ("varlen",), "eager"),
        ("gemma3", ("varlen",), "varlen"),
    ],
)
def test_the_first_that_passes_is_taken(
    base_of: Callable[[str], BaseFolder], family: str, kernels: tuple[str, ...], chosen: str, monkeypatch: Any
) -> None:
    model = load(base_of(family), "none", "auto" if family == "gemma2" else "sdpa")
    working = dict.fromkeys(kernels, document_attention.one_by_one)
    said = [event.as_dict()["message"] for event in settled(model, "auto", working, monkeypatch).of("notice")]
    assert attention.shown(model) == chosen
    masked = chosen in ("sdpa", "eager")
    assert any("S × S" in message and "no kernel image" in message for message in said) == masked


@pytest.mark.parametrize("wrong", [shifted, leaking])
def test_a_kernel_that_is_wrong_is_not_taken(
    base_of: Callable[[str], BaseFolder], wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base_of("mistral"), "none", "sdpa")
    recorder = settled(model, "auto", {"varlen": wrong, "efficient": document_attention.one_by_one}, monkeypatch)
    assert attention.shown(model) == "efficient" and not recorder.of("notice")
    model = load(base_of("mistral"), "none", "sdpa")
    said = str(settled(model, "auto", {"varlen": wrong}, monkeypatch).of("notice")[0])
    assert attention.shown(model) == "sdpa" and "varlen: off by" in said and "efficient: no kernel image" in said


def test_documents_that_were_asked_for_are_refused_where_they_cannot_be(
    base_of: Callable[[str], BaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base_of("mistral"), "none", "sdpa")
    model.config.attention_dropout = 0.1
    with pytest.raises(ModelError, match="it drops attention while training") as error:
        settle(model, "varlen", CPU, Recorder())
    assert error.value.hint == 'use "auto" or "eager"'


def test_a_model_whose_layers_do_not_hand_documents_on_keeps_its_mask(
    base_of: Callable[[str], BaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(base_of("llama"), "none", "sdpa")
    layer = model.model.layers[0]
    real = layer.forward

    def looks(hidden: Any, attention_mask: Any = None, **named: Any) -> Any:
        return real(hidden, attention_mask=None if attention_mask is None else attention_mask[:, :, :, :], **named)

    layer.forward = looks
    said = settled(model, "auto", {"varlen": document_attention.one_by_one}, monkeypatch).of("notice")
    assert attention.shown(model) == "sdpa" and "hand documents on" in str(said[0])

    def loses(hidden: Any, attention_mask: Any = None, **named: Any) -> Any:
        kept = None if not isinstance(attention_mask, torch.Tensor) else attention_mask
        return real(hidden, attention_mask=kept, **named)

    layer.forward = loses
    said = settled(model, "auto", {"varlen": document_attention.one_by_one}, monkeypatch).of("notice")
    assert attention.shown(model) == "sdpa" and "differ" in str(said[0])


def test_a_kernel_that_the_model_does_not_take_leaves_the_next_one(
    base_of: Callable[[str], BaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right in its trial, wrong in the model: here, because it fails where nobody asks for gradients."""

    def trains_only(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("no kernel without gradients")
        return document_attention.one_by_one(*arguments)

    model = load(base_of("llama"), "none", "sdpa")
    both = {"varlen": trains_only, "efficient": document_attention.one_by_one}
    assert not settled(model, "auto", both, monkeypatch).of("notice")
    assert attention.shown(model) == "efficient"
    model = load(base_of("llama"), "none", "sdpa")
    said = str(settled(model, "auto", {"varlen": trains_only}, monkeypatch).of("notice")[0])
    assert attention.shown(model) == "sdpa"
    assert "no kernel without gradients" in said and "efficient: no kernel image" in said


def test_a_run_that_began_with_a_mask_says_why_it_keeps_it(
    base_of: Callable[[str], BaseFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = Numerics(attention=attention.NAME)
    with numerics.in_force(begun):
        model = load(base_of("llama"), "none", "sdpa")
        said = settled(model, "auto", {"varlen": document_attention.one_by_one}, monkeypatch).of("notice")
    assert attention.shown(model) == "sdpa" and "when this run began" in str(said[0])


def test_a_cpu_takes_documents_one_by_one(base_of: Callable[[str], BaseFolder]) -> None:
    """A run that began with a mask goes on with it."""
    for wanted, chosen in (("auto", "one by one"), ("sdpa", "sdpa"), ("eager", "eager"), ("varlen", "one by one")):
        assert attention.shown(load(base_of("qwen3"), "none", wanted)) == chosen
        assumed_too = assumed_on_cpu(make_config("qwen3"), attention.NAME, wanted)
        assert assumed_too == (chosen if chosen == "one by one" else None)
    recorder = Recorder()
    with numerics.in_force(Numerics(attention=attention.NAME)):
        model = load(base_of("llama"), "none")
        settle(model, "auto", CPU, recorder)
    assert attention.shown(model) == "sdpa" and not recorder.of("notice")


def test_a_cpu_keeps_the_mask_of_models_with_caps_and_of_mixtures(base_of: Callable[[str], BaseFolder]) -> None:
    model = load(base_of("gemma2"), "none")
    assert assumed_on_cpu(make_config("gemma2"), "eager", "auto") is None
    mixture = mixtures.make_config("qwen3_moe")
    assert assumed_on_cpu(mixture, attention.NAME, "auto") is None, "loading takes no expert's memory but the largest's"
    assert assumed_on_cpu(mixture, attention.NAME, "varlen") == "one by one"
    recorder = Recorder()
    settle(model, "auto", CPU, recorder)
    assert attention.shown(model) == "eager" and "eager attention is used" in str(recorder.of("notice")[0])


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llama", {}, ""),
        ("gemma2", {}, ""),
        ("llama", {"attention_dropout": 0.1}, "drops attention"),
        ("llama", {"head_dim": 320}, "320 wide"),
        ("llama", {"head_dim": 12}, "12 wide"),
        ("llama", {"attention_chunk_size": 8}, "more than documents"),
        ("llama", {"is_causal": False}, "more than documents"),
    ],
)
def test_what_keeps_the_mask(family: str, change: dict[str, Any], reason: str) -> None:
    config = make_config(family, overrides=change)
    name = "eager" if family == "gemma2" else attention.NAME
    found = lack_of(config, name)
    assert reason in found and bool(found) == bool(reason)
    assert (assumed(config, name, "auto", 89, windows=False) is None) == bool(reason)


def test_attention_of_a_models_own_keeps_it() -> None:
    assert "eager alone" in lack_of(make_config("llama"), "eager")
    assert "sdpa alone" in lack_of(make_config("llama"), "sdpa")
    assert "no heads" in lack_of(all_families.make_config("mamba"), attention.NAME)


def test_what_is_assumed_of_a_card_before_it_is_tried() -> None:
    config, name = make_config("llama"), attention.NAME
    assert assumed(config, name, "auto", 86, windows=False) == "varlen"
    assert assumed(config, name, "auto", 86, windows=True) == "efficient", "builds for Windows have no flash attention"
    assert assumed(config, name, "varlen", 75, windows=False) == "efficient", "nor has Turing"
    assert assumed(config, name, "sdpa", 86, windows=False) is None
    assert assumed(make_config("gemma2"), "eager", "auto", 86, windows=True) == "flex"
    assert assumed(make_config("gemma2"), "eager", "eager", 86, windows=False) is None


def test_a_torch_without_varlen_attn_is_assumed_to_take_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's varlen_attn takes no windows: nothing may be estimated with it, not even on meta."""
    monkeypatch.setattr(document_attention, "_varlen_attn", lambda: None)
    assert assumed(make_config("llama"), attention.NAME, "auto", 86, windows=False) == "efficient"
    assert assumed(make_config("gemma2"), "eager", "auto", 86, windows=False) == "flex"


def test_a_trial_crosses_the_blocks_of_the_kernels_that_train() -> None:
    """Fewer queries than a block are computed by flex_decoding; and one document is shorter than the window."""
    lengths, window = attention_choice.LENGTHS, attention_choice.WINDOW
    assert sum(lengths) == 2 * document_attention.FLEX_BLOCK < 2 * lengths[0], "the first ends in the second block"
    assert min(lengths) < window < lengths[1]
    assert attention_choice.trial_batch(300).input_ids_BS.shape == (1, sum(lengths))


def test_a_trial_looks_at_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_only(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return document_attention.one_by_one(query, key, value.detach() + 0 * value, *rest)

    def no_number(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return document_attention.one_by_one(query, key + 0 * key.detach().sub(key).sqrt(), value, *rest)

    monkeypatch.setitem(document_attention.KERNELS, "varlen", forward_only)
    assert "off by 1.00" in tried("varlen", HEADS, CPU)
    monkeypatch.setitem(document_attention.KERNELS, "varlen", no_number)
    assert "off by nan" in tried("varlen", HEADS, CPU)
    assert tried("one by one", HEADS, CPU) == ""
