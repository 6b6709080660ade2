"""The thoughts in an answer, told from its words while both are being written."""

from __future__ import annotations

from collections.abc import Sequence

from qlora.ask.llama import LlamaModel
from qlora.ask.opened import TorchModel
from qlora.ask.writing import decoder_of
from qlora.data.template_facts import BLOCKS

_TAIL = 12  # tokens of a prompt's end in which a mark that opens thoughts is looked for


def opened_block(opened: TorchModel | LlamaModel, prompt: Sequence[int]) -> tuple[str, str] | None:
    """The marks of a block of thoughts that a prompt leaves open, so that the answer begins inside of it."""
    decoder = decoder_of(opened)
    tail = ("".join(map(decoder.take, prompt[-_TAIL:])) + decoder.rest()).rstrip()
    return next((block for block in BLOCKS if tail.endswith(block[0])), None)


def as_message(text: str, block: tuple[str, str] | None) -> str:
    """An answer as a row of data has it: with the mark that the prompt wrote for it, where its thoughts are closed."""
    return f"{block[0]}\n{text}" if block is not None and block[1] in text else text


class Thoughts:
    """Splits pieces of an answer into words and thoughts. `block`: the one that the prompt left open, if any.

    A mark may come in several pieces: text that may become one is held back until it is known.
    """

    def __init__(self, block: tuple[str, str] | None) -> None:
        self._block = block
        self._kept = ""

    def take(self, text: str) -> list[tuple[str, bool]]:
        """What may be shown now, each part with whether it is a thought; the marks belong to the thoughts."""
        found: list[tuple[str, bool]] = []
        rest = self._kept + text
        while True:
            marks = [self._block[1]] if self._block else [block[0] for block in BLOCKS]
            at, mark = min(((rest.find(mark), mark) for mark in marks if mark in rest), default=(-1, ""))
            if at < 0:
                break
            inside = self._block is not None
            before = rest[: at + len(mark)] if inside else rest[:at]
            found += [(before, inside)] + ([] if inside else [(mark, True)])
            rest = rest[at + len(mark) :]
            self._block = None if inside else next(block for block in BLOCKS if block[0] == mark)
        held = max(_beginning(rest, mark) for mark in marks)
        self._kept = rest[len(rest) - held :]
        found.append((rest[: len(rest) - held], self._block is not None))
        return [part for part in found if part[0]]

    def rest(self) -> list[tuple[str, bool]]:
        """What was held back, and has become no mark."""
        kept, self._kept = self._kept, ""
        return [(kept, self._block is not None)] if kept else []


def _beginning(text: str, mark: str) -> int:
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
