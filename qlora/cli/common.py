"""What every command shares: errors as two lines with an exit code, and signals as a request to stop."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperCommand

from qlora import files, out_of_memory, shown, third_party
from qlora.cli import surroundings
from qlora.cli.surroundings import drop_output
from qlora.disk import DISK_FULL, cache_dir
from qlora.errors import DoesNotFit, QloraError, RecipeError, TrainingStopped, UserError
from qlora.events import Notice, Recovered
from qlora.redaction import redact, redact_all
from qlora.stop import StopAsked

if TYPE_CHECKING:
    from qlora.events import Event, Sink
    from qlora.stop import StopRequest

INTERNAL_ERROR = 1
OUTPUT = "standard output"
MAX_SAID = 2_000  # characters of a message that a library made
# Below the commands, messages speak the Python API's language; here its words become options. Longer ones first.
OPTIONS = {
    "to='gguf', quants=['q4_k_m']": "--to gguf --quant q4_k_m",
    "merge_base='nf4'": "--base nf4",
    "`base_model`": "--base-model",
    "vram='12GiB'": "--vram 12GiB",
    "mode='resume'": "--resume",
    "mode='fresh'": "--fresh",
    "verify=False": "--no-verify",
    "to='gguf'": "--to gguf",
    "to='hf'": "--to hf",
    "`tokenizer_pre`": "--tokenizer-pre",
    "`merge_base`": "--base",
    "`overrides` ": "--set ",
    "`rewards`": "--rewards",
    "`imatrix`": "--imatrix",
    "`weights`": "--weights",
    "`max_length`": "--max-length",
    "`limit`": "--limit",
    "`harness`": "--harness",
    "`density`": "--density",
    "`method`": "--method",
    "`seed`": "--seed",
    "`quants`": "--quant",
    "`public`": "--public",
    "`push`": "--push",
    "`yes`": "--yes",
    "`max_kl`": "--max-kl",
    "`dtype`": "--dtype",
    "`questions`": "--questions",
    "`vram`": "--vram",
    "`caches`": "--caches",
    "`plot`": "--plot",
    "`gpu`": "--gpu",
    "`model`": "--model",
    "`json`": "--json",
    "`html`": "--html",
    "`out`": "--out",
    "`of`": "--of",
}


class Command(TyperCommand):
    """A command whose arguments are strangers' text too: what is wrong with them is said as any other error is."""

    def main(self, *arguments: Any, **settings: Any) -> NoReturn:
        code: Any = None
        try:
            surroundings.prepare()
            with answering():  # --help is one
                code = super().main(*arguments, **{**settings, "standalone_mode": False})
        except QloraError as error:
            _say(error.what, error.hint)
            code = error.exit_code
        except _BadArguments as error:
            _say(error.format_message(), f"see {error.ctx.command_path if error.ctx else 'the command'} --help")
            code = error.exit_code
        except OSError as error:  # the work itself is done in `run`
            code = _lost(error)
        except SystemExit as end:
            lost = end.__context__  # typer makes 1 of an output that nobody reads any more
            code = _lost(lost) if isinstance(lost, BrokenPipeError) else end.code
        sys.exit(code or 0)


# typer brings its own copy of click in newer versions, and names only this class's heir.
_BadArguments: Any = typer.BadParameter.__base__


