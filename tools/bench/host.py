"""Resident memory of a run without a GPU: what the plan said, what was measured, and its live tensors beside both.

    python tools/bench/host.py recipes/quickstart.toml train.max_steps=40
    python tools/bench/host.py RECIPE.toml --imports      # what the process holds before it trains, import by import

One run, of which one line is printed. All figures but the first are beside what the process held before a byte of the
base was read: the kernel's own peak of resident memory (VmHWM), set back at that moment. Linux only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
MIB = 1 << 20


class Watch:
    """What the run said and what it held, as it went on; the run's own sink."""

    def __init__(self) -> None:
        self.before = 0
        self.peak_at_load = 0
        self.said: dict[str, Any] = {}

    def emit(self, event: Any) -> None:
        if type(event).__name__ == "Plan" and event.memory:
            self.said = event.memory

    def close(self) -> None:
        pass

    def loading(self) -> None:
        self.before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (proc(5))

    def line(self, live: int) -> str:
        context = self.said["components"]["context"]
        said, error = self.said["peak_bytes"] - self.before, self.said["error_bytes"]
        taken = highest() - self.before
        figures = {
            "held before": self.before,
            "counted as held": context,
            "measured": taken,
            "said": said,
            "margin": error,
            "live": live,
        }
        sizes = ", ".join(f"{name} {count / MIB:.0f} MiB" for name, count in figures.items())
        return f"{sizes}; said / measured {said / taken:.3f}, with the margin {(said + error) / taken:.3f}"


def highest() -> int:
    """The process's highest resident memory since it was last set back."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def run(recipe: Path, overrides: list[str]) -> str:
    from qlora import api
    from qlora.memory.estimate import Estimator
    from qlora.recipe.reading import load_recipe
    from qlora.training import setup

    watch, load_model, complete = Watch(), setup.load_model, Estimator._complete
    live: list[int] = []

    def loading(*arguments: Any) -> Any:
        watch.loading()
        return load_model(*arguments)

    def completed(self: Estimator, recipe: Any, facts: Any, simulator: Any) -> Any:
        estimate = complete(self, recipe, facts, simulator)
        beside = estimate.components["context"] + estimate.terms["fragmentation"]
        live.append(sum(estimate.components.values()) - beside)
        return estimate

    setup.load_model, Estimator._complete = loading, completed  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as folder:
        api.train(load_recipe(recipe, [*overrides, f"output.dir={folder}"]), name="measured", sink=watch)
    return watch.line(live[-1])


def imports() -> None:
    def say(what: str) -> None:
        print(f"{what} {psutil.Process().memory_info().rss / MIB:.0f} MiB")

    say("python")
    from transformers.models.llama import modeling_llama

    say(f"torch and transformers ({modeling_llama.LlamaModel.__name__})")
    from peft import LoraConfig

    from qlora.third_party import import_bitsandbytes
    from qlora.training import loop, memory_plan

    import_bitsandbytes()
    say(f"peft, bitsandbytes and ours ({LoraConfig.__name__}, {loop.__name__}, {memory_plan.__name__})")
    from qlora.model.tokenizer import open_tokenizer

    open_tokenizer(ROOT / "recipes/quickstart/base", "quickstart")
    say("a tokenizer")


def main() -> None:
    if "--imports" in sys.argv[1:]:
        imports()
    else:
        print(run(Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()
