"""A run whose layers' weights come and go is the run that keeps them on the device, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ModelError, RecipeError
from qlora.layer_partners import weights_of
from qlora.model import weight_streaming
from qlora.model.base_cache import keeping, places
from qlora.model.base_cache.layers_on_disk import LayersOnDisk
from qlora.model.weight_stores import HostStore
from qlora.recipe.reading import load_recipe
from tests.card import MIB, Card, rehearsal
from tests.runs import EVERYTHING, hashes, run_dir, train, values, write_recipe
from tests.sampling import sampled
from tests.training.cases import damage, fail_in_step, poison_slots, run_out_of_slots

STEPS = 20
ALL = (*EVERYTHING, f"train.max_steps={STEPS}", "checkpoint.every_steps=5")
RESIDENT = (*ALL, "memory.stream_weights=false", 'memory.embedding="device"')  # every layer is kept: there is room
ON = (*ALL, "memory.stream_weights=true", 'memory.embedding="host"')


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer leaves behind holds no weight of anybody's."""
    poison_slots(monkeypatch)


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> dict[str, str]:
    """Hashes after 20 steps with packing, accumulation, dropout, noise and evaluation, no weight and no layer's tensors
    anywhere else than on the device."""
    recipe = write_recipe(tmp_path_factory.mktemp("resident"), llama)
    train(recipe, *RESIDENT)
    return hashes(recipe, STEPS)


def test_twenty_steps(tmp_path: Path, llama: Path, resident: dict[str, str]) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, *ON)
    assert hashes(recipe, STEPS) == resident
    settings = values(recorder, "plan", "memory")[0]["settings"]
    assert settings["memory.stream_weights"] is True and settings["memory.embedding"] == "host"
    assert settings["train.gradient_checkpointing"] is True
    said = [text for text in values(recorder, "notice", "message") if "streamed" in text or "on the host" in text]
    assert len(said) == 2 and said[0].startswith("embeddings are looked up on the host")
    assert said[1].startswith("weights are streamed: 2 layers")


@pytest.mark.parametrize("first", [ON, RESIDENT], ids=["streamed, then resident", "resident, then streamed"])
def test_stopped_and_resumed_otherwise(
    tmp_path: Path, llama: Path, resident: dict[str, str], first: tuple[str, ...]
) -> None:
    """What is recomputed is another number of layers then, of which the run's state has a record."""
    recipe = write_recipe(tmp_path, llama)
    train(recipe, *first, stop_after=7)
    recorder = train(recipe, *(RESIDENT if first == ON else ON), mode="resume")
    assert hashes(recipe, STEPS) == resident
    assert values(recorder, "end", "reason") == ["finished"]


def test_without_dropout(tmp_path: Path, llama: Path) -> None:
    """The default: adapters are computed by our functions, for which a graph of each layer is looked at."""
    found, settings = [], ("train.max_steps=3", "data.max_length=96", "train.gradient_checkpointing=true")
    for name, on_host in (("host", "true"), ("device", "false")):
        recipe = write_recipe(tmp_path / name, llama)
        train(recipe, *settings, "lora.dropout=0", f"memory.stream_weights={on_host}")
        found.append(hashes(recipe, 3))
    assert found[0] == found[1]


