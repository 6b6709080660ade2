"""A whole model by two short ones."""

from __future__ import annotations

from qlora.memory import tape
from qlora.memory.lines import Line, activations_of
from qlora.memory.simulation import Simulation
from qlora.memory.trace import CATEGORIES, Peak


def of(count: int, slack: int) -> Simulation:
    parts = dict.fromkeys(CATEGORIES, 0) | {"activations": count, "gradients": 1}
    return Simulation({"load": Peak(parts, slack, slack)}, parts, count, tape.Reserved(2, 1), {"load": 0})


def test_bytes_go_up_in_a_line_and_what_goes_up_in_steps_is_not_made_less() -> None:
    line = Line(3, 4, 10)
    whole = line.simulation(of(30, 8), of(40, 6))
    assert whole.phases["load"].parts["activations"] == whole.kept["activations"] == whole.paged == 100
    assert whole.phases["load"].slack == 6, "going down by 2 a layer"
    assert line.each(of(30, 8), of(40, 6)) == {"load": 10} and activations_of({"activations": 3, "gradients": 2}) == 5
