"""What is live at each place of a step, layer by layer: the phases of a simulation, unrolled.

A simulation knows each phase at its highest layer and what a layer more adds to it (`Simulation.each`). Going up, every
layer behind leaves what it keeps; coming down, every layer behind has given it back. Of a model that recomputes its
first layers only, two simulations say both kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora.memory.recomputing import apart, layers_of_setting, saved_once
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import Simulation, Workload

LAYER_BY_LAYER = ("forward", "loss", "backward", "backward end", "update")


@dataclass(frozen=True)
class Moment:
    """Bytes by category when they are the most that they are in a layer's pass, or in a whole phase (`layer` None)."""

    phase: str
    layer: int | None
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def moments(simulator: Simulator, workload: Workload) -> list[Moment]:
    """In the order of a run: load, a study, self-check, the layers up and down, update, evaluation, answers, exam."""
    simulation, layers = simulator.run(workload), simulator.spec.layers
    rest = [name for name in simulation.phases if name not in LAYER_BY_LAYER]
    before = [name for name in ("load", "study", "selfcheck") if name in rest]
    after = [name for name in rest if name not in before]
    whole = {name: Moment(name, None, simulation.phases[name].parts) for name in (*rest, "loss", "update")}
    up, down = _unrolled(simulator, workload, simulation, layers)
    return [
        *(whole[name] for name in before),
        *up,
        whole["loss"],
        *down,
        whole["update"],
        *(whole[name] for name in after),
    ]


def _unrolled(
    simulator: Simulator, workload: Workload, simulation: Simulation, layers: int
) -> tuple[list[Moment], list[Moment]]:
    """The forward pass from the lowest layer to the highest; the backward pass below the highest, whose own is the end
    of the loss."""
    each = _Each(simulator, workload, simulation, layers)
    up = [
        _less(simulation, "forward", layer, sum(each("forward", above) for above in range(layer + 1, layers)))
        for layer in range(layers)
    ]
    down = list(_down(simulator, workload, simulation, layers))
    return up, down


def _down(simulator: Simulator, workload: Workload, simulation: Simulation, layers: int) -> Iterator[Moment]:
    count = layers_of_setting(workload.recompute, layers)
    if not workload.recomputed or len(simulator.sizes) == 1:
        step = simulation.each["backward"]
        yield from (_less(simulation, "backward", at, (layers - 2 - at) * step) for at in range(layers - 2, 0, -1))
    else:  # as `recomputing.put_together` does it: layers that kept theirs, then those that are computed again
        kept, again = map(simulator.run, apart(workload))
        differs = count * (kept.each["backward"] - again.each["backward"]) - saved_once(kept, again, layers)
        for at in range(layers - 2, max(count - 1, 0), -1):
            yield _less(kept, "backward", at, differs + (layers - 2 - at) * kept.each["backward"])
        for at in range(min(count - 1, layers - 2), 0, -1):
            yield _less(again, "backward", at, (layers - 2 - at) * again.each["backward"])
    if layers > 1 and "backward end" in simulation.phases:
        yield Moment("backward", 0, simulation.phases["backward end"].parts)


class _Each:
    """Activations that a layer adds to a phase: by what is done with that layer."""

    def __init__(self, simulator: Simulator, workload: Workload, simulation: Simulation, layers: int) -> None:
        self.first = self.rest = simulation.each
        self.count = layers_of_setting(workload.recompute, layers)
        if workload.recomputed and len(simulator.sizes) > 1:
            self.rest = simulator.run(apart(workload)[0]).each

    def __call__(self, phase: str, layer: int) -> int:
        return (self.first if layer < self.count else self.rest)[phase]


def _less(simulation: Simulation, phase: str, layer: int, activations: int) -> Moment:
    """What is kept counts as a gradient where it has the shape of one (`Simulation.each`)."""
    parts = dict(simulation.phases[phase].parts)
    for category in ("activations", "gradients"):
        taken = min(parts[category], activations)
        parts[category] -= taken
        activations -= taken
    return Moment(phase, layer, parts)
