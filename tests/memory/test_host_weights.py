"""The estimate of a run whose weights come and go: from the same holder, on meta."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora import api
from qlora.memory import links
from qlora.memory.estimate import Estimate, Estimator
from qlora.memory.hardware import asked_for
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.model.meta_model import text_config
from qlora.model.weight_receiving import Place
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.memory.cases import GIB, NAMES, ask
from tests.memory.shapes import SHAPES, config_folder

ON_HOST = ("memory.stream_weights=true", 'memory.embedding="host"')
HELD = ("train.gradient_checkpointing=true", "memory.offload_activations=false")
RESIDENT = ("memory.stream_weights=false", 'memory.embedding="device"')
EIGHT: dict[str, Any] = SHAPES[NAMES[8]]
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # values of its matrices
TABLE_BYTES = 128_256 * 4096 * 2


def simulator(place: Place, **overrides: Any) -> Simulator:
    small = {**EIGHT, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    text, _ = text_config({**small, "vocab_size": 1024, **overrides}, "small")
    return Simulator(ModelSpec(text, "small", LoraSection(), QuantizationSection(), place=place))


def test_a_layer_more_takes_host_memory_and_two_places_stay() -> None:
    """Weights on the device: the head, the norms and what else stays of a layer, and twice the largest blob."""
    kept, host = [], []
    for layers in (8, 16):
        streamed = simulator(Place(True, True), num_hidden_layers=layers)
        kept.append(streamed.run(Workload(1, 128)).kept["weights"])
        host.append(streamed.drawn.host_bytes)
    blob = (host[1] - host[0]) / 8
    assert 0.51 < blob / (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 512) < 0.54, "4 bit and constants"
    assert host[0] == 8 * blob + 1024 * 256 * 2
    assert (kept[1] - kept[0]) / 8 < 25_000, "norms, tables and offsets, each at a multiple of 512 bytes"
    resident = simulator(Place(), num_hidden_layers=16).run(Workload(1, 128)).kept["weights"]
    assert resident - kept[1] == pytest.approx(14 * blob + 1024 * 256 * 2, rel=0.02)


def test_two_sizes_give_what_the_whole_model_gives() -> None:
    place, workload = Place(True, True), Workload(1, 256)
    text = simulator(place, num_hidden_layers=9).spec.text
    spec = ModelSpec(text, "small", LoraSection(), QuantizationSection(), place=place)
    drawn, whole = Simulator(spec), Simulator(spec, whole=True)
    one, other = drawn.run(workload), whole.run(workload)
    for name, peak in one.phases.items():
        assert peak.parts["weights"] == other.phases[name].parts["weights"], name
        assert peak.total == pytest.approx(other.phases[name].total, rel=0.001), name
    assert drawn.drawn.host_bytes == whole.drawn.host_bytes


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Estimate, Estimate]]:
    """8B, rank 16, resident and streamed, by the length of a row."""
    found, folder = {}, tmp_path_factory.mktemp("shapes")
    for length in (2048, 8192, 32768):
        settings = (f"data.max_length={length}", "eval.samples=0", *HELD)
        found[length] = (
            ask(folder, 8, *settings, *RESIDENT, gpu="RTX 4090"),
            ask(folder, 8, *settings, *ON_HOST, gpu="RTX 4090"),
        )
    return found


def test_8b_streamed_is_five_gibibytes_less(eight: dict[int, tuple[Estimate, Estimate]]) -> None:
    """30 of 32 layers and both tables. What is left at 2,048 / 8,192 / 32,768 tokens is two layers, the adapters'
    state, the layers' inputs (0.5 / 2 / 8, which `memory.offload_activations` moves) and one live layer."""
    for length, most in ((2048, 1.70), (8192, 4.15), (32768, 14.35)):
        resident, streamed = eight[length]
        saved = resident.tensor_bytes - streamed.tensor_bytes
        assert saved == pytest.approx(30 * LAYER * 0.516 + 2 * TABLE_BYTES, rel=0.02), length
        assert streamed.tensor_bytes <= most * GIB, length
        assert streamed.phases["load"] < resident.phases["load"] - 4 * GIB, "never is all of it on the device"
        on_host = streamed.host_peak_bytes - resident.host_peak_bytes
        assert on_host == pytest.approx(32 * LAYER * 0.516 + 2 * TABLE_BYTES, rel=0.01), length
        assert streamed.settings["memory.stream_weights"] is True and streamed.settings["memory.embedding"] == "host"


@pytest.mark.parametrize(
    ("name", "vram"),
    [(NAMES[8], "4GiB"), ("Qwen/Qwen3-32B", "8GiB"), (NAMES[70], "16GiB")],
    ids=["8B in 4 GiB", "32B in 8 GiB", "70B in 16 GiB"],
)
def test_what_a_card_has_no_room_for_fits_streamed(name: str, vram: str, tmp_path: Path) -> None:
    folder = config_folder(name, tmp_path)
    settings = ("data.max_length=2048", "train.gradient_checkpointing=true")
    streamed = api.question(api.recipe_or_model(str(folder), (*settings, *ON_HOST)), vram=vram).estimate()
    assert streamed.fits
    resident = api.question(api.recipe_or_model(str(folder), (*settings, *RESIDENT)), vram=vram).estimate()
    assert not resident.fits


def test_without_a_gpu_the_host_is_the_device() -> None:
    """The blobs are in the same memory, and the two places come on top of them."""
    kept = []
    for place in (Place(), Place(True, True)):
        made = simulator(place, num_hidden_layers=6)
        made = Simulator(replace(made.spec, target="cpu"))
        kept.append(made.run(Workload(1, 64)).kept["weights"])
        blob = (made.drawn.host_bytes - 1024 * 256 * 2) / 6
    assert kept[0] < kept[1] == pytest.approx(kept[0] + 2 * blob, rel=0.01)


def test_other_stacks_stream_nothing(tmp_path: Path) -> None:
    plain = ask(tmp_path, 8, *ON_HOST, gpu="RTX 4090", stack="plain")
    assert plain.components["weights"] > 5 * GIB


def test_what_ram_has_no_room_for_is_read_from_the_disk(tmp_path: Path) -> None:
    """All layers are then: two of them wait in RAM, and each pass takes as long as the disk needs for all."""
    folder, settings = config_folder(NAMES[8], tmp_path), ("data.max_length=2048", "eval.samples=0", *ON_HOST)
    layers = 32 * LAYER * 0.516

    def estimate(free: int, *more: str) -> Estimate:
        recipe = api.recipe_or_model(str(folder), (*settings, *more))
        machine = replace(asked_for("RTX 4090", None, "auto"), host_bytes=free)
        text, name = text_config(EIGHT, "8B")[0], "8B"
        return Estimator(text, name, machine).estimate(recipe)

    held, read, refused = estimate(6 * GIB), estimate(4 * GIB), estimate(3 * GIB, "memory.cache=false")
    assert held.waiting_bytes == pytest.approx(layers + 2 * TABLE_BYTES, rel=0.01)
    assert read.waiting_bytes == pytest.approx(layers / 16 + 2 * TABLE_BYTES, rel=0.01)
    assert refused.waiting_bytes == held.waiting_bytes
    assert held.fits_host and read.fits_host and not refused.fits_host
    assert held.host_peak_bytes - read.host_peak_bytes == held.waiting_bytes - read.waiting_bytes
    assert held.speed is not None and read.speed is not None
    assert read.speed.up == pytest.approx(layers / links.DISK_BYTES_PER_SECOND, rel=0.01)
    assert read.speed.down >= 0.99 * read.speed.up > held.speed.up
