"""Files of events for tests of pages: a run as it would tell of itself, whole or in pieces."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from qlora.report.run_files import Run, events_of, run_of

BEGIN = datetime(2026, 1, 31, 23, 0, tzinfo=UTC)
PLAN = {
    "train_rows": 900,
    "eval_rows": 50,
    "packs": 60,
    "tokens_per_epoch": 9_000,
    "trained_tokens_per_epoch": 3_000,
    "batch_size": 4,
    "micro_batch_size": 2,
    "accumulation": 2,
    "steps": 40,
    "epochs": 3.0,
    "max_length": 512,
    "trainable_parameters": 4_000,
    "total_parameters": 80_000,
    "packing": True,
    "gradient_checkpointing": False,
    "arithmetic": "60 packs an epoch",
    "attention": "sdpa",
    "resume": None,
    "memory": {
        "peak_bytes": 6 << 30,
        "limit_bytes": 8 << 30,
        "error_bytes": 1 << 28,
        "components": {"weights": 4 << 30},
    },
}


def line(kind: str, after: float = 0.0, /, **values: Any) -> str:
    """An event as the file has it, so many seconds after the beginning."""
    time = (BEGIN + timedelta(seconds=after)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"event": kind, "time": time, **values}, ensure_ascii=False) + "\n"


def start(after: float = 0.0, **values: Any) -> str:
    told = {"recipe": "ours", "run_dir": "/home/alice/runs/ours", "base": "/home/alice/models/tiny", "commit": None}
    more = {"device": "cpu", "versions": {"qlora": "0.1", "torch": "2.13"}, "resumed_from_step": None}
    return line("start", after, **{**told, **more, **values})


def step(number: int, after: float | None = None, **values: Any) -> str:
    told = {
        "step": number,
        "epoch": 0.1,
        "loss": 2.0 / math.sqrt(max(number, 1)),
        "learning_rate": 1e-4,
        "grad_norm": 0.5,
    }
    more = {"tokens": 900, "trained_tokens": 300, "tokens_per_second": 450.0, "peak_bytes": 5 << 30, "seconds": 2.0}
    return line("step", 2.0 * number if after is None else after, **{**told, **more, **values})


def end(after: float, number: int, **values: Any) -> str:
    told = {"reason": "finished", "step": number, "steps": number, "seconds": 80.0, "tokens": 1, "trained_tokens": 1}
    more = {"train_loss": 0.3, "eval_loss": 0.4, "exact_match_before": 0.1, "exact_match_after": 0.8}
    memory = {
        "peak": {"predicted": 6 << 30, "measured": 5 << 30},
        "weights": {"predicted": 4 << 30, "measured": 4 << 30},
    }
    last = {"peak_bytes": 5 << 30, "adapter": "adapter", "adapter_step": number, "memory": memory, "phases": {}}
    return line("end", after, **{**told, **more, **last, **values})


def whole(steps: int = 40, words: str = "") -> Iterator[str]:
    """A run with one of everything; `words` stand in each text of it."""
    yield start(recipe=f"ours{words}", device=f"cpu{words}", versions={f"torch{words}": f"2.13{words}"})
    yield line("notice", 1, topic=f"packing{words}", message=f"on in /home/alice/runs/ours{words}", count=17)
    yield line(
        "rejected", 1, source=f"rows.jsonl{words}", reason=f"no answer{words}", count=3, examples=[f"r:1{words}"]
    )
    yield line("plan", 2, **{**PLAN, "steps": steps, "arithmetic": f"so many{words}"})
    for number in range(1, steps + 1):
        yield step(number)
        if number % 10 == 0:
            told = {"loss": 3.0 / number, "perplexity": 2.0, "exact_match": None, "rows": 50, "best": True}
            yield line("eval", 2 * number, step=number, **told)
            yield line("saved", 2 * number, what=f"checkpoint{words}", step=number, path="/home/alice/x", bytes=9)
    yield line("recovered", 2 * steps, step=steps, message=f"micro-batch 2 becomes 1{words}")
    texts = {"prompt": f"Which?{words}", "expected": f"This.{words}", "base": f"That.{words}", "tuned": f"This!{words}"}
    yield line("sample", 2 * steps, step=steps, **texts)
    yield end(2 * steps, steps, reason=f"finished{words}")
    entry = {"name": f"gguf-q4{words}", "measured_by": f"llama.cpp{words}", "kl": 0.01, "perplexity": 2.0, "top1": 0.9}
    yield line("fidelity", 2 * steps, texts="x", rows=9, positions=90, entries=[{**entry, "bytes": 1 << 20}])


def write(folder: Path, lines: Iterator[str] | list[str], recipe: str = "") -> Path:
    """A run's folder with these events, and a recorded recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    if recipe:
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return folder


def run_in(folder: Path, lines: list[str], recipe: str = "", name: str = "") -> Run:
    write(folder, lines, recipe)
    return run_of(folder, name or folder.name, events_of(folder))
