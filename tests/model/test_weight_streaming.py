"""A model whose layers come and go computes what a resident one computes; who is used, released and sent when."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ModelError
from qlora.layer_partners import RESIDENT, weights_of
from qlora.model import adapters, emptied, weight_streaming
from qlora.model.generate import greedy
from qlora.model.layer_blobs import stacks_of
from qlora.model.lora_structure import Gated, unread_of
from qlora.model.weight_receiving import Place
from qlora.model.weight_stores import HostStore
from qlora.model.weight_streaming import StreamedWeights, inside
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step import layerwise
from qlora.step.layerwise import recomputable, set_gradient_checkpointing
from tests import mixtures
from tests.families import FAMILIES, GEMMA3N, make_base
from tests.model.streamed import LAYERS, LORA, STREAMED, base_of, opened, poison, step, tuned


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_from_poisoned_slots(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(family, tmp_path)
    loss, gradients = step(tuned(base, Place()))
    poison(monkeypatch)
    again, found = step(tuned(base, STREAMED))
    assert torch.equal(again, loss) and found.keys() == gradients.keys()
    assert [name for name in found if not torch.equal(found[name], gradients[name])] == []
    assert any(bool(gradient.any()) for gradient in found.values())


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_a_mixture_has_the_same_bits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, routers, shared experts: all of a layer's matrices come and go with it."""
    base = mixtures.make_base(family, tmp_path)
    resident = tuned(base, Place())
    loss, gradients = step(resident)
    poison(monkeypatch)
    model = tuned(base, STREAMED)
    again, found = step(model)
    assert torch.equal(again, loss) and found.keys() == gradients.keys()
    assert [name for name in found if not torch.equal(found[name], gradients[name])] == []
    assert any(bool(gradient.any()) for gradient in found.values())
    stacks = [stack for _, stack in stacks_of(model)]
    assert stacks and all(stack.codes is None and stack.table.numel() == 16 for stack in stacks)
    held = inside(model)
    assert held is not None
    blobs = sum(stack.nbytes - 16 * 4 - 256 * 4 for stack in stacks)
    assert blobs < held.total_bytes and sum(one.nbytes for _, one in model.named_buffers() if one.numel() > 999) == 0


def test_between_its_uses_an_expert_cannot_be_read(tmp_path: Path) -> None:
    model = opened(mixtures.make_base("qwen3_moe", tmp_path), STREAMED)
    experts = recomputable(model)[1].mlp.experts
    with pytest.raises(TypeError):
        experts.gate_up_proj.read(0, 1, torch.bfloat16)
    held = inside(model)
    assert held is not None
    with held.in_place(1):
        assert torch.isfinite(experts.gate_up_proj.read(0, 8, torch.bfloat16)).all()


