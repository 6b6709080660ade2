"""A layer that two processes hold a half of each, gathered to be computed: the bits, and what each of them has."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import gathering
from qlora.errors import ModelError
from qlora.gathering import Gathers, part_bytes
from qlora.memory.simulation import Workload
from qlora.model.layer_blobs import LayerWeights
from qlora.model.weight_receiving import Place, bytes_on_device
from qlora.model.weight_sharding import ShardStore
from qlora.model.weight_streaming import SLOTS, inside
from qlora.processes import Place as Rank
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward
from qlora.step.layerwise import recomputable
from qlora.step.loss import SupervisedObjective
from tests import mixtures
from tests.card import Card, rehearsal
from tests.families import GEMMA3N, make_base
from tests.memory.counted import real_batch
from tests.model.streamed import base_of, poison, step, tuned
from tests.sharing import share

SHARED = Place(shards=2)
PLAIN = QuantizationSection(type="none")


def digest(tensors: list[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def loaded(gathers: Gathers, base: Path, *about: Any) -> Any:
    with gathering.loading(2, None):
        return tuned(base, SHARED, *about)


def stepped(model: Any, micro_batches: int) -> str:
    loss, gradients = step(model, micro_batches)
    return digest([loss, *gradients.values()])


def shared_step(base: Path, micro_batches: int, gathers: Gathers, *about: Any) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        model = loaded(gathers, base, *about)
        with gathers.session():
            found = stepped(model, micro_batches)
        held = inside(model)
        assert held is not None and isinstance(held.store, ShardStore)
        whole, parts = held.total_bytes, held.store.device_bytes
        said = {"found": found, "whole": whole, "parts": parts, "sent": held.ring.sent, "gathered": gathers.gathered}
        said["counted"] = bytes_on_device(model, []) == parts + SLOTS * held.ring.nbytes
        held.close()
    return said | {"left": held.store.device_bytes, "slots": len(held.ring.slots), "holder": gathers.holder is None}


KINDS: dict[str, tuple[LoraSection, QuantizationSection]] = {
    "4 bit": (LoraSection(r=4, dropout=0.1), QuantizationSection()),
    "ours, 16 bit": (LoraSection(r=4), PLAIN),
    "DoRA": (LoraSection(r=4, use_dora=True), QuantizationSection(double_quant=False)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_whole_layers_for_ranks_with_unequal_work(kind: str, tmp_path: Path) -> None:
    """Rank 0 has three micro-batches, rank 1 one: each gradient is a resident model's, from poisoned places."""
    base = base_of("llama", tmp_path)
    works = [partial(_shared_step, base, count, KINDS[kind]) for count in (3, 1)]
    ended, given = share(tmp_path, *works, seconds=60.0)
    assert ended.codes == [0, 0], ended.said
    for count, one in zip((3, 1), given, strict=True):
        assert one["found"] == stepped(tuned(base, Place(), *KINDS[kind]), count)
        assert one["whole"] / 2 <= one["parts"] <= one["whole"] / 2 + 4 * 32, "a half of each of four layers"
        assert one["counted"] and (one["left"], one["slots"], one["holder"]) == (0, 0, True)
    # Both gather what either wants, and what both want once.
    assert given[0]["gathered"] == given[1]["gathered"] >= given[0]["sent"] > given[1]["sent"]


def _shared_step(base: Path, count: int, about: Any, gathers: Gathers) -> dict[str, Any]:
    return shared_step(base, count, gathers, *about)


def test_a_mixture_of_experts_is_shared_too(tmp_path: Path) -> None:
    base = mixtures.make_base("qwen3_moe", tmp_path)
    works = [partial(_shared_step, base, 1, ()) for _ in range(2)]
    ended, given = share(tmp_path, *works, seconds=60.0)
    assert ended.codes == [0, 0], ended.said
    assert {one["found"] for one in given} == {stepped(tuned(base, Place()), 1)}


def peak(base: Path, place: Place, gathers: Gathers | None) -> list[int]:
    """Live bytes at most while the base is loaded, and in a step, by the stand-in's allocator: what is on the host for
    a moment is among them."""
    with pytest.MonkeyPatch.context() as patch, rehearsal(patch, Card()) as card:
        with gathering.loading(place.shards, None):
            model = tuned(base, place, LoraSection(r=1, target_modules=["q_proj"]), PLAIN, "sdpa")
        loading, card.highest = card.highest, card.live
        causal_lm, batch = model.get_base_model(), real_batch(Workload(1, 16), 384)
        with gathers.session() if gathers is not None else nullcontext():
            forward_backward(CausalParts.of(causal_lm), batch, SupervisedObjective(), 9.0, 0.0)
        return [loading, card.highest]


@pytest.mark.slow
def test_a_rank_needs_at_most_0_6_of_what_one_process_needs(tmp_path: Path) -> None:
    """Half of 48 layers and two of them are 0.54. In 16 bit: tables of codes stay with each matrix in 4 bit, 2 KiB of a
    GPU's allocator, which is much of one of these and nothing of one of 8 MiB."""
    small = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 48, "layer_types": None}
    base = make_base("llama", tmp_path / "base", overrides=small)
    one = peak(base, Place(), None)
    ended, given = share(tmp_path, *[partial(peak, base, SHARED)] * 2, seconds=60.0)
    assert ended.codes == [0, 0], ended.said
    for ranks in given:
        assert 0.5 < max(ranks) / max(one) <= 0.6, (ranks, one)
        assert all(most / whole <= 0.6 for most, whole in zip(ranks, one, strict=True)), (ranks, one)


def test_what_is_streamed_not_is_shared_not(tmp_path: Path) -> None:
    base = make_base("gemma3n_text", tmp_path / "base", overrides=GEMMA3N)

    def load(gathers: Gathers) -> Any:
        with pytest.raises(ModelError, match=r"memory\.shard_weights: .*its layers share keys and values") as caught:
            loaded(gathers, base)
        return caught.value.hint

    assert share(tmp_path, load, load)[1] == ["set memory.shard_weights = false, or use another base"] * 2


def test_parts_one_behind_the_other_are_the_blob(tmp_path: Path) -> None:
    layer = recomputable(tuned(base_of("llama", tmp_path), Place()).get_base_model())[0]
    weights, parts = LayerWeights(layer), []
    blob = weights.pack()
    for rank in range(3):
        gathers = Gathers(type("Wires", (), {"place": Rank(rank, 3)})(), lambda: None, 1.0, 1.0)  # type: ignore[arg-type]
        store = ShardStore(1, torch.device("cpu"), gathers)
        store.put(0, weights)
        parts.append(store.part(0))
        assert store.device_bytes == part_bytes(len(blob), 3) and store.host_bytes == 0
    whole = torch.cat(parts)
    assert torch.equal(whole[: len(blob)], blob) and not whole[len(blob) :].any()
