"""A mixture whose layers, experts and all, come and go is trained as one that stays on the device, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.model.base_cache import keeping, places
from qlora.model.base_cache.layers_on_disk import LayersOnDisk
from qlora.model.weight_streaming import Ring, StreamedWeights
from qlora.step import offload
from tests.card import MIB, Card, rehearsal
from tests.mixtures import make_base
from tests.runs import EVERYTHING, hashes, train, values, write_recipe
from tests.sampling import sampled
from tests.training.cases import damage, fail_in_step, poison_slots, run_out_of_slots

STEPS = 20
ALL = (*EVERYTHING, f"train.max_steps={STEPS}", "checkpoint.every_steps=5")
OFF = ("memory.stream_weights=false", "memory.offload_activations=false", 'memory.embedding="device"')
ON = ("memory.stream_weights=true", "memory.offload_activations=true", 'memory.embedding="host"')


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer leaves behind holds no weight of anybody's; every input is moved, in small blocks."""
    poison_slots(monkeypatch)
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(offload, "BLOCK_BYTES", 4096)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("qwen3_moe", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, base: Path) -> dict[str, str]:
    """Hashes after 20 steps with packing, accumulation, dropout, noise and evaluation, everything on the device."""
    recipe = write_recipe(tmp_path_factory.mktemp("resident"), base)
    train(recipe, *ALL, *OFF)
    return hashes(recipe, STEPS)


def test_twenty_steps(tmp_path: Path, base: Path, resident: dict[str, str]) -> None:
    """Weights, inputs and embeddings on the host."""
    recipe = write_recipe(tmp_path, base)
    recorder = train(recipe, *ALL, *ON)
    assert hashes(recipe, STEPS) == resident
    settings = values(recorder, "plan", "memory")[0]["settings"]
    assert [settings[key] for key in ("memory.stream_weights", "memory.offload_activations")] == [True, True]
    said = values(recorder, "notice", "message")
    assert any(text.startswith("weights are streamed: 2 layers") for text in said)
    assert any("wait on the host" in text for text in said)


@pytest.mark.parametrize("first", [ON, OFF], ids=["streamed, then resident", "resident, then streamed"])
def test_stopped_and_resumed_otherwise(
    tmp_path: Path, base: Path, resident: dict[str, str], first: tuple[str, ...]
) -> None:
    recipe = write_recipe(tmp_path, base)
    train(recipe, *ALL, *first, stop_after=7)
    recorder = train(recipe, *ALL, *(OFF if first == ON else ON), mode="resume")
    assert hashes(recipe, STEPS) == resident
    assert values(recorder, "end", "reason") == ["finished"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", sampled(["gpt_oss", "qwen3_5_moe_text", "glm4_moe_lite", "gemma4_text"], "gpt_oss", "gemma4_text")
)
def test_other_families(tmp_path: Path, family: str) -> None:
    """Biases and clamps; linear attention and a shared expert; a dense layer first; experts beside a dense MLP."""
    found = []
    for name, place in (("host", ON), ("device", OFF)):
        recipe = write_recipe(tmp_path / name, make_base(family, tmp_path / f"base {name}"))
        train(recipe, *ALL, *place, "train.max_steps=4", "checkpoint.every_steps=2")
        found.append(hashes(recipe, 4))
    assert found[0] == found[1]


def test_from_the_disk(tmp_path: Path, base: Path, resident: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM holds none of the layers: a run that is stopped, has its files damaged, ends and is resumed is the same."""
    monkeypatch.setattr(keeping, "RAM_SHARE", 0.0)
    recipe, held = write_recipe(tmp_path, base), list[int]()
    send = LayersOnDisk.send

    def counted(store: LayersOnDisk, layer: int, *rest: Any) -> Any:
        held.append(store.host_bytes)
        if len(held) == 400:
            for kept in places.held(places.root()):
                if (blob := kept.folder / f"layer-{layer:05d}.blob").is_file():
                    damage(blob)
        return send(store, layer, *rest)

    monkeypatch.setattr(LayersOnDisk, "send", counted)
    on_disk = (*ALL, *ON, "memory.cache=true")
    train(recipe, *on_disk, stop_after=4)
    with pytest.raises(ModelError, match="its hash is another one"):
        train(recipe, *on_disk, mode="resume")
    recorder = train(recipe, *on_disk, mode="resume")
    assert hashes(recipe, STEPS) == resident
    said = values(recorder, "notice", "message")
    assert any("layers are read from files" in text for text in said)
    assert any("not read from the cache" in text for text in said), "it was damaged"
    assert len(held) > 400 and not any(held), "of no layer are bytes in RAM"


# On the way up and on the way down of the first step.
@pytest.mark.parametrize("at", sampled([32, 33, 30], 32))
def test_memory_runs_out_while_experts_come(
    tmp_path: Path, base: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.max_steps=3", "train.batch_size=4", "train.micro_batch_size=2", "data.max_length=96")
    settings = (*settings, "data.eval_fraction=0", "train.gradient_checkpointing=true")
    recipe, resets = write_recipe(tmp_path / "host", base), list[bool]()
    reset = StreamedWeights.reset
    with monkeypatch.context() as patch:
        noted = lambda held: (reset(held), resets.append(not held.ring.slots))[0]  # noqa: E731
        patch.setattr(StreamedWeights, "reset", noted)
        run_out_of_slots(patch, at)
        recorder = train(recipe, *settings, "memory.stream_weights=true")
    (step,) = values(recorder, "recovered", "step")
    assert resets == [True, True], "when memory had run out, and at the end"
    plain = write_recipe(tmp_path / "device", base)
    with monkeypatch.context() as patch:
        fail_in_step(patch, max(step, 1))
        other = train(plain, *settings, "memory.stream_weights=false")
    assert len(other.of("recovered")) == 1
    assert hashes(plain, 3) == hashes(recipe, 3)


def test_on_a_card(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes each branch of a GPU: pinned pieces, a stream of copies, events; and a blob is all of a
    layer."""
    recipe, sent = write_recipe(tmp_path, base), list[int]()
    send = Ring._send

    def counted(ring: Ring, layer: int) -> Any:
        sent.append(ring.nbytes)
        return send(ring, layer)

    monkeypatch.setattr(Ring, "_send", counted)
    with rehearsal(monkeypatch, Card(total=512 * MIB)) as card:
        recorder = train(recipe, *EVERYTHING, "train.max_steps=4", *ON)
    assert values(recorder, "end", "reason") == ["finished"]
    assert card.calls["pin_memory"] and card.calls["Event.record"] and card.calls["Stream.wait_event"]
    assert not card.calls["record_stream"]
    assert max(sent) > 8 * 3 * 64 * 32 // 2, "more than the codes of eight experts"