def run(work: Callable[[], None]) -> None:
    """Do a command's work; whatever goes wrong becomes two lines on stderr and an exit code."""
    os.umask(os.umask(0o077) | 0o022)  # what is written is for its owner to change, and for nobody else
    third_party.no_word_to_developers()
    third_party.draw_no_bars()
    third_party.let_waiting_threads_sleep()
    try:
        work()
        if isinstance(sys.stdout, surroundings.NoOutput):
            sys.stdout.lost = False  # what is drawn beside the work is no answer
    except RecipeError as error:
        for problem in error.problems:
            _say(f"{problem.where}: {problem.what}", problem.hint)
        sys.exit(error.exit_code)
    except QloraError as error:
        _say(error.what, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _say("stopped by SIGINT", "run it again; nothing that existed was changed")
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        sys.exit(_no_memory(error) or _lost(error))
    # The one broad except: a fault of ours must not look like the user's. Not Exception alone: a panic of a library
    # in Rust is none, and a library that calls sys.exit() would choose our exit code.
    except BaseException as error:
        if code := _no_memory(error) or _gpu_failed(error):
            sys.exit(code)
        what = f"internal error: {type(error).__name__}: {error}"
        _say(what[:MAX_SAID], f"please report it with {_keep_traceback()}")
        sys.exit(INTERNAL_ERROR)


def _no_memory(error: BaseException) -> int | None:
    """Say that memory ran out, where that is what the error reports; the exit code."""
    if not out_of_memory.is_out_of_memory(error):
        return None
    _say(f"out of memory: {out_of_memory.reason(error)}", "end other programs, or choose smaller settings or files")
    return DoesNotFit.exit_code


def _gpu_failed(error: BaseException) -> int | None:
    """Say how a GPU failed, where that is what the error reports; the exit code."""
    if (fault := out_of_memory.gpu_fault(error)) is None:
        return None
    _say(f"the GPU failed: {fault[0]}", fault[1])
    return TrainingStopped.exit_code


def _lost(error: OSError) -> int:
    """Say what the system refused; the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has gone. Python would complain once more when it flushes stdout at exit.
        drop_output(1)
        return 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1
    _say(*_system_error(error))
    return TrainingStopped.exit_code if error.errno in DISK_FULL else UserError.exit_code


@contextmanager
def answering() -> Iterator[None]:
    """What is printed inside is what the command was asked for: if it can't be written, that is an error."""
    try:
        yield
        sys.stdout.flush()
        if isinstance(sys.stdout, surroundings.NoOutput) and sys.stdout.lost:
            raise OSError(errno.EBADF, "there is none, and the answer is lost", OUTPUT)
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output(1)
        raise OSError(error.errno, error.strerror, error.filename or OUTPUT) from error


def tell(*lines: str) -> None:
    """Print what stands beside the exit code; where nobody can read it, the exit code stands alone."""
    try:
        print(*lines, sep="\n", flush=True)
    except (OSError, ValueError):
        drop_output(1)


def _say(what: str, hint: str) -> None:
    """Two lines: what and where, what to do. Never rich's markup: a message may hold brackets."""
    # A message may quote a stranger's file: one line stays one, and no control character reaches the terminal.
    what, hint = (" ".join(_plain(redact(text)).split()) for text in map(as_options, (what, hint)))
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    label = "\033[1;31merror\033[0m" if colour else "error"
    surroundings.write_errors(sys.stderr, f"{label}: {what}\n       {hint}\n")


def answer(value: Any) -> None:
    """Print what a program asked for as a line of JSON, without secrets and without text that could not be encoded."""
    with answering():
        print(json.dumps(shown.plain_values(redact_all(value), blocks=True)))


def agreed(question: str) -> bool:
    """Whether the person at the terminal says yes."""
    surroundings.write_errors(sys.stderr, f"{shown.one_line(redact(question))} [y/N] ")
    return sys.stdin.readline(16).strip().lower() in ("y", "yes")


def as_options(text: str) -> str:
    """A message's words of the Python API as the options of the commands."""
    for words, option in OPTIONS.items():
        text = text.replace(words, option)
    return text


def _plain(text: str) -> str:
    encoding = sys.stderr.encoding or "utf-8"
    return shown.block(text).encode(encoding, "replace").decode(encoding, "replace")


def _system_error(error: OSError) -> tuple[str, str]:
    """What the system refused, and the usual way out of it."""
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in DISK_FULL and error.filename == OUTPUT:
        hint = "free some space on the disk that the output goes to, then run it again"
    elif error.errno == errno.EBADF and error.filename == OUTPUT:
        hint = "leave it open, or let it go to a file: > FILE"
    elif error.errno in DISK_FULL:
        hint = "free some space (or raise your quota), then go on with --resume; what was saved is intact"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "give yourself the right to read and write there, or name another place"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "raise the limit on open files (ulimit -n), or close other programs"
    else:
        hint = "look at the place and the device that are named, then run it again"
    return f"{place}{reason}", hint


def _keep_traceback() -> str:
    try:
        file = cache_dir() / "crashes" / f"crash-{os.getpid()}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        files.refuse_links(file.parent.parent, file)
        with files.open_to_write(file, "replace", 0o600) as stream:
            stream.write(shown.block(redact(traceback.format_exc())).encode())
    except (OSError, ValueError, QloraError) as error:
        return f"the command and its recipe (the traceback could not be kept: {error})"
    return str(file)


class Signals:
    """SIGINT and SIGTERM: the first one asks the run to stop, the second one ends the process at once.

    Where nobody reads the request (loading, tokenizing, exporting) there is no step to save: then the first signal ends
    the command by an exception, and half-written folders are swept on the way out. It is a KeyboardInterrupt, which
    libraries do not catch; should one swallow it all the same, `Screen` asks again at the next event.

    SIGHUP (the terminal is closed) ends nothing: the run saves, and goes on without a screen. A command that was
    started to outlive its terminal (nohup) ignores it already, and stays so.
    """

    def __init__(self, stop: StopRequest, screen: Screen) -> None:
        self.stop = stop
        self.screen = screen
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt | StopAsked) and self.stop.is_set:
            hint = "run the same command again; a run that has saved a step goes on with --resume"
            raise self.stop.error("outside of training", hint) from None

    def _receive(self, number: int, _frame: Any) -> None:
        if self.stop.is_set:
            os._exit(128 + number)
        self.stop.set(number)
        if not self.stop.is_read:
            raise KeyboardInterrupt

    def _hang_up(self, _number: int, _frame: Any) -> None:
        self.screen.detach(1, 2)  # neither the screen nor an error has a place to be shown


class Screen:
    """A sink that draws through another one for as long as there is somebody to see it.

    A closed pipe or terminal ends the drawing and not the run: it is asked to save, and goes on in silence.
    """

    def __init__(self, inner: Sink | None, stop: StopRequest) -> None:
        self.inner = inner
        self.stop = stop

    def emit(self, event: Event) -> None:
        if self.stop.is_set and not self.stop.is_read:
            raise KeyboardInterrupt  # the first one was swallowed
        if self.inner is not None:
            try:
                if isinstance(event, Notice | Recovered):
                    event = replace(event, message=as_options(event.message))
                self.inner.emit(event)
            except (OSError, ValueError):
                self.detach(1)

    def close(self) -> None:
        if self.inner is not None:
            try:
                self.inner.close()
                sys.stdout.flush()
            except (OSError, ValueError):
                self.detach(1)

    def detach(self, *handles: int) -> None:
        self.inner = None
        self.stop.ask_to_save()
        drop_output(*handles)
