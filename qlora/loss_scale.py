"""The factor that a loss is multiplied by where gradients are computed in fp16, whose smallest number is 6e-8.

The gradient is divided by it again in fp32. A power of two loses nothing both ways, so that where nothing is lost
without it, the result is the same to the bit. A gradient over fp16's range is no fault of the rows: the step is done
again at half the factor. (Micikevicius et al. 2018, section 3.2; torch.amp.GradScaler skips such a step.)
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from qlora import foreign_json, numerics

FP16 = "fp16"  # as `model.dtype` and `Numerics.dtype` call it
LARGEST = 1 << 16  # where torch.amp.GradScaler begins: beyond it lies fp16's range
GOOD_STEPS = 200  # torch.amp.GradScaler waits for 2,000, which most runs here never reach


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("a power of two")
    return value


class LossScale(foreign_json.ForeignModel):
    """The factor, and how many updates in a row it has stood for."""

    factor: Annotated[int, Field(ge=1, le=LARGEST), AfterValidator(_power_of_two)] = LARGEST
    good_steps: Annotated[int, Field(ge=0, lt=GOOD_STEPS)] = 0

    @property
    def why(self) -> str:
        """Of a step that is done again with it."""
        return f"gradient over fp16's range: the step is done again, its loss scaled by {self.factor}"


def of_new_run() -> LossScale | None:
    """What a run in fp16 begins with; None where nothing is scaled."""
    run = numerics.of_run()
    return LossScale() if run is not None and run.dtype == FP16 else None


def factor_of(scale: LossScale | None) -> int:
    return 1 if scale is None else scale.factor


def halved(scale: LossScale | None) -> LossScale | None:
    """For the same step again; None where the gradient would not become smaller."""
    return None if factor_of(scale) == 1 else LossScale(factor=factor_of(scale) // 2)


def after_update(scale: LossScale | None) -> LossScale | None:
    """With one more good step: twice as large after GOOD_STEPS of them."""
    if scale is None:
        return None
    if scale.good_steps + 1 < GOOD_STEPS:
        return LossScale(factor=scale.factor, good_steps=scale.good_steps + 1)
    return LossScale(factor=min(LARGEST, 2 * scale.factor))
