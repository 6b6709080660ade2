"""What is simulated, in numbers: documents of a row, and which phase of a run is the highest."""

from __future__ import annotations

import pytest

from qlora.memory import tape
from qlora.memory.simulation import Simulation, Workload
from qlora.memory.trace import CATEGORIES, Peak


@pytest.mark.parametrize(
    ("workload", "lengths"),
    [
        (Workload(1, 100), (50, 50)),
        (Workload(2, 1000), (333, 333, 334) * 2),
        (Workload(1, 1000, documents=4), (250,) * 4),
        (Workload(2, 1000, packed=False), (1000, 1000)),
        (Workload(1, 3, documents=9), (1, 1, 1)),
    ],
)
def test_a_row_is_full_of_documents(workload: Workload, lengths: tuple[int, ...]) -> None:
    assert workload.document_lengths == lengths


def test_the_highest_phase_of_those_that_took_place() -> None:
    def peak(weights: int) -> Peak:
        return Peak({**dict.fromkeys(CATEGORIES, 0), "weights": weights}, 0, weights)

    found = Simulation({"load": peak(3), "update": peak(2), "study": peak(5)}, {}, 0, tape.Reserved(5, 5), {})
    assert found.worst.total == 5 and found.peak_of(("load", "evaluate", "update")).total == 3
