"""What every command shares: errors as two lines with an exit code, and signals as a request to stop."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qlora import files, third_party
from qlora.disk import DISK_FULL, cache_dir
from qlora.errors import QloraError, RecipeError, TrainingStopped, UserError
from qlora.events import Notice, Recovered
from qlora.redaction import redact
from qlora.stop import StopAsked

if TYPE_CHECKING:
    from qlora.events import Event, Sink
    from qlora.stop import StopRequest

INTERNAL_ERROR = 1
# Below the commands, messages speak the Python API's language; here its words become options. Longer ones first.
OPTIONS = {
    "to='gguf', quants=['q4_k_m']": "--to gguf --quant q4_k_m",
    "merge_base='nf4'": "--base nf4",
    "vram='12GiB'": "--vram 12GiB",
    "mode='resume'": "--resume",
    "mode='fresh'": "--fresh",
    "verify=False": "--no-verify",
    "to='gguf'": "--to gguf",
    "to='hf'": "--to hf",
    "`tokenizer_pre`": "--tokenizer-pre",
    "`merge_base`": "--base",
    "`overrides` ": "--set ",
    "`imatrix`": "--imatrix",
    "`quants`": "--quant",
    "`max_kl`": "--max-kl",
    "`dtype`": "--dtype",
    "`vram`": "--vram",
    "`plot`": "--plot",
    "`gpu`": "--gpu",
    "`out`": "--out",
}


def run(work: Callable[[], None]) -> None:
    """Do a command's work; whatever goes wrong becomes two lines on stderr and an exit code."""
    os.umask(os.umask(0o077) | 0o022)  # what is written is for its owner to change, and for nobody else
    third_party.no_word_to_developers()
    third_party.let_waiting_threads_sleep()
    try:
        work()
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
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes stdout at exit.
        drop_output(1)
        sys.exit(128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 1)
    except OSError as error:
        _say(*_system_error(error))
        sys.exit(TrainingStopped.exit_code if error.errno in DISK_FULL else UserError.exit_code)
    except Exception as error:  # the one broad except: a fault of ours must not look like the user's
        _say(f"internal error: {type(error).__name__}: {error}", f"please report it with {_keep_traceback()}")
        sys.exit(INTERNAL_ERROR)


def _say(what: str, hint: str) -> None:
    """Two lines: what and where, what to do. Never rich's markup: a message may hold brackets."""
    # A message may quote a stranger's file: one line stays one, and no control character reaches the terminal.
    what, hint = (" ".join(_plain(redact(text)).split()) for text in map(as_options, (what, hint)))
    try:
        colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        label = "\033[1;31merror\033[0m" if colour else "error"
        print(f"{label}: {what}\n       {hint}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        drop_output(1, 2)  # the terminal is gone; the exit code still reports it


def as_options(text: str) -> str:
    """A message's words of the Python API as the options of the commands."""
    for words, option in OPTIONS.items():
        text = text.replace(words, option)
    return text


def _plain(text: str) -> str:
    printable = "".join(letter if letter.isprintable() or letter in "\n\t " else "\ufffd" for letter in text)
    encoding = sys.stderr.encoding or "utf-8"
    return printable.encode(encoding, "replace").decode(encoding, "replace")


def _system_error(error: OSError) -> tuple[str, str]:
    """What the system refused, and the usual way out of it."""
    place = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in DISK_FULL:
        hint = "free some space (or raise your quota), then go on with --resume; what was saved is intact"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "give yourself the right to read and write there, or name another place"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "raise the limit on open files (ulimit -n), or close other programs"
    else:
        hint = "look at the place and the device that are named, then run it again"
    return f"{place}{reason}", hint


def drop_output(*handles: int) -> None:
    """Nobody reads these any more (1 is stdout, 2 stderr): what is still written goes nowhere, and fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for handle in handles:
        os.dup2(nowhere, handle)
    os.close(nowhere)


def _keep_traceback() -> str:
    try:
        folder = cache_dir() / "crashes"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"crash-{os.getpid()}.txt"
        files.refuse_links(folder.parent, file)
        with files.open_to_write(file, "replace", 0o600) as stream:
            stream.write(redact(traceback.format_exc()).encode("utf-8", "backslashreplace"))
    except (OSError, files.UnsafePathError, UserError) as error:
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
