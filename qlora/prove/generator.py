"""Random numbers follow from the recipe and the place in the run, on every device."""

from __future__ import annotations

import torch

from qlora.device import random_state_kept
from qlora.prove.proof import Outcome, Place, Proof, all_equal
from qlora.step.forward import seed_micro_batch

COUNT = 4096


def run(place: Place) -> Outcome:
    def drawn() -> torch.Tensor:
        return torch.rand(COUNT, device=place.device)

    with random_state_kept(place.device):
        seed_micro_batch(7, 3, 1)
        first = drawn()
        with random_state_kept(place.device):
            drawn()
        after = drawn()
        seed_micro_batch(7, 3, 1)
        again, next_one = drawn(), drawn()
        seed_micro_batch(7, 3, 2)
        other = drawn()
    measured = {
        "same seed, same numbers": all_equal([first], [again]),
        "drawn aside, nothing moved": all_equal([after], [next_one]),
        "another place, other numbers": not all_equal([first], [other]),
    }
    wrong = [name for name, held in measured.items() if not held]
    return Outcome(not wrong, f"not so: {', '.join(wrong)}" if wrong else f"{COUNT:,} numbers, three ways", measured)


PROOF = Proof(
    name="random numbers",
    promise="dropout and noise of a step are the same in a resumed run, whatever else was drawn",
    tolerance="0: bit for bit",
    source="step/forward.py, seed_micro_batch",
    run=run,
)
