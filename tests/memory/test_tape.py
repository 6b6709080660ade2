"""The tape of a few layers, played as often as there are layers, is the tape of all of them."""

from __future__ import annotations

import pytest

from qlora.memory import tape
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.memory.tape import BACKWARD, FORWARD, Tape
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import make_config

MIB = 1 << 20


def recorded(layers: int) -> Tape:
    """Each layer keeps a tensor from its forward pass to the end of the backward pass of its neighbour above."""
    made = Tape((), [8 * MIB] * layers)
    made.mark("begin")
    made.take(-1, 3 * MIB)
    for layer in range(layers):
        made.mark(FORWARD, layer)
        made.take(layer, 16 * MIB)
        made.take(100 + layer, 12 * MIB)
        made.give(100 + layer)
    made.mark("loss")
    made.take(1000, 64 * MIB)
    for layer in reversed(range(layers)):
        made.mark(BACKWARD, layer)
        made.take(200 + layer, 24 * MIB)
        made.take(300 + layer, MIB)  # a gradient, which lives until the update
        if layer + 1 < layers:
            made.give(200 + layer + 1)
        made.give(layer)
    made.mark("update")
    made.give(200)
    for layer in range(layers):
        made.give(300 + layer)
    made.give(1000)
    made.give(-1)
    return made


@pytest.mark.parametrize("wanted", [4, 5, 9, 40])
def test_the_tape_of_four_layers_is_that_of_more(wanted: int) -> None:
    """Bytes at the highest are equal, and everything that was taken is given back."""
    short, whole = recorded(4), recorded(wanted)
    expected = tape.play(whole, wanted, 1, wanted)
    assert tape.play(short, 4, 1, wanted, (8 * MIB,)) == expected
    live: dict[object, int] = {}
    for tensor, nbytes in tape._whole(short.events, 4, 1, wanted - 4):
        if nbytes:
            assert tensor not in live
            live[tensor] = nbytes
        else:
            del live[tensor]
    assert not live


def test_what_was_there_before_leaves_gaps() -> None:
    """A block of a size that nobody asks for again is reserved for nothing."""
    made = Tape((), [40 * MIB])
    made.mark("only")
    made.take(1, 50 * MIB)
    assert tape.play(made, 1, 1, 1).beyond == 0
    assert tape.play(Tape((30 * MIB,), made.start, made.events), 1, 1, 1).beyond == 30 * MIB


def test_a_release_of_what_lived_before_is_no_event() -> None:
    made = Tape((), [MIB])
    made.mark("only")
    made.give(5)
    assert made.events == []


@pytest.mark.parametrize("attention", ["eager", "auto"])
def test_reserved_of_a_short_model_is_that_of_the_whole(attention: str) -> None:
    """Of our own step on meta tensors, with scores and without: within 2 % of what playing all layers gives."""
    overrides = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 9, "num_attention_heads": 8}
    text = make_config("llama", vocab=8192, overrides=overrides)
    spec = ModelSpec(text, "tiny", LoraSection(r=8), QuantizationSection(), attention)
    workload = Workload(2, 512, evaluates=False)
    short, whole = (Simulator(spec, whole=whole).run(workload).reserved for whole in (False, True))
    assert short.reserved == pytest.approx(whole.reserved, rel=0.02)
    assert short.allocated == pytest.approx(whole.allocated, rel=0.02)
    assert whole.beyond > 0
