"""The factor of the loss in fp16: a power of two, halved where a gradient is over the range, then doubled again."""

from __future__ import annotations

import pytest

from qlora import foreign_json, loss_scale, numerics
from qlora.loss_scale import GOOD_STEPS, LARGEST, LossScale
from qlora.numerics import Numerics


def test_only_a_run_in_fp16_has_one() -> None:
    assert loss_scale.of_new_run() is None
    with numerics.in_force(Numerics(dtype="bf16")):
        assert loss_scale.of_new_run() is None
    with numerics.in_force(Numerics(dtype="fp16")):
        assert loss_scale.of_new_run() == LossScale(factor=LARGEST)
    assert loss_scale.factor_of(None) == 1 and loss_scale.halved(None) is None
    assert loss_scale.after_update(None) is None


def test_it_is_halved_down_to_1() -> None:
    scale: LossScale | None = LossScale(good_steps=7)
    seen = []
    while scale is not None:
        seen.append(scale.factor)
        last, scale = scale, loss_scale.halved(scale)
        assert scale is None or scale.good_steps == 0
    assert seen == [1 << power for power in range(16, -1, -1)] and last.factor == 1


def test_it_doubles_after_good_steps_and_ends_where_it_began() -> None:
    scale: LossScale | None = LossScale(factor=LARGEST // 2)
    factors = []
    for _ in range(2 * GOOD_STEPS):
        scale = loss_scale.after_update(scale)
        factors.append(loss_scale.factor_of(scale))
    assert factors == [LARGEST // 2] * (GOOD_STEPS - 1) + [LARGEST] * (GOOD_STEPS + 1)


@pytest.mark.parametrize("factor", [0, 3, -2, 2 * LARGEST, 1.5])
def test_what_is_no_power_of_two_is_not_read(factor: float) -> None:
    with pytest.raises(foreign_json.ForeignFileError, match="factor"):
        foreign_json.checked(LossScale, {"factor": factor}, "state")
