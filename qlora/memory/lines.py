"""What a whole model takes, by what two short ones take: bytes go up in a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora.memory.simulation import Simulation
from qlora.memory.trace import CATEGORIES, Peak


@dataclass(frozen=True)
class Line:
    """What is the case at `wanted`, by what was found at `first` and at `second`: bytes go up in a line."""

    first: int
    second: int
    wanted: int

    def at(self, first: int, second: int) -> int:
        more = (self.second - self.first) or 1
        return round(second + (second - first) / more * (self.wanted - self.second))

    def simulation(self, first: Simulation, second: Simulation) -> Simulation:
        phases = {}
        for name, peak in second.phases.items():
            other = first.phases[name]
            # The allocator's own figures go up in steps, not in a line: what the second had is not made less.
            slack = max(peak.slack, self.at(other.slack, peak.slack))
            reserved = max(peak.reserved, self.at(other.reserved, peak.reserved))
            phases[name] = Peak(self._all_categories(other.parts, peak.parts), slack, reserved)
        kept = self._all_categories(first.kept, second.kept)
        paged, held = self.at(first.paged, second.paged), self.at(first.held, second.held)
        pinned = self.at(first.pinned, second.pinned)
        more = (second.first, held, pinned, second.work)
        return Simulation(phases, kept, paged, second.reserved, second.each, *more)

    def each(self, first: Simulation, second: Simulation) -> dict[str, int]:
        """Activations of each phase that one more adds."""
        more = (self.second - self.first) or 1
        now = {name: activations_of(peak.parts) for name, peak in second.phases.items()}
        return {name: round((now[name] - activations_of(peak.parts)) / more) for name, peak in first.phases.items()}

    def _all_categories(self, first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
        return {key: max(0, self.at(first[key], second[key])) for key in CATEGORIES}


def activations_of(parts: Mapping[str, int]) -> int:
    """With gradients, as which x A' counts where there are as many tokens as a layer is wide."""
    return parts["activations"] + parts["gradients"]
