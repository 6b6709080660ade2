"""The kernels of experts compute what their twins do, and compile for every card that trains."""

from __future__ import annotations

import pytest

from tests.step.kernels.processes import SHARED_BYTES, fits_every_card, needs_triton, said

pytestmark = needs_triton


@pytest.mark.slow
def test_the_interpreter_gives_what_the_twins_give() -> None:
    """Forth and back, of NF4 and MXFP4, whatever the routing; in float32 to rounding, in fp16 to one step of its 11
    bits, constants and places to the bit."""
    found = said("interpreted", "experts_source")
    assert set(found) == {"torch.float32", "torch.float16"}
    for kind, kernels in found.items():
        assert kernels.pop("unnest") == kernels.pop("route") == 0
        assert len(kernels) == 8 and max(kernels.values()) <= (1e-6 if kind == "torch.float32" else 2**-10), kind


@pytest.mark.slow
def test_every_form_compiles_for_every_card_without_spilling() -> None:
    """Tiles of few and of many rows, forth and back, of NF4 and MXFP4, and what un-nests constants and sorts."""
    found = said("compiled", "experts_source", *map(str, SHARED_BYTES))
    assert len(found) == 10 * len(SHARED_BYTES)
    fits_every_card(found)
