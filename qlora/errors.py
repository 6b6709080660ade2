"""Everything a user can cause or fix, as one tree.

    QloraError                      exit code
    ├── UserError                       2   the user can fix it
    │   ├── RecipeError                     a key, a value, the TOML itself (several problems at once)
    │   ├── DataError                       a file, a row, nothing left to train on
    │   ├── ModelError                      the base: missing, unsafe, unknown, already quantized
    │   ├── TokenizerError                  no end token, a template that cannot be rendered
    │   ├── RunFolderError                  the run's folder: in use, another recipe's, not writable
    │   ├── HardwareError                   the machine cannot do what the recipe asks
    │   ├── RewardError                     a reward of grpo: its file, its function, what it gives
    │   └── ExportError                     nothing to merge, an adapter of another base
    │       └── TargetTaken                     the folder that an export should become is somebody's
    ├── DoesNotFit                      3   it does not fit in memory
    ├── TrainingStopped                 4   training ended by itself: non-finite numbers, full disk
    └── StoppedBySignal           130/143   SIGINT or SIGTERM; the state is saved

An error is written for the person who meets it: `what` says what is wrong and where (`file:line` or
`table.key`), `hint` says what to do. The command line prints these two lines and leaves with `exit_code`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames

from qlora import out_of_memory, redaction, shown

MAX_CHARACTERS = 1_500  # of a message: the longest path has 4,096 bytes, and is cut in its middle


def one_line(text: str) -> str:
    """The text on one line that steers no terminal: what a message quotes (a column's name, a library's error) may."""
    lines = text.splitlines()
    return shown.one_line(" ".join(part.strip() for part in lines) if len(lines) > 1 else text.rstrip("\r\n"))


def _told(text: str) -> str:
    """What a message says, its middle left out where it is longer than anybody reads: it may quote a stranger's name.

    A secret goes before anything is left out: half of one is known by nothing.
    """
    text = one_line(redaction.redact(text))
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 500]} … {text[-400:]}"


def _two_lines(what: str, hint: str) -> list[str]:
    return [f"\033[1;31merror\033[0m: {what}", f"       {hint}"]


class QloraError(Exception):
    """Root of the tree. Never raised itself."""

    exit_code = 2

    def __init__(self, what: str, hint: str) -> None:
        self.what = _told(what)
        self.hint = _told(hint)
        super().__init__(self.what)

    def _render_traceback_(self) -> list[str]:
        """What IPython, and so a notebook, shows of it: the two lines, where a traceback would be sixty."""
        return _two_lines(self.what, self.hint)


class UserError(QloraError):
    """Something the user can fix."""


@dataclass(frozen=True)
class Problem:
    """One of possibly several things wrong with a recipe."""

    where: str
    what: str
    hint: str


class RecipeError(UserError):
    """The recipe cannot be used. Carries every problem found, in the order of the file."""

    def __init__(self, problems: list[Problem]) -> None:
        first = problems[0]
        super().__init__(f"{first.where}: {first.what}", first.hint)
        self.problems = problems

    def _render_traceback_(self) -> list[str]:
        """All problems, two lines each."""
        said = [(_told(f"{one.where}: {one.what}"), _told(one.hint)) for one in self.problems]
        return [line for problem in said for line in _two_lines(*problem)]


class DataError(UserError):
    """A data file, a row of it, or what is left of all rows."""


class ModelError(UserError):
    """The base model's folder or hub name."""


class TokenizerError(UserError):
    """The base's tokenizer or chat template."""


class RunFolderError(UserError):
    """The folder of a run: taken, unwritable, of another recipe, or with nothing to resume."""


class HardwareError(UserError):
    """This machine cannot do what the recipe asks."""


class RewardError(UserError):
    """A reward: its file, its function, or what it gives for answers."""


class ExportError(UserError):
    """An adapter and a base that cannot become one model."""


class TargetTaken(ExportError):
    """The folder that an export should become is somebody's."""


class DoesNotFit(QloraError):
    """The settings need more memory than there is."""

    exit_code = 3


class TrainingStopped(QloraError):
    """Training ended by itself; the last good checkpoint is intact."""

    exit_code = 4


class StoppedBySignal(QloraError):
    """SIGINT or SIGTERM. `exit_code` is 128 + the signal's number, as shells count."""

    def __init__(self, what: str, hint: str, signal_number: int) -> None:
        super().__init__(what, hint)
        self.exit_code = 128 + signal_number


@dataclass
class ForeignFailure:
    """What a library raised over a stranger's file; `error` is None where it raised nothing."""

    error: BaseException | None = None

    @property
    def reason(self) -> str:
        """The error's message on one line of up to 200 characters, or its class where it has no message."""
        return " ".join(str(self.error).split())[:200] or type(self.error).__name__


@contextmanager
def foreign_failures(memory_too: bool = False, trial: bool = False) -> Iterator[ForeignFailure]:
    """Catch whatever a library raises over a stranger's file inside the block; the caller looks at `error` behind it.

    A broad except, the one beside the command line's: transformers, tokenizers, bitsandbytes and jinja2 have no error
    of their own for a file that is wrong, and raise what their code stumbles on (tokenizers even a bare Exception), so
    that no list of classes is complete. A panic of a native library is among them. Our own errors pass, and so does
    what asks the process to end, a GPU that failed, and memory that ran out: none of them is the file's fault. It is
    with `memory_too`, in a process that has a limit of its own for one file. In a `trial`, of a kernel that another can
    stand in for, they are answers too: only a GPU that is lost passes.
    """
    failure, handled = ForeignFailure(), sys.exception()
    try:
        yield failure
    except QloraError:
        raise
    except Exception as error:
        ran_out = not trial and out_of_memory.is_out_of_memory(error)
        failed = out_of_memory.gpu_is_lost(error) if trial else out_of_memory.gpu_fault(error)
        if not memory_too and (ran_out or failed):
            raise
        failure.error = error
    except BaseException as error:
        if not _is_panic(error):
            raise
        failure.error = error
    forget_frames(failure.error, handled)


def forget_frames(error: BaseException | None, handled: BaseException | None) -> None:
    """Let go of what the calls behind an error held, tensors of a whole model among it, however long the error lives.

    A notebook keeps the last error, and so does whoever catches one and goes on: its traceback keeps him as well, a
    circle that stays until Python next looks for such. `handled` is what the caller was handling before, whose frames
    are his.
    """
    seen: set[int] = set()
    while error is not None and error is not handled and id(error) not in seen:
        seen.add(id(error))
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _is_panic(error: BaseException) -> bool:
    """Whether a library in Rust gave up inside itself: pyo3's PanicException, a BaseException.

    Each library has such a class of its own, which cannot be imported: it is known by its name alone.
    """
    kind = type(error)
    return (kind.__module__, kind.__name__) == ("pyo3_runtime", "PanicException")
