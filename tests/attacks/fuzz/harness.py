"""Inputs in forked children of one warmed process, watched from outside: what each does to time, memory and files.

What an input may do: nothing, or end in a `QloraError` (`what` and `hint`, a line each, under 2,000 characters, exit
code 2, 3 or 4). Everything else is a finding: another error, more than 5 s, more than 1 GiB, a control character on the
screen, a marker file, a changed file of somebody else's, a child that died.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import selectors
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.attacks.fuzz.seen import Work, show

LIMIT_SECONDS = 5.0
BUSY = 6  # so many times the limit, on a machine that is busy with other work
LIMIT_GROWTH_BYTES = 1 << 30
DATA_BYTES = 3 << 30  # beyond what a child has: more than this is refused to it, so that no input takes the machine
CHUNK = 50  # inputs of one child
STACK = "stack.txt"  # where a child was when its time was up
BYSTANDERS = {
    "thesis.txt": "years of work\n",
    "diary.txt": "dear diary\n",
    "photos/list.json": "{}",
    "rows.jsonl": "{}\n",
}

Item = tuple[str, int | str]  # a door, and an index or a name


@dataclass(frozen=True)
class Scene:
    """One input's surroundings: an empty folder, good things to copy from, and chance.

    `bystander` is a file of the user's that no input may change; `marker` is what a program that ran would leave.
    """

    place: Path
    goods: Any
    chance: Random
    bystander: Path
    marker: Path

    def pipe(self) -> Path:
        path = self.place / "pipe"
        if not path.exists():
            os.mkfifo(path)
        return path

    def spares(self, name: str) -> bool:
        """Whether writing below that path leaves the machine as it was: it lies in this scene, or can't be written."""
        try:
            place = Path(os.path.abspath(os.path.expanduser(name)))
            nearest = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
        except (ValueError, OSError):
            return True
        return place.is_relative_to(self.place) or not nearest.is_dir() or not os.access(nearest, os.W_OK)

    @property
    def paths(self) -> tuple[str, ...]:
        return (str(self.pipe()), "/dev/zero", str(self.bystander), str(self.bystander.parent), str(self.place))


@dataclass(frozen=True)
class Door:
    """`make` puts an input into its scene and returns the work that opens it, for which it has so many seconds.

    `every`: of so many inputs that are asked for, one is made.
    """

    name: str
    make: Callable[[Scene], Work]
    seconds: float = LIMIT_SECONDS
    every: int = 1


@dataclass(frozen=True)
class Outcome:
    """What came of an input. `fault` is "" unless it is a finding."""

    door: str
    index: int | str
    code: int = 0
    fault: str = ""
    detail: str = ""
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    growth_bytes: int = 0


