"""Rewards of tests: their files, and how they are opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qlora.events import Recorder, Sink
from qlora.recipe.sections import TrainSection
from qlora.rewards.scoring import Rewards, opened
from qlora.rewards.sources import reward_sources

ROWS = [{"answer": "5"}, {"answer": "6"}]
PROMPTS = ["2+3?", "2+4?"]


def function_of(folder: Path, source: str, name: str = "score") -> str:
    """A file with this source; what names its function."""
    file = folder / "rewards.py"
    file.write_text(source)
    return f"{file}:{name}"


@contextmanager
def rewards_of(
    rewards: Sequence[str] = (), functions: Sequence[str] = (), sink: Sink | None = None, seconds: float = 60
) -> Iterator[Rewards]:
    train = TrainSection(objective="grpo", rewards=tuple(rewards), reward_timeout=seconds)
    with opened(train, reward_sources(train, functions), sink or Recorder()) as found:
        assert found is not None
        yield found
