"""How fast a machine computes passes of a model: a card by its figures, this processor by a short trial.

A pass takes the arithmetic of its tokens, the unpacking of every 4-bit weight, the moving of keys and values, and what
each layer costs however small it is: some hundred operations that Python starts one by one. A card computes while
Python starts the next one, so that there the longer of both counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from qlora.memory.hardware import Machine

# Of one layer in a pass, in operations of the trial; and the share of the trial's arithmetic that products of a model's
# sizes reach between all else. By the handbook of recipes/manuals.toml, 10 of whose processor minutes were counted call
# by call: asking and answering, scores, an exam with three passages in view and training came out at 0.9 to 1.0 of what
# they took.
LAYER_OPERATIONS, HOST_SHARE = 300, 1 / 3
# Of a processor: what each token looks back at is laid out anew, and its scores are tensors.
HOST_COPIES = 8
# Of a card, by arithmetic alone: half of what is printed on it is what large products reach. A 4-bit weight is read,
# and written and read in bf16: 4.5 bytes. Keys and values are read, and written and read. Operations start in 4 µs.
CARD_SHARE, WEIGHT_BYTES, KEPT_COPIES, CARD_OPERATION_SECONDS = 0.5, 4.5, 3, 4e-6
TRIAL_SECONDS = 0.06  # of each of the four measurements
_ROWS, _WIDTH = 64, 512


@dataclass(frozen=True)
class Speed:
    """Arithmetic operations, 4-bit weights unpacked and bytes of keys and values a second; seconds of a small
    operation. `overlaps`: small operations are started while the card computes."""

    arithmetic: float
    weights: float
    kept_bytes: float
    operation_seconds: float
    overlaps: bool


@dataclass(frozen=True)
class Size:
    """Of a model: its `layers`, the `weights` of their linear ones, those of the `head`, and bytes of keys and values
    of a token in all layers."""

    layers: int
    weights: int
    head: int
    kept_bytes: int


def seconds(speed: Speed, size: Size, work: tuple[float, float, float, float]) -> float:
    """Of `work`: passes, tokens, tokens looked back at, logits (see `study/amount.py`)."""
    passes, tokens, seen, logits = work
    computed = 2 * (tokens * size.weights + logits * size.head) / speed.arithmetic
    computed += passes * size.weights / speed.weights + seen * size.kept_bytes / speed.kept_bytes
    started = passes * size.layers * LAYER_OPERATIONS * speed.operation_seconds
    return max(computed, started) if speed.overlaps else computed + started


def of_machine(machine: Machine) -> Speed:
    """Of the card that is meant; of a processor, this one's now."""
    gpu = machine.gpu
    if gpu is None:
        return of_processor()
    moved = gpu.gigabytes_per_second * 1e9
    arithmetic = CARD_SHARE * gpu.teraflops * 1e12
    return Speed(arithmetic, moved / WEIGHT_BYTES, moved / KEPT_COPIES, CARD_OPERATION_SECONDS, overlaps=True)


def of_processor() -> Speed:
    """This processor's when it has nothing else to do, measured in a quarter of a second as a run computes on it."""
    import torch
    from torch import nn

    from qlora.model.cpu_matmul import fast_matmul
    from qlora.model.four_bit_layers import set_4bit, swap_linear
    from qlora.model.nf4 import quantize_rows
    from qlora.recipe.sections import QuantizationSection

    host, quantization = torch.device("cpu"), QuantizationSection()
    plain = nn.Linear(_WIDTH, 4 * _WIDTH, bias=False)
    layer = swap_linear(nn.Sequential(plain), "0", plain, quantization)
    weight = torch.full((4 * _WIDTH, _WIDTH), 0.02, dtype=torch.bfloat16)
    weights = weight.numel()

    def read(start: int, end: int) -> torch.Tensor:
        return weight[start:end]

    quantized = quantize_rows(read, (4 * _WIDTH, _WIDTH), quantization.type, quantization.double_quant, host)
    set_4bit(layer, quantized)
    many, few = torch.ones(_ROWS, _WIDTH, dtype=torch.bfloat16), torch.ones(1, _WIDTH, dtype=torch.bfloat16)
    small, square = torch.ones(24, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    kept = torch.ones(1 << 20, dtype=torch.bfloat16)
    with torch.no_grad(), fast_matmul(host):
        product = _quickest(lambda: many @ weight.T)
        unpacked = _quickest(lambda: layer(few))
        operation = _quickest(lambda: [small @ square + small for _ in range(8)]) / 16
        copied = _quickest(lambda: kept.clone())
    return Speed(
        arithmetic=HOST_SHARE * 2 * _ROWS * weights / product,
        weights=weights / unpacked,
        kept_bytes=kept.nbytes / copied / HOST_COPIES,
        operation_seconds=operation,
        overlaps=False,
    )


def _quickest(work: Callable[[], object]) -> float:
    """Seconds of `work` when nothing comes between: the least of many, what is made once and kept left out."""
    work()
    began, least = time.perf_counter(), float("inf")
    while (since := time.perf_counter()) < began + TRIAL_SECONDS or least == float("inf"):
        work()
        least = min(least, time.perf_counter() - since)
    return max(least, 1e-9)
