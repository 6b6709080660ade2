"""A head that comes in blocks of rows: what the model computes, where its bytes are, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import device as hardware
from qlora import numerics
from qlora.events import Recorder, Sinks
from qlora.model import adapters, full_logits, head_streaming, load, weight_streaming
from qlora.model.emptied import empty
from qlora.model.resolve import resolve
from qlora.model.weight_receiving import Place, bytes_on_device, device_of, for_saved, tables
from qlora.numerics import Numerics
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step import head_blocks
from qlora.step.forward import CausalParts
from tests.card import Card, rehearsal
from tests.families import make_base

CPU = torch.device("cpu")
HOST = Place(True, True)
# Its embeddings are scaled; Granite's logits are; Phi's head has a bias.
FAMILIES = ("llama", "gemma3_text", "granite", "phi")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_blocks, "MOST_ROWS", 128)


def base_of(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    return make_base(family, folder, overrides={"num_hidden_layers": 2, "layer_types": None, **overrides})


def opened(base: Path, place: Place | None, sink: Any = None) -> Any:
    settings = (QuantizationSection(), "auto", CPU, sink or Sinks())
    return load.load_base(resolve(str(base), "main", Sinks()), *settings, place=place)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        ids = torch.arange(24)[None] * 15  # of all three blocks
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_card", [False, True], ids=["cpu", "stand-in"])
def test_logits_are_the_resident_models(
    family: str, tied: bool, on_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table pinned block by block or not; beside a GPU the parameter has no values then."""
    base = base_of(tmp_path, family, tie_word_embeddings=tied)
    wanted = logits_of(opened(base, Place()))
    if on_card:
        with rehearsal(monkeypatch, Card()):
            model = opened(base, HOST)
            found = logits_of(model)
    else:
        model = opened(base, HOST)
        found = logits_of(model)
    sender = head_streaming.inside(model)
    assert sender is not None and (sender.tied is not None) == tied and device_of(model) == CPU
    assert model.get_output_embeddings().weight.is_meta == on_card
    assert torch.allclose(found, wanted, atol=1e-2, rtol=1e-2) and found.shape == wanted.shape
    assert [table.shape for table in tables(model)] == [sender.head.weight.shape] * (1 if tied else 2)
    held = bytes_on_device(model, model.parameters())
    streamed = weight_streaming.inside(model)
    assert streamed is not None
    small = sum(one.nbytes for name, one in model.named_parameters() if one.ndim == 1)
    assert held == small + streamed.device_bytes, "no table, and no place for blocks, is kept on the device"


def test_it_is_said(tmp_path: Path) -> None:
    recorder = Recorder()
    opened(base_of(tmp_path), HOST, recorder)
    said = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert [one for one in said if "3 blocks of 128 rows (48.0 KiB) through 32.0 KiB" in one]


def test_without_both_it_stays(tmp_path: Path) -> None:
    for place in (Place(), Place(streams=True), Place(host_embedding=True)):
        assert head_streaming.inside(opened(base_of(tmp_path), place)) is None


def test_a_head_of_two_blocks_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_blocks, "MOST_ROWS", 256)
    assert head_streaming.inside(opened(base_of(tmp_path), HOST)) is None