@dataclass(frozen=True)
class Fuzzer:
    """The doors with what they need: `goods`, made once, and a `scratch` folder for what the children make."""

    doors: Mapping[str, Door]
    goods: Any
    scratch: Path
    bystanders: Path
    seed: int = 1
    named: Mapping[str, Mapping[str, Callable[[Scene], Work]]] = field(default_factory=dict)

    def scene(self, door: str, index: int | str) -> Scene:
        """Empty, and the same for the same input, but for the number of the process in its path."""
        place = self.scratch / f"{os.getpid()}" / "place"
        _remove(place)
        place.mkdir(parents=True)
        os.chdir(place)
        os.environ["QLORA_CACHE"] = str(place.parent / "cache")
        chance = Random(f"{door}:{self.seed}:{index}")
        return Scene(place, self.goods, chance, write_bystanders(self.bystanders), place / "marker")

    def outcome(self, door: str, index: int | str) -> Outcome:
        """Do one input in this process: one of the endless ones by its number, or one of the `named` ones."""
        scene = self.scene(door, index)
        make = self.doors[door].make if isinstance(index, int) else self.named[door][index]
        work = make(scene)
        before, umask = _listing(self.bystanders), _umask()
        held = _peak_from_now()
        start = time.monotonic()
        shown = show(work)
        seconds = time.monotonic() - start
        growth = _status("VmHWM") - held
        os.chdir("/")
        os.umask(umask)
        faults = [shown.fault] if shown.fault else []
        if growth > LIMIT_GROWTH_BYTES:
            faults.append(f"grew by {growth / 2**30:.1f} GiB")
        if scene.marker.exists() or (scene.place.parent / "marker").exists():
            faults.append("a marker was left: something ran")
        if _listing(self.bystanders) != before:
            faults.append("a bystander's file was changed")
        fault, detail = "; ".join(faults), shown.detail if faults else ""
        return Outcome(door, index, shown.code, fault, detail, shown.out[-9000:], shown.err[-9000:], seconds, growth)

    def run(self, wanted: Iterable[Item], jobs: int) -> Iterator[Outcome]:
        """Every wanted input once, in `jobs` children at a time. An input that took too long has a second try."""
        chunks = _chunks(wanted)
        late: list[Item] = []
        for outcome in self._supervise(chunks, jobs):
            if outcome.fault.startswith("took over"):
                late.append((outcome.door, outcome.index))
            else:
                yield outcome
        yield from self._supervise([[item] for item in late], 1)

    def _supervise(self, chunks: list[list[Item]], jobs: int) -> Iterator[Outcome]:
        waiting = list(reversed(chunks))
        running: dict[int, _Child] = {}
        with selectors.DefaultSelector() as selector:
            while waiting or running:
                while waiting and len(running) < jobs:
                    child = _Child.fork(self, waiting.pop())
                    running[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                ready = {key.fd for key, _ in selector.select(0.2)}
                for pipe, child in list(running.items()):
                    if pipe in ready:
                        yield from child.read()
                    limit = self.doors[child.left[0][0]].seconds if child.left else 0.0
                    if not child.ended and child.is_late(limit):
                        child.kill(f"took over {limit:g} s")
                    if child.ended:
                        selector.unregister(pipe)
                        del running[pipe]
                        if (lost := child.reap()) is not None:
                            yield lost
                        if child.left:
                            waiting.append(child.left)


def _chunks(wanted: Iterable[Item]) -> list[list[Item]]:
    chunks: list[list[Item]] = []
    for item in wanted:
        if not chunks or len(chunks[-1]) == CHUNK or chunks[-1][0][0] != item[0]:
            chunks.append([])
        chunks[-1].append(item)
    return chunks


@dataclass
class _Child:
    """A forked child that works through inputs and writes a line when one begins and when it has ended."""

    pid: int
    pipe: int
    left: list[Item]
    scratch: Path
    begun: float = 0.0
    used: float = 0.0  # seconds of the processor, when its input began
    ended: bool = False
    fault: str = ""
    _rest: bytes = b""

    @classmethod
    def fork(cls, fuzzer: Fuzzer, items: list[Item]) -> _Child:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with suppress(BaseException):
                _work_through(fuzzer, items, writing)
            os._exit(0)
        os.close(writing)
        os.set_blocking(reading, False)
        return cls(pid, reading, list(items), fuzzer.scratch / f"{pid}")

    def read(self) -> Iterator[Outcome]:
        while True:
            try:
                data = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.ended = True
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                if line == b"begin":
                    self.begun, self.used = time.monotonic(), _processor_seconds(self.pid)
                    continue
                values = json.loads(line)
                self.begun = 0.0
                del self.left[0]
                yield Outcome(**values)

    def is_late(self, limit: float) -> bool:
        """Whether its input has taken too long: of the processor, or waiting. Others may keep it from both."""
        elapsed = time.monotonic() - self.begun if self.begun else 0.0
        if elapsed <= limit:
            return False
        used = _processor_seconds(self.pid) - self.used
        return used > limit or used < elapsed / 20 or elapsed > BUSY * limit

    def kill(self, fault: str) -> None:
        """End it, once it has written down where it is."""
        self.fault, self.ended = fault, True
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.3)
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> Outcome | None:
        """Wait for the end. The outcome of the input that it died over, if it did."""
        _, status = os.waitpid(self.pid, 0)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started and left
        os.close(self.pipe)
        stack = self.scratch / STACK
        detail = stack.read_text(errors="replace") if stack.is_file() else ""
        _remove(self.scratch)
        if not self.left:
            return None
        code = os.waitstatus_to_exitcode(status)
        door, index = self.left.pop(0)
        return Outcome(door, index, code, self.fault or f"the process died (exit code {code})", detail)


def _work_through(fuzzer: Fuzzer, items: list[Item], writing: int) -> None:
    """In the child: input after input, each reported."""
    os.setpgid(0, 0)
    place = fuzzer.scratch / f"{os.getpid()}"
    place.mkdir(parents=True, exist_ok=True)
    stack = (place / STACK).open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nowhere, handle)
    limit = _status("VmData") + DATA_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for door, index in items:
        os.write(writing, b"begin\n")
        try:
            outcome = fuzzer.outcome(door, index)
        except BaseException:
            outcome = Outcome(door, index, -1, "the door itself failed", traceback.format_exc())
        os.write(writing, json.dumps(asdict(outcome)).encode() + b"\n")


# --- the process and its files ---------------------------------------------------------------------------------------


def _status(name: str) -> int:
    """Bytes that Linux says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ValueError(name)


def _processor_seconds(pid: int) -> float:
    """What Linux says that a process has used; 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_from_now() -> int:
    """Forget the highest memory so far; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _umask() -> int:
    old = os.umask(0o022)
    os.umask(old)
    return old


def write_bystanders(folder: Path) -> Path:
    """Files of the user's that nothing here may touch; one of them."""
    for name, text in BYSTANDERS.items():
        if not (file := folder / name).is_file() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return folder / next(iter(BYSTANDERS))


def _listing(folder: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_mode, status.st_size, status.st_mtime_ns))
    return found


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
