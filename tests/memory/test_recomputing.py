"""Some of the layers recomputed: the setting, and what it takes, against the whole model simulated with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora.memory.recomputing import layers_of_setting, more, of_model, share
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.recipe.sections import LoraSection, QuantizationSection
from qlora.step import offload
from tests.families import make_config

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 9, "layer_types": None}


def spec_of(family: str, **overrides: object) -> ModelSpec:
    text = make_config(family, vocab=512, overrides={**SHAPE, **overrides})
    return ModelSpec(text, family, LoraSection(r=8), QuantizationSection())


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize(
    ("family", "layers"),
    [("llama", 7), pytest.param("gemma2", 10, marks=pytest.mark.every)],
)
def test_a_part_is_what_the_whole_model_takes_with_it(
    family: str, layers: int, offloads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak within 0.5 %, of few, half and nearly all layers; lower phases within 2."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(offload, "BLOCK_BYTES", 1 << 16)
    spec = spec_of(family, num_hidden_layers=layers)
    short, whole = Simulator(spec), Simulator(spec, whole=True)
    assert len(short.sizes) == 2 and whole.sizes == [layers]
    highest = []
    for count in (1, 4, layers - 1):
        workload = Workload(1, 256, recomputed=count, evaluates=False, offloads=offloads)
        found, full = short.run(workload), whole.run(workload)
        for phase, within in (("forward", 0.02), ("loss", 0.005), ("backward", 0.02), ("backward end", 0.01)):
            assert found.phases[phase].total == pytest.approx(full.phases[phase].total, rel=within), (count, phase)
        assert found.worst.total == pytest.approx(full.worst.total, rel=0.005), count
        assert found.pinned == full.pinned == offloads * count * 256 * 256 * 2, count
        highest.append(found.worst.total)
    assert highest == sorted(highest, reverse=True)
    none, every = (
        short.run(Workload(1, 256, gradient_checkpointing=on, offloads=offloads)).worst.total for on in (False, True)
    )
    assert none > highest[0] and highest[-1] >= every


def test_to_recompute_the_first_layers_takes_less_than_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest layers have given theirs back when one is computed again: by more than a layer keeps in the backward
    pass; the peak of the whole step has the logits on top, both ways."""
    from qlora.step import layerwise

    spec, workload = spec_of("llama", num_hidden_layers=4), Workload(1, 1024, recomputed=2, evaluates=False)
    first = Simulator(spec, whole=True).run(workload)
    ordered = layerwise.recomputable
    monkeypatch.setattr(layerwise, "recomputable", lambda model: ordered(model)[::-1])
    last = Simulator(spec, whole=True).run(workload)
    kept, recomputed = (
        Simulator(spec, whole=True).run(replace(workload, gradient_checkpointing=on, recomputed=0)).phases["backward"]
        for on in (False, True)
    )
    assert last.worst.total > first.worst.total
    a_layer = (kept.total - recomputed.total) / 4
    assert last.phases["backward"].total - first.phases["backward"].total > a_layer


def test_what_a_setting_means() -> None:
    assert [layers_of_setting(one, 8) for one in (False, True, 1, 7, 20)] == [0, 8, 1, 7, 8]
    steps, setting = [], more(False, 24)
    while setting is not None:
        steps.append(setting)
        setting = more(setting, 24)
    assert steps == [6, 12, True] and steps[-1] is True
    assert more(False, 0) is True and more(False, 1) is True and more(1, 2) is True and more(24, 24) is None
    assert more(3, 0) is None, "of a model that says nothing, a number stands for all"


def test_more_layers_than_a_model_has_are_all() -> None:
    assert of_model(Workload(1, 8, recomputed=4), 4) == Workload(1, 8) == of_model(Workload(1, 8), 4)
    assert of_model(Workload(1, 8, recomputed=3), 4).recompute == 3
    shares = [share(one, 4) for one in (Workload(1, 8, recomputed=1), Workload(1, 8), Workload(1, 8, False))]
    assert shares == [0.25, 1, 0]
    assert Workload(1, 8).recompute is True and Workload(1, 8, False).recompute is False
