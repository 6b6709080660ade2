"""What is live layer by layer, against the whole model simulated and looked at in each layer."""

from __future__ import annotations

from itertools import pairwise

import pytest

from qlora.memory.layer_profile import moments
from qlora.memory.lines import activations_of
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.families import make_config

SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 9, "layer_types": None}
SPEC = ModelSpec(make_config("llama", vocab=512, overrides=SHAPE), "llama", LoraSection(r=8), QuantizationSection())


@pytest.fixture(scope="module")
def simulator() -> Simulator:
    return Simulator(SPEC)


@pytest.mark.parametrize("recomputed", [0, 4, -1])
def test_the_highest_of_all_is_the_peak_and_no_phase_is_left_out(recomputed: int, simulator: Simulator) -> None:
    workload = Workload(1, 192, recomputed >= 0, recomputed=max(0, recomputed))
    found, simulation = moments(simulator, workload), simulator.run(workload)
    assert max(one.total for one in found) == simulation.worst.total
    assert [one.layer for one in found if one.phase == "forward"] == list(range(9))
    assert [one.layer for one in found if one.phase == "backward"] == [*range(7, -1, -1)]
    phases = {one.phase for one in found} | {"backward end"}
    assert phases == set(simulation.phases)
    for phase in ("forward", "backward"):
        highest = max(one.total for one in found if one.phase == phase)
        ends = [simulation.phases[name].total for name in (phase, f"{phase} end") if name in simulation.phases]
        assert highest == max(ends)


def test_each_layer_is_what_a_model_of_so_many_layers_has_there(simulator: Simulator) -> None:
    """Going up, a layer knows nothing of those above it but their weights: 6 layers stand for the lower 6 of 9."""
    lower = ModelSpec(
        make_config("llama", vocab=512, overrides={**SHAPE, "num_hidden_layers": 6}),
        "llama",
        SPEC.lora,
        SPEC.quantization,
    )
    workload = Workload(1, 192, False)
    whole = {one.layer: one for one in moments(simulator, workload) if one.phase == "forward"}
    part = Simulator(lower, whole=True).run(workload).phases["forward"].parts
    assert activations_of(whole[5].parts) == pytest.approx(activations_of(part), rel=0.01)
    kept = [activations_of(whole[layer].parts) for layer in range(9)]
    assert kept == sorted(kept) and kept[8] - kept[7] == kept[1] - kept[0]


def test_of_layers_that_are_recomputed_the_others_add_more(simulator: Simulator) -> None:
    found = moments(simulator, Workload(1, 192, recomputed=4))
    up = [activations_of(one.parts) for one in found if one.phase == "forward"]
    adds = [later - earlier for earlier, later in pairwise(up)]
    assert len(set(adds[:3])) == 1 == len(set(adds[3:])) and adds[3] > 5 * adds[0]
    down = [activations_of(one.parts) for one in found if one.phase == "backward"]
    given = [earlier - later for earlier, later in pairwise(down)]
    assert given[0] > 5 * given[-2] > 0