def test_where_pinning_is_refused_the_rest_is_pageable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first block on the table stays as it is; from a later one on, the blocks behind it are plain copies."""
    base = base_of(tmp_path, tie_word_embeddings=True)
    wanted = logits_of(opened(base, Place()))
    for allowed, share in ((0, "100%"), (1, "67%")):
        pin, taken = hardware.pinned, list[int]()

        def few(block: Tensor, device: torch.device, allowed: int = allowed, taken: Any = taken, pin: Any = pin) -> Any:
            if block.dtype != torch.bfloat16 or len(block) != 128:
                return pin(block, device)
            taken.append(1)
            return pin(block, device) if len(taken) <= allowed else block

        with rehearsal(monkeypatch, Card()), monkeypatch.context() as patch:
            patch.setattr(hardware, "pinned", few)
            recorder = Recorder()
            model = opened(base, HOST, recorder)
            said = [event.as_dict()["message"] for event in recorder.of("notice")]
            assert [one for one in said if f"{share} of the head are copied more slowly" in one]
            assert torch.allclose(logits_of(model), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("on_card", [False, True], ids=["cpu", "stand-in"])
def test_a_head_that_an_adapter_replaces_comes_back(
    tied: bool, on_card: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the embeddings that have its table: they are resized together."""
    base = base_of(tmp_path, tie_word_embeddings=tied)
    plain = opened(base, Place())
    with rehearsal(monkeypatch, Card()) if on_card else monkeypatch.context():
        model = opened(base, HOST)
        for_saved(model, ["base_model.model.lm_head.lora_A.weight"])
        assert head_streaming.inside(model) is not None
        for_saved(model, ["base_model.model.lm_head.weight"])
        assert head_streaming.inside(model) is None
        head = model.get_output_embeddings()
        assert type(head) is torch.nn.Linear and torch.equal(head.weight, plain.get_output_embeddings().weight)
        assert (model.get_input_embeddings().weight is head.weight) == tied
        assert torch.equal(logits_of(model), logits_of(plain))
        empty(model)


def test_a_head_that_is_trained_is_on_the_device(tmp_path: Path) -> None:
    model = opened(base_of(tmp_path), HOST)
    tuned = adapters.attach(model, LoraSection(modules_to_save=("lm_head",)), 0)
    assert head_streaming.inside(model) is None and any("lm_head" in name for name in adapters.trainable(tuned))


def test_a_run_has_the_blocks_that_it_began_with(tmp_path: Path) -> None:
    """A new one notes what it takes; one whose head was whole says that its numbers are others now."""
    base = base_of(tmp_path)
    for recorded, taken, said in ((None, 128, 0), (64, 64, 0), (0, 128, 1)):
        recorder = Recorder()
        with numerics.in_force(Numerics(head_block=recorded)):
            parts = CausalParts.of(opened(base, HOST, recorder))
            run = numerics.of_run()
        assert run is not None and run.head_block == parts.head_block == taken and parts.loss_chunk == 0
        assert sum("not bit for bit" in event.as_dict()["message"] for event in recorder.of("notice")) == said


def test_places_are_given_back_behind_each_pass(tmp_path: Path) -> None:
    """Logits leave none; a loss leaves its last blocks for the gradient, and that none."""
    model = opened(base_of(tmp_path), HOST)
    sender = head_streaming.inside(model)
    assert sender is not None
    full_logits.logprobs(model, torch.arange(9))
    assert sender.ring.slots == []
    hidden = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    loss = head_blocks.token_logprobs(hidden, torch.arange(5), sender.head, None, 128).sum()
    sent = sender.ring.sent
    assert len(sender.ring.slots) == 2
    loss.backward()  # type: ignore[no-untyped-call]
    assert sender.ring.slots == [] and sender.ring.sent == sent + 1, "two of three blocks were there still"
    list(sender.blocks(again=True))
    weight_streaming.reset(model)
    assert sender.ring.slots == []


def test_behind_a_model_nothing_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card()):
        model = opened(base_of(tmp_path), HOST)
        sender = head_streaming.inside(model)
        assert sender is not None and len(sender._pinned) == 3
        list(sender.blocks(again=True))
        empty(model)
        assert sender._pinned == [] and sender.ring.slots == []


def test_whoever_has_planned_nothing_has_it_there_where_all_else_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora.model import weight_receiving

    with rehearsal(monkeypatch, Card(total=1 << 30)):
        assert head_streaming.inside(opened(base_of(tmp_path), None)) is not None
    monkeypatch.setattr(weight_receiving, "_ROOM_BESIDE_BYTES", 0)
    with rehearsal(monkeypatch, Card(total=1 << 30)):
        assert weight_streaming.inside(opened(base_of(tmp_path), None)) is None