KINDS = {
    "DoRA": (LoraSection(r=4, use_dora=True), QuantizationSection()),
    "16 bit": (LORA, QuantizationSection(type="none")),
    "one quantization": (LORA, QuantizationSection(double_quant=False)),
    "ours": (LoraSection(r=4), QuantizationSection()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_adapters_and_forms(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, settings = base_of("llama", tmp_path), KINDS[kind]
    loss, gradients = step(tuned(base, Place(), *settings))
    poison(monkeypatch)
    again, found = step(tuned(base, STREAMED, *settings))
    assert torch.equal(again, loss) and all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_answers_and_logits_of_a_live_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, found = base_of("llama", tmp_path), []
    for place in (Place(), STREAMED):
        model = tuned(base, place)
        if place.streams:
            poison(monkeypatch)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.arange(24)[None]).logits
        answers = greedy(model, [[5, 6, 7], [8, 9]], {2}, 6, 0)
        found.append((logits, answers))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def watch(owner: Any, name: str, said: Callable[..., str]) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *about: (seen.append(said(*about)), real(*about))[1])

    watch(StreamedWeights, "use", lambda _, layer, ahead: f"use {layer}")
    watch(StreamedWeights, "release", lambda _, layer: f"release {layer}")
    watch(HostStore, "send", lambda _, layer, *__: f"send {layer}")
    return seen


def test_the_order_of_use_release_and_sending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next layer is on its way while one is used, in the direction of the pass; at the turns nothing is sent."""
    model = tuned(base_of("llama", tmp_path), STREAMED)
    step(model, 1)  # layers 0 and 1 are there now
    seen = recorded(monkeypatch)
    step(model, 1)
    up = ["use 0", "release 0", "use 1", "send 2", "release 1", "use 2", "send 3", "release 2", "use 3", "release 3"]
    down = ["use 3", "release 3", "use 2", "send 1", "release 2", "use 1", "send 0", "release 1", "use 0", "release 0"]
    assert seen == up + down
    assert sum(one.startswith("send") for one in seen) == 2 * LAYERS - 4


def test_on_a_card_a_slot_waits_for_its_last_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy waits for the point behind the layer that was in its slot, and nothing else; computing waits for the copy
    before it reads the slot; the host waits for neither."""
    from tests import card as stand_in

    seen: list[tuple[str, int]] = []
    record, wait, numbers = stand_in.Event.record, stand_in.Stream.wait_event, dict[int, int]()

    def recorded_at(event: Any, stream: Any = None) -> None:
        numbers[id(event)] = len(seen)
        seen.append(("copied" if stream is not card._default else "computed", id(event)))
        record(event, stream)

    def waited(stream: Any, event: Any) -> None:
        seen.append(("copy waits" if stream is not card._default else "computing waits", id(event)))
        wait(stream, event)

    with stand_in.rehearsal(monkeypatch, stand_in.Card()) as card:
        model = tuned(base_of("llama", tmp_path), STREAMED, LoraSection(r=4))
        step(model, 1)
        held = inside(model)
        assert held is not None
        monkeypatch.setattr(stand_in.Event, "record", recorded_at)
        monkeypatch.setattr(stand_in.Stream, "wait_event", waited)
        card.calls.clear()
        kept = []  # so that no event gets the identity of another
        point = held.ring.copies._point
        monkeypatch.setattr(held.ring.copies, "_point", lambda stream: (kept.append(point(stream)), kept[-1])[1])
        for layer, ahead in ((0, 1), (1, 2), (2, 3), (3, None)):
            held.use(layer, ahead)
            held.release(layer)
    names = [name for name, _ in seen]
    assert names.count("copy waits") == names.count("copied") == names.count("computing waits") == 2
    for at, (name, event) in enumerate(seen):
        if name == "copy waits" and event in numbers:
            assert names[numbers[event]] == "computed" and "computed" not in names[numbers[event] + 1 : at]
        if name == "computing waits":
            assert names[numbers[event]] == "copied"
    assert any(name == "copy waits" and event in numbers for name, event in seen)
    assert not card.calls["synchronize"] and not card.calls["Event.synchronize"]


def test_behind_a_forward_pass_the_bottom_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    model = opened(base_of("llama", tmp_path), STREAMED)  # with two passes, in which its attention is tried
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.arange(4)[None])
    sends = [one for one in seen if one.startswith("send")]
    assert sends == [f"send {number}" for number in (*(0, 1, 2, 3) * 4, 0)]


def test_between_its_uses_a_layer_cannot_be_read(tmp_path: Path) -> None:
    model = opened(base_of("llama", tmp_path), STREAMED)
    linear, inputs = recomputable(model)[2].mlp.up_proj, torch.ones(1, 1, 64, dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, AttributeError, TypeError)):
        linear(inputs)
    streamed = inside(model)
    assert streamed is not None and linear.weight.numel() == 0
    with streamed.in_place(2):
        assert linear(inputs).isfinite().all()
        slot = streamed.ring.hold(2)
        host = streamed.store._blobs[2].pieces[0]  # type: ignore[attr-defined]
        assert torch.equal(slot[: len(host)], host), "the bytes of the slot are the host's"
    assert linear.weight.numel() == 0


