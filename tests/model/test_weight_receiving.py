"""A model is loaded to where its recipe wants it, and never all of it on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.data.ahead import in_one_block
from qlora.data.loader import collate
from qlora.errors import ModelError
from qlora.events import Recorder, Sinks
from qlora.model import adapters, load, weight_receiving
from qlora.model.resolve import resolve
from qlora.model.weight_receiving import Place, bytes_on_device, device_of, place_by_room
from qlora.model.weight_streaming import inside
from qlora.recipe.sections import LoraSection, MemorySection, QuantizationSection
from qlora.step.forward import CausalParts, hidden_states
from qlora.step.layerwise import recomputable
from tests.card import GIB, MIB, Card, rehearsal
from tests.data.cases import split_of
from tests.families import make_base

CPU = torch.device("cpu")
NF4 = QuantizationSection()


def base_of(family: str, folder: Path, layers: int = 3, **overrides: Any) -> Path:
    return make_base(family, folder, overrides={"num_hidden_layers": layers, "layer_types": None, **overrides})


def opened(
    base: Path,
    place: Place | None,
    sink: Any = None,
    quantization: QuantizationSection = NF4,
    attention: str = "auto",
) -> Any:
    settings = (quantization, attention, CPU, sink or Sinks())
    return load.load_base(resolve(str(base), "main", Sinks()), *settings, place=place)


def test_what_is_still_auto_is_on_the_device() -> None:
    assert Place.of(MemorySection()) == Place()
    assert Place.of(MemorySection(stream_weights=True, embedding="host")) == Place(True, True)


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_no_more_than_a_layer_is_in_memory_twice(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in, whose memory is the host's as well: a layer is packed while its matrices are there."""
    base, quantization = base_of("llama", tmp_path, 12), QuantizationSection(type=kind)  # type: ignore[arg-type]
    with rehearsal(monkeypatch, Card()) as card:
        # With sdpa, of which no trial is made: what that takes, 560 KiB of any model of these heads, is not looked at.
        model = opened(base, Place(streams=True), quantization=quantization, attention="sdpa")
        held, layer = inside(model), card.highest - card.live
        assert held is not None
        # A layer's matrices, its blob, its pieces as they are pinned; and tables of codes, 2 KiB and less a matrix.
        assert layer <= 4 * held.layers[0].layout.nbytes + MIB / 32
        assert held.total_bytes == 12 * held.layers[0].layout.nbytes
        matrices = [one for layer in recomputable(model) for name, one in layer.named_parameters() if "proj" in name]
        assert len(matrices) == 12 * 7 and not any(matrix.numel() for matrix in matrices)


def test_identity_and_form_are_those_of_a_resident_model(tmp_path: Path) -> None:
    base = base_of("qwen3", tmp_path)
    resident, streamed = opened(base, Place()), opened(base, Place(True, True))
    assert streamed.base_identity == resident.base_identity
    held = inside(streamed)
    assert held is not None
    wanted = dict(resident.named_parameters())
    for number in range(3):
        with held.in_place(number):
            for name, parameter in streamed.model.layers[number].named_parameters():
                assert torch.equal(parameter, wanted[f"model.layers.{number}.{name}"]), name


def test_embeddings_on_the_host_are_said_and_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, recorder, copied = base_of("llama", tmp_path), Recorder(), list[Tensor]()
    resident, model = opened(base, Place()), opened(base, Place(host_embedding=True), recorder)
    messages = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any(one.startswith("embeddings are looked up on the host") for one in messages)
    ids = torch.arange(10)[None]

    def noted(rows: Tensor, _: Any) -> Tensor:
        copied.append(rows)
        return rows

    monkeypatch.setattr(weight_receiving.hardware, "pinned", noted)
    assert torch.equal(model.get_input_embeddings()(ids), resident.get_input_embeddings()(ids))
    assert [tuple(one.shape) for one in copied] == [(1, 10, 64)], "rows, not the table"
    table = model.get_input_embeddings().weight
    everything = list(model.parameters())
    assert bytes_on_device(model, everything) == sum(one.nbytes for one in everything) - table.nbytes
    assert device_of(model) == CPU and inside(model) is None


