"""What both stacks of `step.py` are told, the rows that they train, and how they are measured.

Light to import: torch and the like are imported by the worker that measures.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "trl")


@dataclass(frozen=True)
class Settings:
    """What both stacks are told."""

    base: str
    rows: int
    length: int
    accumulation: int
    steps: int
    r: int
    optimizer: str
    gradient_checkpointing: bool  # ours
    theirs_checkpointing: bool
    threads: int
    documents: int = 1  # that share a row: real packs hold several, and take other kernels than one document does
    objective: str = "sft"  # of dpo a row is a pair: a question of half of the length and two answers of as many tokens
    asks_once: bool = False  # whether TRL's reference is asked before the steps, as ours is, and not within each

    @property
    def answer(self) -> int:
        """Tokens of each answer of a pair."""
        return self.length - self.length // 2

    @property
    def trained(self) -> int:
        """Trained tokens of a step."""
        row = self.length - self.documents if self.objective == "sft" else 2 * self.answer
        return self.rows * row * self.accumulation


def token_rows(settings: Settings, vocabulary: int) -> list[list[list[int]]]:
    """Micro-batches of rows of random tokens, the same in every process."""
    chance = random.Random(7)
    one = [[chance.randrange(4, vocabulary) for _ in range(settings.length)] for _ in range(settings.rows)]
    return [one for _ in range(settings.accumulation)]


def pairs_of(settings: Settings, row: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """A question and two answers of a row's tokens; the second one has them in another order."""
    question, answer = list(row[: settings.length // 2]), list(row[settings.length // 2 :])
    return question, answer, answer[::-1]


def synchronize(device_type: str) -> None:
    if device_type == "cuda":
        import torch

        torch.cuda.synchronize()


def resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def figures_of(
    settings: Settings, seconds: Sequence[float], loss: float, before: int, device_type: str
) -> dict[str, Any]:
    """Trained tokens a second by the median step, and the peak: the allocator's on a GPU, else of resident memory."""
    import resource

    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_gpu = device_type == "cuda"
    return {
        "seconds": [round(value, 4) for value in seconds],
        "trained_tokens_per_second": round(settings.trained / statistics.median(seconds), 2),
        "peak_bytes": int(torch.cuda.max_memory_allocated()) if on_gpu else int(peak - before),
        "peak_of": "tensors on the GPU" if on_gpu else "resident memory above that after imports",
        "loss": round(loss, 4),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