def test_live_bytes_are_two_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in what the host holds counts as well, and is taken off: the rest of a model of 24 layers is no more
    than one of four layers that is resident, with the adapters and the inputs of 20 more."""
    from qlora.model.weight_stores import HostBytes
    from tests.card import Card, rehearsal

    peaks = []
    for layers, place in ((4, Place()), (24, Place(streams=True))):
        base = base_of("llama", tmp_path / str(layers), layers)
        with rehearsal(monkeypatch, Card()) as card:
            rooms: list[HostBytes] = []
            begin = HostBytes.__init__

            def noted(room: HostBytes, *about: Any, begin: Any = begin, rooms: Any = rooms) -> None:
                begin(room, *about)
                rooms.append(room)

            with monkeypatch.context() as patch:
                patch.setattr(HostBytes, "__init__", noted)
                model = tuned(base, place, LoraSection(r=4))
            on_host = sum(piece.untyped_storage().nbytes() for room in rooms for piece in room.pieces)
            rounded = sum(-(-piece.untyped_storage().nbytes() // 512) * 512 for room in rooms for piece in room.pieces)
            assert on_host <= rounded
            card.highest = card.live
            step(model, 1)
            peaks.append((card.highest - rounded, model))
    (resident, small), (streamed, large) = peaks
    per_layer = sum(p.nbytes for p in adapters.trainable(small).values()) / 4
    adapters_and_gradients = 20 * 2 * per_layer * 1.25  # tensors of a card begin at multiples of 512 bytes
    inputs = 20 * 2 * 40 * 64 * 2
    norms = 20 * 2 * 512
    tables = 20 * 7 * 4 * 512  # a matrix's tables (1,024 and 64 bytes) and offset, which stay
    assert streamed <= resident + adapters_and_gradients + inputs + norms + tables
    held = inside(large)
    assert held is not None and held.total_bytes > 4 * held.device_bytes


def test_what_shares_keys_and_values_is_refused(tmp_path: Path) -> None:
    base = make_base("gemma3n_text", tmp_path, overrides=GEMMA3N)
    with pytest.raises(ModelError, match="its layers share keys and values") as caught:
        opened(base, STREAMED)
    assert "memory.stream_weights = false" in caught.value.hint


@pytest.mark.parametrize("shared", [0, 2])
def test_keys_that_no_layer_takes_from_another_tie_none(
    shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 4 26B-A4B is handed a dict for them, and shares none: its layers are run by us, resident and streamed."""
    kinds = ["sliding_attention", "full_attention"] * (3 if shared else 2)
    overrides = {"num_kv_shared_layers": shared, "layer_types": kinds, "num_hidden_layers": len(kinds)}
    base = mixtures.make_base("gemma4_text", tmp_path, overrides=overrides)
    if shared:
        with pytest.raises(ModelError, match="share keys and values"):
            opened(base, STREAMED)
        return
    seen: list[bool] = []
    closed = layerwise.is_closed

    def watched(layer: Any, inputs: tuple[Any, ...]) -> bool:
        assert "shared_kv_states" in layer.keywords
        seen.append(closed(layer, inputs))
        return seen[-1]

    monkeypatch.setattr(layerwise, "is_closed", watched)
    loss, gradients = step(tuned(base, Place()))
    again, found = step(tuned(base, STREAMED))
    assert all(seen) and len(seen) == 2 * 2 * len(kinds)
    assert torch.equal(again, loss) and all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_a_layer_that_is_not_computed_anew_is_refused(tmp_path: Path) -> None:
    model = tuned(base_of("llama", tmp_path), STREAMED)
    set_gradient_checkpointing(model.get_base_model(), 2, keep_random_state=True)
    with pytest.raises(ModelError, match="is not recomputed"):
        step(model)
    held = inside(model)
    assert held is not None and held._depths == [0] * LAYERS


