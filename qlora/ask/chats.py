"""A model to be asked from Python: `open_chat` keeps it in memory between two questions, as cells of a notebook ask."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qlora.ask.opened import HowToOpen, named, open_model, refuse_without_template
from qlora.ask.settings import Sampling, changed
from qlora.ask.talk import Talk
from qlora.errors import ExportError, UserError
from qlora.events import Sink
from qlora.guarded import Guarded
from qlora.notebook import at_work
from qlora.redaction import redact
from qlora.report.drawn import Drawn
from qlora.stop import StopRequest

if TYPE_CHECKING:
    from rich.console import RenderableType

_MEMORY_HINT = "reset the conversation, or open the model with a smaller context"


@dataclass(frozen=True)
class Answer(Drawn):
    """What was answered. `base` is the untuned model's answer where it was asked too.

    `finish`: "stop" (the model ended it), "length" (max_tokens, or the context is full) or "interrupted".
    """

    question: str
    text: str
    base: str | None
    finish: str

    def __str__(self) -> str:
        return self.text

    def drawing(self) -> RenderableType:
        from rich.table import Column, Table
        from rich.text import Text

        table = Table.grid(Column(style="dim", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
        # Before it is broken into lines: half a token or password is known by nothing.
        table.add_row("question", Text(redact(self.question)))
        if self.base is not None:
            table.add_row("base", Text(redact(self.base)))
        table.add_row("answer" if self.base is None else "tuned", Text(redact(self.text), style="green"))
        if self.finish != "stop":
            ends = {"length": "cut: allow more max_tokens", "interrupted": "interrupted"}
            table.add_row("", Text(ends[self.finish], style="dim"))
        return table


class Chat:
    """A conversation with a model in memory. Close it, or leave its `with` block, to give the memory back."""

    def __init__(self, talks: Sequence[Talk], sampling: Sampling, held: ExitStack) -> None:
        self._talks, self._sampling, self._held = list(talks), sampling, held

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, question: str) -> Answer:
        """Ask, as the next turn of the conversation. An interrupt ends the answer where it is.

        Raises DataError where the template does not take it or it does not fit, DoesNotFit, and UserError when closed.
        """
        if not self._talks:
            raise UserError("the chat is closed", "open it again with open_chat")
        texts: list[str] = []
        finish = "stop"
        before = [list(talk.messages) for talk in self._talks]
        stop = StopRequest()
        try:
            with at_work(None, None, drawn=False) as (_, asked), Guarded("answering", _MEMORY_HINT), asked.being_read():
                stop = asked
                for talk in self._talks:
                    answering = talk.ask(question, self._sampling)
                    answering.writing.stopped = partial(getattr, stop, "is_set")
                    texts.append(talk.answer(answering, lambda piece: None))
                    finish = answering.writing.finish
        finally:
            # What is asked next must not be answered from two histories, of which one has this turn and one has not.
            if len(self._talks) > 1 and (len(texts) < len(self._talks) or stop.is_set):
                for talk, messages in zip(self._talks, before, strict=True):
                    talk.messages = messages
        return Answer(question, texts[-1], texts[0] if len(texts) > 1 else None, finish)

    def reset(self) -> None:
        """Forget all turns."""
        for talk in self._talks:
            talk.reset()

    def close(self) -> None:
        """Give the model's memory back."""
        self._talks = []
        self._held.close()


def open_chat(
    model: str | Path,
    *,
    system: str = "",
    compare: bool = False,
    base_model: str | Path | None = None,
    sampling: Sampling | None = None,
    sink: Sink | None = None,
) -> Chat:
    """Open a run, an adapter's folder, a model's folder, a GGUF file or "hub:owner/name" to be asked.

    It is held as it was trained, the base in 4 bit under its adapter. `compare` asks the base as well. `base_model` is
    the folder or hub name of an adapter's base, where that has moved. Raises the errors of `qlora.errors`.
    """
    drawn_by = changed(Sampling(), **vars(sampling or Sampling()))
    source = named(model)
    if compare and source.kind != "adapter":
        what = f"{source.place}: is a whole model, and its base cannot be asked beside it"
        raise ExportError(what, "name a run or an adapter's folder, or leave `compare` out")
    with ExitStack() as stack, at_work(sink) as (shared, _):
        opened = stack.enter_context(open_model(source, HowToOpen(base_model), shared))
        refuse_without_template(opened)
        talks = [Talk(opened, system, of_base=True)] if compare else []
        return Chat([*talks, Talk(opened, system)], drawn_by, stack.pop_all())
    raise AssertionError("an ExitStack lets errors pass")
