"""On a GPU each promise is as `python -m qlora.prove` tries it there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qlora.device import current, is_card
from qlora.prove.proof import Place, Proof
from qlora.prove.suite import PROOFS, place_for, tried

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not is_card(current()), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with place_for("cuda", None) as made:
        yield made


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_it_is_as_promised(proof: Proof, place: Place) -> None:
    outcome = tried(proof, place)
    assert outcome.holds is not False, outcome.said
