"""Levers: which a recipe leaves open, and what each is likely to save."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from qlora.memory import hardware
from qlora.memory.changes import changed
from qlora.memory.hardware import Machine
from qlora.memory.levers import EMBEDDING, HEAD, LEVERS, OFFLOAD, STREAM, Saving, free, savings
from qlora.memory.simulation import Drawn, ValueCounts, Workload
from qlora.model.weight_receiving import Place
from qlora.recipe.reading import recipe_of_base
from tests.families import make_config

GIB = 1 << 30
MOVE = next(lever for lever in LEVERS if lever.key == OFFLOAD)


def test_levers_are_open_where_the_recipe_leaves_them_so_and_there_is_a_card() -> None:
    card, host = Machine("cuda", 8 * GIB, "as given"), Machine("cpu", 8 * GIB, "RAM")
    asked = recipe_of_base("owner/name", ["train.gradient_checkpointing=auto"])
    assert MOVE in free(asked, card) and free(asked, host) == ()
    assert MOVE not in free(changed(asked, {MOVE.key: False}), card)
    assert MOVE not in free(changed(asked, {"train.gradient_checkpointing": False}), card)


def test_what_levers_are_likely_to_save() -> None:
    """Of Llama-3.1-8B at 2,048 tokens: inputs 16 MiB a layer, an embedding of 0.98 GiB, 3.35 GiB of layers in 4 bit."""
    text = make_config("llama", vocab=128_256, overrides={"hidden_size": 4096, "num_hidden_layers": 32})
    drawn = Drawn(ValueCounts(6_979_321_856, 1, 1, 1), 0)
    card = hardware.asked_for("RTX 4090", None, "auto")
    found = savings(text, Workload(1, 2048), drawn, card)
    assert found[OFFLOAD].nbytes == 30 * 16 << 20
    assert found[STREAM].nbytes == pytest.approx(3.35 * GIB * 30 / 32, rel=0.01)
    assert found[EMBEDDING].nbytes == pytest.approx(0.98 * GIB, rel=0.02)
    # 3.6 GB over 25 GB/s, each way (CUDA.md 2.3: 0.29 s for both)
    assert sum(found[STREAM].beside) == pytest.approx(0.29, rel=0.03)


def test_experts_are_of_what_streaming_saves() -> None:
    """They are no layers that "all-linear" means, and nine tenths of a mixture."""
    text, card = make_config("llama", overrides={"num_hidden_layers": 4}), hardware.asked_for("RTX 4090", None, "auto")
    without, there = (Drawn(ValueCounts(10**9, 1, 1, 1), 0, stacked_bytes=stacked) for stacked in (0, 8 * GIB))
    found = [savings(text, Workload(1, 2048), drawn, card)[STREAM] for drawn in (without, there)]
    assert found[1].nbytes - found[0].nbytes == 8 * GIB * 2 // 4
    assert found[1].beside[0] > 10 * found[0].beside[0]


def test_with_layers_and_embeddings_the_head_goes() -> None:
    """Of 0.98 GiB the two places of its blocks stay, 0.12 GiB; whichever of the two is taken second has it."""
    text = make_config("llama", vocab=128_256, overrides={"hidden_size": 4096, "num_hidden_layers": 32})
    drawn, card = Drawn(ValueCounts(6_979_321_856, 1, 1, 1), 0), hardware.asked_for("RTX 4090", None, "auto")

    def found(place: Place) -> Mapping[str, Saving]:
        return savings(text, Workload(1, 2048), drawn, card, place)

    none, streams, host = found(Place()), found(Place(streams=True)), found(Place(host_embedding=True))
    head = none[HEAD]
    assert head.nbytes == pytest.approx((0.98 - 0.125) * GIB, rel=0.01)
    # 2 x 1.05 GB over 25 GB/s, beside 6.5 TFLOP of 165 TFLOP/s
    assert head.alone == pytest.approx(2 * 1.05 / 25 - 6.46 / 165, rel=0.1)
    assert streams[EMBEDDING].nbytes == none[EMBEDDING].nbytes + head.nbytes and streams[EMBEDDING].head
    assert host[STREAM].nbytes == none[STREAM].nbytes + head.nbytes and host[STREAM].head
    assert not none[EMBEDDING].head and not streams[STREAM].head and HEAD not in streams
    small = savings(make_config("llama"), Workload(1, 2048), drawn, card)
    assert small[HEAD].nbytes == 0 and not small[EMBEDDING].with_head(small[HEAD]).head
