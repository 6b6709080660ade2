"""Tokens a second beside what this device could do at best, by its own matmul and memory as measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from qlora import device as hardware
from qlora.memory.hardware import Gpu
from qlora.memory.simulate import Simulator
from qlora.memory.simulation import ModelSpec, Workload
from qlora.memory.throughput import ideal_tokens_per_second
from qlora.model.cpu_matmul import fast_matmul
from qlora.prove.model import make, packed
from qlora.prove.proof import Figure, Outcome, Place, Proof
from qlora.prove.shapes import config_of
from qlora.recipe.sections import LoraSection, QuantizationSection

STEPS = 4  # timed, after one that is not
TRIES = 5
FASTER = 1.1  # than the ideal line: more means that the line or the clock is wrong


def run(place: Place) -> Outcome:
    teraflops, bandwidth = _teraflops(place), _gigabytes_per_second(place)
    ideal = _ideal(place, teraflops, bandwidth)
    hardware.release(place.device)
    batch = packed(1, place.length, place.shape.vocabulary)
    with make(place.shape, place.device) as made, fast_matmul(place.device):
        seconds = [_timed(place.device, lambda: made.step(batch)) for _ in range(STEPS + 1)][1:]
    tokens = batch.tokens / statistics.median(seconds)
    measured: dict[str, Figure] = {
        "tokens_per_second": round(tokens, 1),
        "ideal_tokens_per_second": round(ideal, 1),
        "share_of_ideal": round(tokens / ideal, 4),
        "matmul_teraflops": round(teraflops, 3),
        "copy_gigabytes_per_second": round(bandwidth, 1),
    }
    said = f"{tokens:,.0f} tokens a second, {tokens / ideal:.0%} of the ideal {ideal:,.0f} "
    said += f"({teraflops:.2f} TFLOP/s by a matmul, {bandwidth:,.0f} GB/s by a copy)"
    return Outcome(0 < tokens <= FASTER * ideal, said, measured)


def _ideal(place: Place, teraflops: float, bandwidth: float) -> float:
    text = config_of(place.shape)
    spec = ModelSpec(text, place.shape.name, LoraSection(), QuantizationSection())
    card = Gpu(place.shape.name, 0, 0, bandwidth, teraflops, 80)
    return ideal_tokens_per_second(
        text, Workload(1, place.length, True, "adamw_8bit"), Simulator(spec).drawn.values, card
    )


def _teraflops(place: Place) -> float:
    """Of a bf16 product of square matrices, 2 n³ operations, the fastest of a few."""
    size = 8192 if place.on_card else 512
    left, right = (torch.randn(size, size, device=place.device).bfloat16() for _ in range(2))
    with fast_matmul(place.device):
        seconds = min(_timed(place.device, lambda: torch.mm(left, right)) for _ in range(TRIES))
    return 2 * size**3 / seconds / 1e12


def _gigabytes_per_second(place: Place) -> float:
    """Of a copy inside the device's memory, read and written."""
    source = torch.empty((1 << 30) if place.on_card else (1 << 25), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    seconds = min(_timed(place.device, lambda: target.copy_(source)) for _ in range(TRIES))
    return 2 * source.nbytes / seconds / 1e9


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    hardware.synchronize(device)
    began = time.perf_counter()
    work()
    hardware.synchronize(device)
    return time.perf_counter() - began


PROOF = Proof(
    name="speed",
    promise="tokens a second, beside the ideal line that plans are ranked by",
    tolerance=f"at most {FASTER} of the ideal; how far below is measured, nothing is promised",
    source="memory/throughput.py, ideal_tokens_per_second; rates by a matmul and a copy on this device",
    run=run,
)
