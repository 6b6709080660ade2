"""What tests of proofs share: a place with a tiny shape, and whether a proof holds there."""

from __future__ import annotations

from pathlib import Path

import torch

from qlora.prove.proof import Outcome, Place, Proof
from qlora.prove.shapes import Shape

TINY = Shape("tiny", 64, 128, 2, 4, 2, 16, 256, False, 0)


def place(folder: Path, rows: int = 2, length: int = 64) -> Place:
    return Place(torch.device("cpu"), TINY, folder, rows, length)


def holds(proof: Proof, folder: Path) -> Outcome:
    """The outcome of a proof that holds on this machine."""
    outcome = proof.run(place(folder))
    assert outcome.holds is True, outcome.said
    return outcome


def broken(proof: Proof, folder: Path) -> Outcome:
    """The outcome of a proof that does not."""
    outcome = proof.run(place(folder))
    assert outcome.holds is False, outcome.said
    return outcome
