"""The kernels compute what their twins do, and compile for every card that trains: both in processes of their own."""

from __future__ import annotations

import pytest

from tests.step.kernels.processes import SHARED_BYTES, fits_every_card, needs_triton, said

pytestmark = needs_triton


@pytest.mark.slow
def test_the_interpreter_gives_what_the_twins_give() -> None:
    """In float32 to rounding, in fp16 to one step of its 11 bits; dequantizing to the bit."""
    found = said("interpreted", "source")
    assert set(found) == {"torch.float32", "torch.float16"}
    for kind, kernels in found.items():
        assert kernels.pop("dequantize") == 0
        assert len(kernels) == 25 and max(kernels.values()) <= (1e-6 if kind == "torch.float32" else 2**-10), kind


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card_without_spilling() -> None:
    found = said("compiled", "source", *map(str, SHARED_BYTES))
    assert len(found) == 9 * len(SHARED_BYTES)
    fits_every_card(found)
