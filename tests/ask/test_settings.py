"""Settings have bounds, by option, by `/set` and by request alike."""

from __future__ import annotations

import pytest

from qlora.ask.settings import BOUNDS, NAMES, Sampling, changed, changed_by_text
from qlora.errors import UserError


def test_each_setting_has_bounds_and_its_default_lies_in_them() -> None:
    assert set(BOUNDS) == set(NAMES)
    assert changed(Sampling(), **{name: getattr(Sampling(), name) for name in NAMES}) == Sampling()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_out_of_bounds_is_refused_by_name(name: str) -> None:
    for value in (BOUNDS[name][0] - 1, BOUNDS[name][1] * 2 + 1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=name):
            changed(Sampling(), **{name: value})


def test_what_is_typed_is_read_as_its_kind() -> None:
    sampling = changed_by_text(Sampling(), "temperature", "0.5")
    assert sampling.temperature == 0.5 and changed_by_text(sampling, "top_k", "40").top_k == 40
    seeded = changed_by_text(sampling, "seed", "7")
    assert seeded.seed == 7 and changed_by_text(seeded, "seed", "none").seed is None
    for name, text in (("top_k", "1.5"), ("temperature", "warm"), ("beams", "4"), ("max_tokens", "")):
        with pytest.raises(UserError):
            changed_by_text(Sampling(), name, text)