def test_a_scaled_embedding_keeps_its_scale(tmp_path: Path) -> None:
    """Gemma multiplies the rows by a buffer, which stays beside the table."""
    base = base_of("gemma3_text", tmp_path, tie_word_embeddings=False)
    resident, model = opened(base, Place()), opened(base, Place(host_embedding=True))
    ids = torch.arange(10)[None]
    assert torch.equal(model.get_input_embeddings()(ids), resident.get_input_embeddings()(ids))


def test_a_tied_table_stays_and_a_notice_says_so(tmp_path: Path) -> None:
    recorder = Recorder()
    model = opened(base_of("llama", tmp_path, tie_word_embeddings=True), Place(host_embedding=True), recorder)
    messages = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any("saves nothing: the head multiplies by the same table" in one for one in messages)
    assert bytes_on_device(model, model.parameters()) == sum(one.nbytes for one in model.parameters())


def test_a_table_on_the_host_is_not_trained(tmp_path: Path) -> None:
    model = opened(base_of("llama", tmp_path), Place(host_embedding=True))
    with pytest.raises(ModelError, match="embed_tokens is looked up on the host") as caught:
        adapters.attach(model, LoraSection(modules_to_save=("embed_tokens",)), 0)
    assert 'memory.embedding = "device"' in caught.value.hint


def test_a_head_that_is_trained_whole_stays_on_the_device(tmp_path: Path) -> None:
    model = opened(base_of("llama", tmp_path), Place(True, True))
    tuned = adapters.attach(model, LoraSection(modules_to_save=("lm_head",)), 0)
    assert any("lm_head" in name for name in adapters.trainable(tuned))


def test_whoever_has_planned_nothing_streams_where_there_is_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gibibyte is kept for computing; the CPU has the host's memory anyway."""
    base = base_of("llama", tmp_path)
    assert inside(opened(base, None)) is None
    for total, streams in ((2 * GIB, False), (GIB, True)):
        with rehearsal(monkeypatch, Card(total=total)):
            assert (inside(opened(base, None)) is not None) == streams
    with rehearsal(monkeypatch, Card(total=GIB)):
        falcon = opened(base_of("llama", tmp_path / "other", 1), Place())
        falcon.supports_gradient_checkpointing = False
        assert place_by_room(falcon, NF4, CPU) == Place(), "what cannot be streamed is tried as it is"


def test_a_layer_that_got_no_value_is_named(tmp_path: Path) -> None:
    model = opened(base_of("llama", tmp_path), Place())
    receiving = weight_receiving.receive(model, Place(streams=True), CPU)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.\S+ got no value while loading"):
        receiving.finish(Sinks())


@pytest.mark.parametrize("in_block", [False, True])
def test_a_micro_batch_looks_its_rows_up_by_the_ids_that_the_host_has(
    tmp_path: Path, in_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read back, for which a GPU would have to be waited for; where tokens are made there, ids are."""
    base = base_of("llama", tmp_path)
    resident, model = opened(base, Place()), opened(base, Place(host_embedding=True))
    on_host = collate(split_of([3, 2, 16]), [(0, 1), (2,)], 0, 24)
    on_host.input_ids_BS.remainder_(300)
    batch = (in_one_block(on_host, CPU) if in_block else on_host).to(CPU)
    wanted = hidden_states(CausalParts.of(resident), batch)
    read_back, cpu = list[Tensor](), Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (read_back.append(tensor), cpu(tensor))[1])
    for noise in (0.0, 5.0):
        found = hidden_states(CausalParts.of(model), batch, noise)
        assert torch.equal(found, wanted) or noise
    assert not read_back
    unknown = replace(batch, host_ids_BS=None)
    assert torch.equal(hidden_states(CausalParts.of(model), unknown), wanted)
    model(input_ids=batch.input_ids_BS)
    assert len(read_back) == 2
