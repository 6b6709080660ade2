"""A conversation in a terminal: what is typed, the commands that begin with `/`, and Ctrl-C, which stops an answer."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qlora import shown
from qlora.ask.settings import NAMES, Sampling, changed_by_text
from qlora.cli import common
from qlora.errors import DoesNotFit, QloraError, UserError
from qlora.guarded import Guarded
from qlora.report.answers import answers_on
from qlora.report.console import Terminal
from qlora.stop import StopRequest

if TYPE_CHECKING:
    from qlora.ask.talk import Talk

COMMANDS = {
    "/help": "these lines",
    "/system TEXT": "set the system prompt; /system alone shows it, /system none takes it away",
    "/set NAME VALUE": "change a setting; /set alone shows them all",
    "/undo": "forget the last question and its answer",
    "/reset": "forget all but the system prompt",
    "/save FILE": "write the conversation into a new file, as a row to train on",
    "/exit": "end (so does Ctrl-D)",
}
_LINES = '"""'  # begins and ends a question of several lines
_OTHERS = f"Ctrl-C stops an answer; {_LINES} begins and ends a question of several lines; // begins one with /"
MEMORY_HINT = "reset the conversation, end other programs, or open the model with a smaller context"
MAX_INPUT = 10_000_000  # characters of a question


