"""What a check found: a recipe that is good, and what its run will take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from qlora.report import ahead, results
from qlora.report.drawn import Drawn
from qlora.units import gib

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qlora.data.prepare import PreparedData
    from qlora.hours import Ahead
    from qlora.memory.estimate import Estimate


@dataclass(frozen=True)
class Checked(Drawn):
    """A recipe that is good: its rows as tokens (of documents, as many as may be), its memory where known, and what a
    study of documents has before it."""

    data: PreparedData
    memory: Estimate | None
    ahead: Ahead | None = None

    def lines(self) -> list[str]:
        """Rows, tokens and memory, a line each."""
        found = []
        for split, name in ((self.data.train, "train on"), (self.data.eval, "evaluate")):
            total, trained = sum(split.lengths), sum(split.trained)
            found.append(f"{len(split.lengths):,} rows to {name}: {total:,} tokens, {trained:,} trained")
        if self.memory is not None:
            peak, limit = gib(self.memory.peak_bytes), gib(self.memory.limit_bytes)
            found.append(f"memory: {peak} at its peak, the limit is {limit}")
        if self.ahead is not None:
            found += ahead.lines(asdict(self.ahead))
        return [*found, "recipe, base, tokenizer and rows are good"]

    def drawing(self) -> RenderableType:
        return results.text(self.lines())