def test_outputs_that_nobody_reads_are_seen_in_streamed_layers_too(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base")
    models = [tuned(base, place, LoraSection(r=4)).get_base_model() for place in (Place(), STREAMED)]
    classes = [
        [type(one).__mro__[0] for one in model.modules() if type(one).__name__ == "LlamaMLP"] for model in models
    ]
    assert classes[0] and classes[0] == classes[1]  # one class for each way to compute
    gated = [
        Gated(one, ("gate_proj", "up_proj", "down_proj")) for one in models[1].modules() if type(one) in classes[1]
    ]
    assert unread_of(gated, models[1]) == {id(one.module) for one in gated}
    with pytest.raises(ModelError, match="not recomputed"), torch.enable_grad():
        models[1].eval()(torch.ones(1, 4, dtype=torch.int64))  # outside of a look at it nothing is let pass


def test_a_failure_leaves_no_layer_in_use_and_reset_gives_the_slots_back(tmp_path: Path) -> None:
    base = base_of("llama", tmp_path)
    loss, gradients = step(tuned(base, Place()))
    model = tuned(base, STREAMED)
    held = inside(model)
    assert held is not None
    for where in ("forward", "backward"):
        calls = []

        def fails(*_: Any, calls: Any = calls, where: str = where) -> None:
            calls.append(1)
            if len(calls) == (2 if where == "forward" else 7):
                raise torch.OutOfMemoryError("CUDA out of memory")

        hook = recomputable(model)[1].mlp.register_forward_pre_hook(fails)
        with pytest.raises(torch.OutOfMemoryError):
            for _ in range(4):
                step(model)
        hook.remove()
        assert held._depths == [0] * LAYERS
        weight_streaming.reset(model)
        assert held.ring.slots == []
        assert recomputable(model)[1].mlp.up_proj.weight.numel() == 0
    again, found = step(model)
    assert torch.equal(again, loss) and all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_an_empty_model_holds_nothing(tmp_path: Path) -> None:
    model = tuned(base_of("llama", tmp_path), STREAMED)
    held = inside(model)
    step(model)
    emptied.empty(model)
    assert held is not None and held.store.host_bytes == 0 and held.ring.slots == []


def test_who_holds_a_resident_model() -> None:
    assert weights_of(torch.nn.Linear(1, 1)) is RESIDENT and inside(torch.nn.Linear(1, 1)) is None
    weight_streaming.reset(torch.nn.Linear(1, 1))


def test_a_transformers_that_runs_hooks_again_going_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 5.3 it hands over a bound method, hooks included, and not a class's forward with the layer."""
    base = base_of("llama", tmp_path)
    loss, gradients = step(tuned(base, Place()))
    model = tuned(base, STREAMED)
    kind = type(recomputable(model)[0])
    forward = getattr(kind.forward, "__wrapped__", kind.forward)

    def call(layer: Any, *inputs: Any, **named: Any) -> Any:
        run = partial(super(kind, layer).__call__, **named)
        if layer.gradient_checkpointing and layer.training:
            return layer._gradient_checkpointing_func(run, *inputs)
        return run(*inputs)

    monkeypatch.setattr(kind, "forward", forward)
    monkeypatch.setattr(kind, "__call__", call)
    step(model, 1)
    seen = recorded(monkeypatch)
    step(model, 1)
    assert sum(one.startswith("send") for one in seen) == 2 * LAYERS - 4
    poison(monkeypatch)
    again, found = step(model)
    assert torch.equal(again, loss) and all(torch.equal(found[name], gradients[name]) for name in gradients)


def test_the_structure_of_a_streamed_model_is_looked_at(tmp_path: Path) -> None:
    """That pass has a graph and no layer of it is recomputed: it is not refused, and what is trained still is."""
    model = tuned(base_of("llama", tmp_path), STREAMED)
    held = inside(model)
    assert held is not None
    with torch.enable_grad(), held.looked_at():
        model.eval()(input_ids=torch.arange(4)[None])
    with pytest.raises(ModelError, match="is not recomputed"):
        model(input_ids=torch.arange(4)[None])
    assert held._depths == [0] * LAYERS
