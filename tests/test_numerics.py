"""What a run's numbers depend on: known while it runs, and each difference named once."""

from __future__ import annotations

import pytest

from qlora import foreign_json, numerics
from qlora.numerics import Numerics

NAMES = tuple(Numerics.model_fields)


def numbers(*values: object) -> Numerics:
    return Numerics(**dict(zip(NAMES, values, strict=True)))  # type: ignore[arg-type]


WHOLE = numbers(
    "A card", "8.9", 4, True, "qlora_sdpa", 128, 512, 8192, "peft", "fp32", 1024, 767, False, "bf16", "torch"
)
OTHER = numbers("B card", "9.0", 8, False, "eager", 130, 384, 0, "own", "bf16", 256, 384, True, "fp16", "kernel")


def test_what_is_decided_is_known_until_the_run_ends() -> None:
    assert numerics.of_run() is None
    with pytest.raises(KeyError), numerics.in_force(WHOLE):
        assert numerics.of_run() is WHOLE
        numerics.correct(OTHER)
        assert numerics.of_run() is OTHER
        raise KeyError
    assert numerics.of_run() is None


@pytest.mark.parametrize("name", NAMES)
def test_each_difference_is_named_with_both_values(name: str) -> None:
    changed = WHOLE.model_copy(update={name: getattr(OTHER, name)})
    (said,) = numerics.differences(WHOLE, changed)
    before, after = (str(getattr(one, name)) for one in (WHOLE, OTHER))
    shown = (before.lower(), after.lower()) if name in ("deterministic", "compiled") else (before, after)
    assert said.endswith(f" {shown[0]} (now {shown[1]})")
    assert numerics.differences(WHOLE, WHOLE) == []
    assert (
        numerics.differences(WHOLE.model_copy(update={name: None}), WHOLE) == []
    )  # an older version did not record it


def test_what_was_saved_is_read_back_and_bounded() -> None:
    assert foreign_json.checked(Numerics, {**WHOLE.model_dump(), "of a newer version": 1}, "state") == WHOLE
    with pytest.raises(foreign_json.ForeignFileError, match="device is wrong"):
        foreign_json.checked(Numerics, {"device": "x" * 1000}, "state")
