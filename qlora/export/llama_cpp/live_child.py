"""One GGUF file held open by llama.cpp, in a process of its own, and asked again and again by the parent.

A request is a line of JSON on stdin, an answer a line of JSON on stdout, with raw bytes behind it where it says so.
What was computed of a row stays in llama.cpp's memory: the next request says at which place it goes on. The end of
stdin is the end of the parent, and of this process.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

CONTROL, USER_DEFINED = 8, 16  # llama.h, enum llama_token_attr
_PIECE_BYTES = 4096  # of one token's text


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's: this package may lie in none that an isolated Python knows
    # Ctrl-C reaches every process of a terminal; when to end is the parent's business, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    from qlora.export.llama_cpp.runtime_child import Failed

    try:
        _serve(replies)
    except Failed as failed:
        _reply(replies, {"failed": str(failed)})
        sys.exit(3)


def _serve(replies: IO[bytes]) -> None:
    from qlora.export.llama_cpp.runtime_child import Context, Model

    lines = sys.stdin.buffer
    asked = json.loads(lines.readline())
    library = open_library(Path(asked["library"]))
    model = Model.load(library, Path(asked["file"]))
    trained = int(library.llama_model_n_ctx_train(model.model))
    length = min(asked["context"], trained) if trained > 0 else asked["context"]
    context = Context.open(model, length, asked["threads"])
    vocabulary = Vocabulary(model)
    _reply(replies, {**model.describe(), **vocabulary.describe(), "context": length})
    row = Row(context)
    for line in lines:
        request = json.loads(line)
        if "text" in request:
            _reply(replies, {"ids": model.tokenize(request["text"], False)})
        elif "piece" in request:
            _reply(replies, {"bytes": vocabulary.piece(request["piece"]).hex()})
        else:
            logits = row.extended(request["ids"], request["start"], request["wanted"])
            _reply(replies, {"logits": len(logits)}, logits) if row.goes_on else _reply(replies, {"lost": True})


def open_library(path: Path) -> Any:
    """llama.cpp with the argument types of what is called here, as llama.h declares them."""
    from qlora.export.llama_cpp.runtime_child import Failed, open_llama

    library = open_llama(path)
    pointer, integer, boolean = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "llama_model_n_ctx_train": (integer, (pointer,)),
        "llama_memory_seq_rm": (boolean, (pointer, integer, integer, integer)),
        "llama_memory_seq_pos_min": (integer, (pointer, integer)),
        "llama_vocab_bos": (integer, (pointer,)),
        "llama_vocab_eos": (integer, (pointer,)),
        "llama_vocab_get_add_bos": (boolean, (pointer,)),
        "llama_vocab_get_attr": (integer, (pointer, integer)),
        "llama_vocab_get_text": (ctypes.c_char_p, (pointer, integer)),
        "llama_token_to_piece": (integer, (pointer, integer, ctypes.c_char_p, integer, integer, boolean)),
    }
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:  # ctypes' word for a missing function
        raise Failed(f"{path.name} is of another version ({error})") from error
    return library


class Vocabulary:
    """A loaded file's tokens."""

    def __init__(self, model: Any) -> None:
        self._library, self._vocabulary, self._count = model.library, model.vocabulary, model.tokens

    def describe(self) -> dict[str, Any]:
        """`bos`, `eos`: ids, negative where there is none. `marked`: id, text, and whether it is a control token."""
        library, vocabulary = self._library, self._vocabulary
        return {
            "bos": library.llama_vocab_bos(vocabulary),
            "eos": library.llama_vocab_eos(vocabulary),
            "add_bos": library.llama_vocab_get_add_bos(vocabulary),
            "marked": list(self._marked()),
        }

    def _marked(self) -> Iterator[tuple[int, str, bool]]:
        for token in range(self._count):
            attributes = self._library.llama_vocab_get_attr(self._vocabulary, token)
            if attributes & (CONTROL | USER_DEFINED):
                text = self._library.llama_vocab_get_text(self._vocabulary, token) or b""
                yield token, text.decode("utf-8", "replace"), bool(attributes & CONTROL)

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; none of a control token."""
        room = ctypes.create_string_buffer(_PIECE_BYTES)
        count = self._library.llama_token_to_piece(self._vocabulary, token, room, _PIECE_BYTES, 0, False)
        return room.raw[: max(0, count)]


class Row:
    """The one row of a context, and how much of it has been computed. `goes_on`: whether the last request could be."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._computed = 0
        self.goes_on = True

    def extended(self, ids: list[int], start: int, wanted: bool) -> bytes:
        """Compute `ids` at places `start`, …; the logits (fp32) after the last of them, where they are `wanted`.

        What was computed from `start` on is forgotten. A memory that cannot forget a part (a recurrent state) is
        forgotten whole; then `goes_on` is false unless `start` is 0.
        """
        library = self._context.model.library
        memory = library.llama_get_memory(self._context.context)
        self.goes_on = start <= self._computed
        if start and start < self._computed:
            # A sliding window may have dropped the row's beginning: then what stands before `start` is not whole.
            whole = library.llama_memory_seq_pos_min(memory, 0) <= 0
            self.goes_on = whole and bool(library.llama_memory_seq_rm(memory, 0, start, -1))
        if not start or not self.goes_on:
            library.llama_memory_clear(memory, True)
            self._computed = 0
        if not self.goes_on:
            return b""
        at = frozenset((start + len(ids) - 1,)) if wanted else frozenset()
        found = [logits_V.tobytes() for logits_V in self._context.logits(ids, start, at)]
        self._computed = start + len(ids)
        return found[0] if found else b""


def _reply(replies: IO[bytes], answer: dict[str, Any], raw: bytes = b"") -> None:
    replies.write(json.dumps(answer).encode() + b"\n" + raw)
    replies.flush()


if __name__ == "__main__":
    main()