def test_from_the_disk(tmp_path: Path, llama: Path, resident: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """RAM holds none of the layers: a run that is stopped, has its files damaged, ends and is resumed is the same."""
    monkeypatch.setattr(keeping, "RAM_SHARE", 0.0)
    recipe, held = write_recipe(tmp_path, llama), list[int]()
    send = LayersOnDisk.send

    def counted(store: LayersOnDisk, layer: int, *rest: Any) -> Any:
        held.append(store.host_bytes)
        if len(held) == 400:
            for kept in places.held(places.root()):  # other tests keep bases there too
                if (blob := kept.folder / f"layer-{layer:05d}.blob").is_file():
                    damage(blob)
        return send(store, layer, *rest)

    monkeypatch.setattr(LayersOnDisk, "send", counted)
    on_disk = (*ON, "memory.cache=true")
    train(recipe, *on_disk, stop_after=4)
    with pytest.raises(ModelError) as caught:
        train(recipe, *on_disk, mode="resume")
    assert "its hash is another one" in caught.value.what and "resume" in caught.value.hint
    recorder = train(recipe, *on_disk, mode="resume")
    assert hashes(recipe, STEPS) == resident
    said = values(recorder, "notice", "message")
    assert any("layers are read from files" in text for text in said)
    assert any("not read from the cache" in text for text in said), "it was damaged"
    assert len(held) > 400 and not any(held), "of no layer are bytes in RAM"
    assert not list(places.root().glob("*.use-*"))


@pytest.mark.parametrize("setting", ["false", "1"])
def test_layers_that_are_kept_are_refused(tmp_path: Path, llama: Path, setting: str) -> None:
    recipe = write_recipe(tmp_path, llama)
    overrides = ("memory.stream_weights=true", f"train.gradient_checkpointing={setting}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    (problem,) = caught.value.problems
    assert "recomputes every layer" in problem.what and 'gradient_checkpointing = "auto"' in problem.hint


# Blobs that are sent in the check and the dry run, and then on the way up and on the way down of the first step.
@pytest.mark.parametrize("at", sampled([30, 31, 32, 33], 31, 33))
def test_memory_runs_out_while_weights_come(
    tmp_path: Path, llama: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are done again, fewer at a time; the result is that of a resident run to which the same happens."""
    settings = ("train.max_steps=3", "train.batch_size=4", "train.micro_batch_size=2", "data.max_length=96")
    settings = (*settings, "data.eval_fraction=0", "train.gradient_checkpointing=true")
    recipe, resets = write_recipe(tmp_path / "host", llama), list[bool]()
    reset = weight_streaming.StreamedWeights.reset
    with monkeypatch.context() as patch:
        patch.setattr(
            weight_streaming.StreamedWeights, "reset", lambda held: (reset(held), resets.append(not held.ring.slots))[0]
        )
        run_out_of_slots(patch, at)
        recorder = train(recipe, *settings, "memory.stream_weights=true")
    (step,) = values(recorder, "recovered", "step")
    assert resets == [True, True], "when memory had run out, and at the end"
    assert "micro-batches of 1 instead of 2 rows" in values(recorder, "recovered", "message")[0]
    plain = write_recipe(tmp_path / "device", llama)
    with monkeypatch.context() as patch:
        fail_in_step(patch, max(step, 1))
        other = train(plain, *settings)
    assert len(other.of("recovered")) == 1
    assert hashes(plain, 3) == hashes(recipe, 3)


def test_on_a_card(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes each branch of a GPU: pinned pieces, a stream of copies, events, memory that runs out."""
    recipe = write_recipe(tmp_path, llama)
    settings = (*EVERYTHING, "train.max_steps=4", "export.formats=['hf']", "export.max_kl=10")
    with rehearsal(monkeypatch, Card(total=512 * MIB)) as card:
        from qlora.export.verify import weights

        monkeypatch.setattr(weights, "reopen", lambda merge, targets: {key: [] for key in targets})
        recorder = train(recipe, *settings, "memory.stream_weights=true", 'memory.embedding="host"')
    assert values(recorder, "end", "reason") == ["finished"]
    assert card.calls["pin_memory"] and card.calls["Event.record"] and card.calls["Stream.wait_event"]
    assert not card.calls["record_stream"]
    assert list((run_dir(recipe) / "export" / "hf").glob("*.safetensors"))


def test_behind_a_run_nothing_is_held(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[HostStore] = []
    begin = HostStore.__init__

    def noted(store: HostStore, *about: Any) -> None:
        begin(store, *about)
        stores.append(store)

    monkeypatch.setattr(HostStore, "__init__", noted)
    train(write_recipe(tmp_path, llama), *EVERYTHING, "train.max_steps=1", "memory.stream_weights=true")
    assert stores and not any(store.host_bytes for store in stores)
    assert weights_of(torch.nn.Module()) is not None
