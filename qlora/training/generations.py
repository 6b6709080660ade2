"""The folder `generations/`: what the model answered, one file a drawing, one line an answer.

A line says which row was asked and what with, what was answered, what each reward found it worth and what the step made
of that. A file is written whole; the oldest ones go where all together are over MOST_BYTES. Where several steps are
taken on a drawing, lines hold log-probabilities as well, and a run that goes on between these steps reads them back:
the state has the file's sha256, so that it goes on with these answers or with none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora import disk, files, foreign_json
from qlora.foreign_json import ForeignFileError, ForeignModel
from qlora.training.answered import Answer

FOLDER = "generations"  # in a run's
MOST_BYTES = 256 << 20  # of all files; 10,000 answers of 256 tokens are 30 MB

Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=1 << 20)]
Numbers = Annotated[list[float], Field(max_length=1 << 20)]


class _Line(ForeignModel):
    step: int
    row: int
    where: str
    number: int
    prompt: str
    completion: str
    ended: bool
    rewards: dict[str, float | None]
    reward: float
    advantage: float
    prompt_ids: Tokens
    token_ids: Tokens
    logprobs: Numbers = Field(default_factory=list)
    reference: Numbers = Field(default_factory=list)
    old: Numbers = Field(default_factory=list)


@dataclass(frozen=True)
class Kept:
    """The drawings of a run, on its disk. `names` of the rewards, `text` what tokens say, `where` a row stands."""

    run_dir: Path
    names: Sequence[str]
    text: Callable[[Sequence[int]], str]
    where: Callable[[int], str]
    read_again: bool  # several steps are taken on a drawing

    def path(self, step: int) -> Path:
        return self.run_dir / FOLDER / f"step-{step + 1:06d}.jsonl"

    def write(self, step: int, answers: Sequence[Answer]) -> str:
        """Put those of `step`, counted from 0, on the disk; the sha256 of the file. Raises OSError, and UnsafePathError
        where the folder has become a link: what lies behind it is somebody's."""
        files.refuse_links(self.run_dir, self.path(step))
        content = "".join(json.dumps(self._line(step, answer)) + "\n" for answer in answers)
        path = self.path(step)
        if not path.parent.is_dir():
            path.parent.mkdir()
        disk.write_atomic(path, content)
        self._make_room(path)
        return disk.sha256_text(content)

    def read(self, step: int, sha256: str | None) -> list[Answer] | None:
        """Those of `step` as they were drawn; None where they are gone, or are not these any more."""
        try:
            content = files.read_bytes(self.path(step), 2 * MOST_BYTES).decode()
            if sha256 is None or disk.sha256_text(content) != sha256:
                return None
            lines = [
                foreign_json.checked(
                    _Line, foreign_json.parse(line, str(self.path(step))), f"{self.path(step)}:{number}"
                )
                for number, line in enumerate(content.splitlines(), 1)
            ]
        except (OSError, ValueError, ForeignFileError, files.UnsafePathError):
            return None
        return [self._answer(line) for line in lines]

    def _line(self, step: int, answer: Answer) -> dict[str, object]:
        line = {
            "step": step + 1,
            "row": answer.row,
            "where": self.where(answer.row),
            "number": answer.number,
            "prompt": self.text(answer.prompt_ids),
            "completion": self.text(answer.token_ids),
            "ended": answer.ended,
            "rewards": dict(zip(self.names, answer.rewards, strict=True)),
            "reward": answer.reward,
            "advantage": answer.advantage,
            "prompt_ids": answer.prompt_ids,
            "token_ids": answer.token_ids,
        }
        values = {"logprobs": answer.logprobs, "reference": answer.reference, "old": answer.old}
        return {**line, **values} if self.read_again else line

    def _answer(self, line: _Line) -> Answer:
        return Answer(
            row=line.row,
            number=line.number,
            prompt_ids=tuple(line.prompt_ids),
            token_ids=tuple(line.token_ids),
            ended=line.ended,
            logprobs=tuple(line.logprobs),
            rewards=tuple(float(line.rewards[name] or 0.0) for name in self.names),
            reward=line.reward,
            advantage=line.advantage,
            reference=tuple(line.reference),
            old=tuple(line.old),
        )

    def _make_room(self, newest: Path) -> None:
        found = sorted(path for path in newest.parent.iterdir() if re.fullmatch(r"step-\d{6,16}\.jsonl", path.name))
        sizes = {path: path.lstat().st_size for path in found}
        for path in found:
            if sum(sizes.values()) <= MOST_BYTES:
                return
            if path != newest:
                with suppress(OSError):
                    path.unlink()
                del sizes[path]
