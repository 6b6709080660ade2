"""A conversation with one model: its messages, what of them fits into the context, and a row of data made of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from qlora import files
from qlora.ask.keeping import TorchRow, row_of
from qlora.ask.llama import LlamaModel, LlamaRow
from qlora.ask.opened import TorchModel
from qlora.ask.settings import Sampling
from qlora.ask.thoughts import as_message, opened_block
from qlora.ask.writing import Writing
from qlora.data.formats import Message
from qlora.data.row_json import RowError
from qlora.errors import DataError, UserError

# Of the context, kept free for an answer when old turns are left out; an answer may take all that is left.
_ANSWER_SHARE = 4


@dataclass(frozen=True)
class Answering:
    """One answer on its way: `writing` gives its pieces. `left_out`: old turns that the context has no room for any
    more. `block`: the marks of the thoughts that the answer begins in, if it does."""

    writing: Writing
    left_out: int
    block: tuple[str, str] | None


@dataclass
class Talk:
    """A conversation. `of_base`: with the model's adapters off. `answers`: how many were begun, so that each is drawn
    by numbers of its own."""

    opened: TorchModel | LlamaModel
    system: str = ""
    of_base: bool = False
    messages: list[Message] = field(default_factory=list)
    answers: int = 0
    _row: TorchRow | LlamaRow | None = None

    def ask(self, question: str, sampling: Sampling) -> Answering:
        """Begin an answer; `answer` writes it. The oldest turns are left out, for good, where the context is full.

        Raises DataError, with the conversation as it was, where the template does not take it or the question alone
        does not fit.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        reserve, left_out = min(sampling.max_tokens, self.opened.context // _ANSWER_SHARE), 0
        while len(prompt := self._prompt(messages)) + reserve > self.opened.context:
            rest = _without_oldest(messages)
            if rest is None:
                break
            messages, left_out = rest, left_out + 1
        if len(prompt) >= self.opened.context:
            what = f"the question has {len(prompt):,} tokens, and the context holds {self.opened.context:,}"
            raise DataError(what, "ask something shorter, or open the model with a larger context")
        self.messages = messages
        self._row = self._row or row_of(self.opened)
        writing = Writing(self.opened, self._row, prompt, sampling, self.answers)
        self.answers += 1
        return Answering(writing, left_out, opened_block(self.opened, prompt))

    def answer(self, answering: Answering, show: Callable[[str], None]) -> str:
        """Write an answer, each piece shown as it comes, and take it into the conversation.

        One that was cut short is context for what follows and is not trained on; a question without any answer goes.
        """
        pieces: list[str] = []
        is_whole = False
        opened = self.opened
        try:
            with opened.adapters_off() if self.of_base and isinstance(opened, TorchModel) else nullcontext():
                for piece in answering.writing:
                    pieces.append(piece)
                    show(piece)
            is_whole = True
        finally:
            text = "".join(pieces)
            if is_whole and (text or answering.writing.finish != "interrupted"):
                message: Message = {"role": "assistant", "content": as_message(text, answering.block)}
                cut = answering.writing.finish != "stop" or not text.strip()
                self.messages.append({**message, "train": False} if cut else message)
            else:
                self.messages.pop()
        return text

    def undo(self) -> bool:
        """Forget the last question and its answer; whether there was one."""
        asked = [at for at, message in enumerate(self.messages) if message["role"] == "user"]
        if asked:
            del self.messages[asked[-1] :]
        return bool(asked)

    def reset(self) -> None:
        """Forget all but the system prompt."""
        self.messages = []

    def save(self, name: str) -> str:
        """Write the conversation into a new file, as a line that is a row to train on; its path.

        Raises UserError for a file that is there already, one that cannot be written, or nothing to save.
        """
        row = self._with_system(self.messages)
        if not any(message["role"] == "assistant" and message.get("train", True) for message in row):
            raise UserError("there is no whole answer to save yet", "ask something first")
        path = files.user_path(name, "the file to save to")
        line = json.dumps({"messages": row}, ensure_ascii=False) + "\n"
        try:
            with files.open_to_write(path, "new") as file:
                files.write_all(file, line.encode("utf-8", "replace"))
        except FileExistsError as error:
            raise UserError(f"{path}: is there already, and is not written over", "give another name") from error
        except files.UnsafePathError as error:
            raise UserError(str(error), "give another name") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})", "name another place") from error
        return str(path)

    def _prompt(self, messages: list[Message]) -> list[int]:
        return prompt_of(self.opened, self._with_system(messages))

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages


def prompt_of(opened: TorchModel | LlamaModel, messages: list[Message]) -> list[int]:
    """Tokens of a conversation that the model is to continue, as training rendered it. Raises DataError."""
    try:
        ids = opened.chat.prompt_ids(messages, None)
    except RowError as error:
        raise DataError(error.reason, "leave the system prompt out, or put the turns into another order") from error
    if max(ids, default=0) >= opened.vocabulary:  # a GPU ends the whole process over it
        what = f"the conversation holds a token ({max(ids)}) that the model has no row for"
        raise DataError(what, "leave special tokens out of what you ask")
    return ids


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The conversation from its second question on; None where it has but one."""
    asked = [at for at, message in enumerate(messages) if message["role"] == "user"]
    return messages[asked[1] :] if len(asked) > 1 else None
