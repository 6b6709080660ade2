"""The five updates that a recipe can name, as bitsandbytes and torch compute them, over parts of flat buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qlora.third_party import import_bitsandbytes

BETAS = (0.9, 0.999)  # Adam (Kingma & Ba 2015, section 2), the default of every library of the field
EPSILON = 1e-8
LION_BETAS = (0.9, 0.99)  # Lion (Chen et al. 2023, section 3.2)
# Values of one call on a GPU: bitsandbytes' kernels count them in 32 bits (backends/cuda/ops.py: c_int32(g.numel())),
# torch's AdamW makes one temporary float32 tensor as large as the call's.
MOST_BY_KERNEL = 1 << 30
MOST_WITH_TEMPORARY = 1 << 24


@dataclass(frozen=True)
class Method:
    """`kernel` is bitsandbytes' name of the update, "" torch's AdamW; `slots` are the moments' names in a checkpoint.

    `eight_bit`: moments of all but small tensors are kept in 8 bit, with a scale for each block.
    """

    kernel: str
    slots: tuple[str, ...]
    eight_bit: bool = False

    @property
    def most_values(self) -> int:
        """How many values one call on a GPU may update; whole blocks."""
        return MOST_BY_KERNEL if self.kernel else MOST_WITH_TEMPORARY


_ADAM = ("state1", "state2")
METHODS = {
    "adamw": Method("", ("exp_avg", "exp_avg_sq")),
    "adamw_8bit": Method("adam", _ADAM, eight_bit=True),
    "paged_adamw_8bit": Method("adam", _ADAM, eight_bit=True),
    "paged_adamw_32bit": Method("adam", _ADAM),
    "lion_8bit": Method("lion", ("state1",), eight_bit=True),
}


class Values(NamedTuple):
    """Parts of equal length: float32 weights and gradients, and moments by slot: float32, or uint8 with `scales`.

    `codes` are the 256 values that a byte of the first moment means, and those of the second, which has no sign.
    """

    weights: Tensor
    gradients: Tensor
    moments: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    codes: tuple[Tensor, Tensor] | None


def update(method: Method, values: Values, step: int, learning_rate: float, weight_decay: float) -> None:
    """The `step`-th update (from 1) of these values and their moments, in place."""
    if not method.kernel:
        _adamw(values, step, learning_rate, weight_decay)
        return
    lion = method.kernel == "lion"
    beta1, beta2 = LION_BETAS if lion else BETAS
    epsilon = 0.0 if lion else EPSILON
    ops, first = torch.ops.bitsandbytes, values.moments["state1"]
    second = values.moments.get("state2")
    tensors = (method.kernel, values.gradients, values.weights, first, second)
    if values.codes is not None:
        scales = values.scales["state1"], values.scales.get("state2")
        tables = (values.codes[0], None if second is None else values.codes[1])
        before = (beta1, beta2, 0.0, 0.0, epsilon, step, learning_rate)
        ops.optimizer_update_8bit_blockwise(*tensors, *before, *tables, *scales, weight_decay, 1.0, False)
    else:
        after = (beta1, beta2, 0.0, 0.0, epsilon, weight_decay, step, learning_rate, 1.0, False)
        ops.optimizer_update_32bit(*tensors, None, 0.0, 0.0, *after)


def codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The values (256) that a byte of a moment means, with a sign and without: the same in every run."""
    dynamic = import_bitsandbytes().functional.create_dynamic_map
    return dynamic(signed=True).to(device), dynamic(signed=False).to(device)


def _adamw(values: Values, step: int, learning_rate: float, weight_decay: float) -> None:
    """torch/optim/adam.py, _single_tensor_adam with decoupled weight decay, its operations in its order."""
    weights, gradients = values.weights, values.gradients
    mean, square = values.moments["exp_avg"], values.moments["exp_avg_sq"]
    if weight_decay:
        weights.mul_(1 - learning_rate * weight_decay)
    mean.lerp_(gradients, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
    divisor = square.sqrt().div_((1 - BETAS[1] ** step) ** 0.5).add_(EPSILON)
    weights.addcdiv_(mean, divisor, value=-(learning_rate / (1 - BETAS[0] ** step)))