class Conversation:
    """One with `talks`: the model alone, or its base and then itself. `sampling` changes by `/set`."""

    def __init__(self, talks: Sequence[Talk], sampling: Sampling, console: Terminal, stop: StopRequest) -> None:
        self.talks, self.sampling, self.console, self.stop = talks, sampling, console, stop
        self.is_over = False
        self._reading = False
        self._interrupted = False

    def loop(self, read: Callable[[str], str] = input) -> None:
        """Until Ctrl-D or `/exit`. Raises StoppedBySignal for SIGTERM."""
        with suppress(ImportError):  # Windows has none: its console edits lines itself
            import readline  # noqa: F401
        with self._interrupts():
            while not self.is_over:
                try:
                    self._turn(read)
                except EOFError:
                    self.console.print()
                    self.is_over = True
                except KeyboardInterrupt:
                    if self.stop.is_set:
                        hint = "start it again; what was not saved is gone"
                        raise self.stop.error("the conversation is over", hint) from None
                    self.console.print(Text("\nCtrl-D ends the conversation", style="dim"))

    def _turn(self, read: Callable[[str], str]) -> None:
        text = self._read(read)
        try:
            if text.startswith("/") and not text.startswith("//"):
                self.command(text)
            elif text.strip():
                self.answer(text.removeprefix("/") if text.startswith("//") else text)
        except (UserError, DoesNotFit) as error:
            self._say(error)

    def _read(self, read: Callable[[str], str]) -> str:
        """What is typed next: a line, or all lines between two marks."""
        self._reading = True
        try:
            text = read("> ")
            if text.lstrip().startswith(_LINES):
                lines = [text.lstrip().removeprefix(_LINES)]
                while not lines[-1].rstrip().endswith(_LINES):
                    lines.append(read("… "))
                text = "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix(_LINES)]).strip("\n")
        finally:
            self._reading = False
        if len(text) > MAX_INPUT:
            raise UserError(f"{len(text):,} characters are too many", f"ask with {MAX_INPUT:,} at most")
        return as_utf8(text)

    def answer(self, question: str) -> None:
        """Ask, and show the answers as they come. Raises UserError, DoesNotFit."""
        titles = ["base", "tuned"] if len(self.talks) > 1 else ["tuned"]
        ends: list[str] = []
        self._interrupted = False
        with self._all_or_none(), Guarded("answering", MEMORY_HINT), answers_on(self.console, titles) as screen:
            for column, talk in enumerate(self.talks):
                if self._interrupted and column:
                    break
                begun = time.perf_counter()
                answering = talk.ask(question, self.sampling)
                answering.writing.stopped = lambda: self._interrupted
                if answering.left_out:
                    self._note(f"the context is full: {answering.left_out} of the oldest turns left out from here on")
                show_answer(talk, answering, partial(screen.show, column))
                ends.append(_how_it_went(answering.writing, time.perf_counter() - begun))
        self._note("; ".join(ends))

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Of two models that are compared, both keep a question with their answers to it, or neither does: what is
        asked next would otherwise be answered from two different histories."""
        before = [list(talk.messages) for talk in self.talks]
        answered = False
        try:
            yield
            pairs = zip(self.talks, before, strict=True)
            # A question that got no answer is gone, and what was the last message is so again: the same, not an equal.
            answered = all(now.messages and all(now.messages[-1] is not it for it in old[-1:]) for now, old in pairs)
        finally:
            if len(self.talks) > 1 and not answered:
                for talk, messages in zip(self.talks, before, strict=True):
                    talk.messages = messages
                self._note("not answered by both: the question is forgotten")

    def command(self, text: str) -> None:
        """Do what a line that begins with `/` says. Raises UserError."""
        name, _, rest = text.strip().partition(" ")
        rest = rest.strip()
        actions: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/system": self._system, "/set": self._set, "/undo": self._undo,
            "/reset": self._reset, "/save": self._save, "/exit": self._exit, "/quit": self._exit, "/bye": self._exit,
        }  # fmt: skip
        if name not in actions:
            raise UserError(f"there is no command {name}", "/help shows those that there are")
        actions[name](rest)

    def _help(self, _: str) -> None:
        for command, what in COMMANDS.items():
            self.console.print(Text.assemble((f"{command:<18}", "bold"), what))
        self.console.print(Text(_OTHERS))

    def _system(self, text: str) -> None:
        if text:
            for talk in self.talks:
                talk.system = "" if text.lower() == "none" else text
        self._note(f"system prompt: {self.talks[-1].system or 'none'}")

    def _set(self, text: str) -> None:
        name, _, value = text.replace("=", " ").partition(" ")
        if name:
            self.sampling = changed_by_text(self.sampling, name, value.strip())
        self._note(", ".join(f"{name} {_shown(getattr(self.sampling, name))}" for name in NAMES))

    def _undo(self, _: str) -> None:
        found = [talk.undo() for talk in self.talks]
        self._note("the last question is forgotten" if any(found) else "there is nothing to forget")

    def _reset(self, _: str) -> None:
        for talk in self.talks:
            talk.reset()
        self._note("the conversation begins anew")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("no file is named", "write /save FILE, such as /save rows.jsonl")
        self._note(f"saved in {self.talks[-1].save(name)}")

    def _exit(self, _: str) -> None:
        self.is_over = True

    def _note(self, text: str) -> None:
        self.console.print(Text(shown.block(text), style="dim"))

    def _say(self, error: QloraError) -> None:
        self.console.print(Text.assemble(("error: ", "bold red"), common.as_options(error.what)))
        self.console.print(Text(f"       {common.as_options(error.hint)}"))

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """While it is open, Ctrl-C stops an answer, and takes back a line that is being typed."""

        def receive(_number: int, _frame: Any) -> None:
            self._interrupted = True
            if self._reading:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def show_answer(talk: Talk, answering: Any, show: Callable[[str, bool], None]) -> None:
    """Write an answer into its conversation, each part shown with whether it is a thought."""
    from qlora.ask.thoughts import Thoughts

    thoughts = Thoughts(answering.block)

    def piece(text: str) -> None:
        for part in thoughts.take(text):
            show(*part)

    talk.answer(answering, piece)
    for part in thoughts.rest():
        show(*part)


def as_utf8(text: str) -> str:
    """What was typed or piped, bytes that are no UTF-8 as the sign for such."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def prompt_on_stderr(prompt: str) -> str:
    """`input`, where stdout is a file: the sign that a line may be typed does not belong there."""
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def _how_it_went(writing: Any, seconds: float) -> str:
    count = len(writing.tokens)
    end = {"stop": "", "length": ", cut by max_tokens or the context", "interrupted": ", stopped"}[writing.finish]
    speed = f", {count / seconds:.1f} tokens/s" if seconds > 0 and count else ""
    return f"{count} tokens{speed}{end}"


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
