"""What a person would see of an input: exit code, lines, and whether these are what they should be."""

from __future__ import annotations

import io
import traceback
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass

from qlora.cli import common
from qlora.errors import QloraError, RecipeError

LIMIT_CHARACTERS = 2000
EXIT_CODES = (2, 3, 4)
NOBODY_READS = 141  # as a shell says of a command that SIGPIPE ended

Work = Callable[[], object]


@dataclass(frozen=True)
class Command:
    """The work of a whole command, which shows its errors itself: `ended` is its exit code."""

    ended: Callable[[], int]

    def __call__(self) -> None:
        raise SystemExit(self.ended())


@dataclass(frozen=True)
class Shown:
    code: int
    out: str
    err: str
    fault: str
    detail: str


def show(work: Work) -> Shown:
    """Do the work as a command does it, and look at what it shows."""
    raised: list[BaseException] = []

    def watched() -> None:
        try:
            work()
        except BaseException as ended:
            raised.append(ended)
            raise

    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors) for errors in ("strict", "replace")]
    code, detail = 0, ""
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            if isinstance(work, Command):
                code = work.ended()
            else:
                common.run(watched)
        except SystemExit as ended:
            code = exit_code(ended)
        except BaseException as unexpected:
            code, raised = -1, [*raised, unexpected]
    out, err = (_written(stream) for stream in streams)
    error = raised[-1] if raised else None
    if error is not None:
        detail = "".join(traceback.format_exception(error))[-6000:]
    fault = _fault(error, code, isinstance(work, Command)) or _untidy(out, err)
    return Shown(code, out, err, fault, detail)


def exit_code(ended: SystemExit) -> int:
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _written(stream: io.TextIOWrapper) -> str:
    with suppress(ValueError, OSError):
        stream.flush()
        return stream.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined,no-any-return]
    return ""


def _fault(error: BaseException | None, code: int, is_command: bool) -> str:
    """What is wrong with how it ended; "" for nothing."""
    if error is None:
        return "" if code == 0 or (is_command and code in (*EXIT_CODES, NOBODY_READS)) else f"exit code {code}"
    if not isinstance(error, QloraError):
        text = "".join(letter if letter.isprintable() else "�" for letter in str(error))
        return f"{type(error).__name__}: {text[:200]}"
    if code not in EXIT_CODES:
        return f"exit code {code}"
    problems = error.problems if isinstance(error, RecipeError) else ()
    for text in (error.what, error.hint, *(t for p in problems for t in (p.what, p.hint))):
        if not text.strip() or len(text.splitlines()) != 1 or len(text) >= LIMIT_CHARACTERS:
            return f"a message of {len(text)} characters and {len(text.splitlines())} lines: {text[:80]!r}"
    return ""


def _untidy(out: str, err: str) -> str:
    if found := control_characters(out) | control_characters(err):
        return f"control characters on the screen: {sorted(map(hex, map(ord, found)))}"
    longest = max((len(line) for line in err.splitlines()), default=0)
    return f"a line of {longest} characters" if longest > LIMIT_CHARACTERS else ""


def control_characters(text: str) -> set[str]:
    """Those that a terminal obeys; line breaks are ours."""
    return {letter for letter in text if unicodedata.category(letter) == "Cc" and letter not in "\n\t"}
