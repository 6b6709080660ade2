"""Rows of tokens by several processes of our own, in the order of the rows whoever is ready first.

They are started as the process is that renders templates, never by multiprocessing: a plain script or a notebook would
be started again by that. One that ends or does nothing for HANG_SECONDS is replaced and its batches are made once more;
the second time that a batch ends its process, it is an error that names the rows.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import IO, Any

from qlora import child_process
from qlora.cores import usable_cores
from qlora.data import row_worker
from qlora.data.light_tokenizer import travelling
from qlora.data.made_rows import MadeBatch, RawBatch, RowMaker, asked, unpacked
from qlora.data.render import KEPT_VARIABLES
from qlora.device import available_ram
from qlora.errors import TokenizerError

# A batch is a second's work; a machine that swaps or is asked by twenty others may take a hundred times as long.
HANG_SECONDS = 300.0
TRIES = 2  # of a batch
AHEAD = 2  # batches that a process has: one that it makes, and one to go on with
# Of one answer. A batch is at most a row of 8 MiB and what MAX_BATCH_BYTES lets stand beside it.
MAX_FRAME_BYTES = 1 << 30


# Files of fewer bytes are done before processes have started, which takes each of them a second.
MIN_BYTES = 4 << 20
MAX_WORKERS = 32  # whoever reads the files is busy by then
# Of a process with the one that renders for it: 90 MiB, and a tokenizer's own tables in eight times its file.
WORKER_BYTES, ENGINE_GROWTH = 200 << 20, 8
MEMORY_SHARE = 4  # of the memory that is free, at most one in so many


def how_many(rows_bytes: int, engine_bytes: int) -> tuple[int, int]:
    """Processes for files of so many bytes, and threads of each one's tokenizer; (0, 0) where one does better alone."""
    cores = usable_cores()
    room = available_ram() // MEMORY_SHARE // (WORKER_BYTES + ENGINE_GROWTH * engine_bytes)
    workers = min(cores, MAX_WORKERS, room)
    return (workers, max(1, cores // workers)) if workers > 1 and rows_bytes >= MIN_BYTES else (0, 0)


class RowWorkers:
    """Makes batches as `maker` does, by processes where there are `rows_bytes` enough for it.

    A context manager: the processes end with it. Where one does not start, or does not do what `maker` does, `maker`
    itself makes all that is left.
    """

    def __init__(self, maker: RowMaker, rows_bytes: int) -> None:
        self._maker = maker
        self._answers: queue.SimpleQueue[tuple[_Worker, bytes | None]] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._made: dict[int, MadeBatch] = {}
        self._tries: dict[int, int] = {}
        self._setup, self._threads = b"", 1
        if rows_bytes >= MIN_BYTES and (setup := setup_of(maker)) is not None:
            workers, self._threads = how_many(rows_bytes, len(setup["tokenizer"]["engine"]))
            self._setup = json.dumps(setup).encode()
            with suppress(OSError):
                self._workers = [self._start() for _ in range(workers)]

    def __enter__(self) -> RowWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def made(self, batches: Iterator[RawBatch]) -> Iterator[tuple[RawBatch, MadeBatch]]:
        """Each batch and what became of it, in their order. Raises TokenizerError for one that cannot be made."""
        waiting: deque[tuple[int, RawBatch]] = deque()
        for number, batch in enumerate(batches):
            waiting.append((number, batch))
            if self._workers:
                min(self._workers, key=lambda one: len(one.asked)).ask(number, batch)
            while waiting and (len(waiting) > AHEAD * len(self._workers) or waiting[0][0] in self._made):
                yield waiting[0][1], self._first(*waiting.popleft())
        while waiting:
            yield waiting[0][1], self._first(*waiting.popleft())

    def _first(self, number: int, batch: RawBatch) -> MadeBatch:
        while number not in self._made and self._workers:
            self._take(next(one for one in self._workers if number in one.asked))
        return self._made.pop(number) if number in self._made else self._maker.made(batch)

    def _take(self, awaited: _Worker) -> None:
        """Take one answer of any process; `awaited` is the one that has the next batch."""
        try:
            worker, answer = self._answers.get(timeout=max(0.0, awaited.since + HANG_SECONDS - time.monotonic()))
        except queue.Empty:
            self._replace(awaited, f"did nothing for {HANG_SECONDS:.0f} s")
            return
        if worker not in self._workers:
            return  # it has been replaced
        worker.since = time.monotonic()
        if answer is None:
            self._replace(worker, worker.how_it_ended())
        elif worker.ready:
            done = next(iter(worker.asked))  # they are made in the order in which they were asked
            del worker.asked[done]
            self._made[done] = unpacked(answer)
        elif answer == row_worker.READY:
            worker.ready = True
        else:
            self._close()

    def _replace(self, worker: _Worker, why: str) -> None:
        """Another process in the place of one that ended, with what it had been asked."""
        worker.end()
        if not worker.ready:
            self._close()
            return
        number, batch = next(iter(worker.asked.items()))
        self._tries[number] = self._tries.get(number, 0) + 1
        if self._tries[number] >= TRIES:
            what = f"{batch.rows[0][0]} to {batch.rows[-1][0]}: the process that tokenizes them {why}, twice"
            raise TokenizerError(what, "close other programs (memory may be short), or find the row: halve the data")
        try:
            new = self._start()
        except OSError:
            self._close()
            return
        self._workers[self._workers.index(worker)] = new
        for number, batch in worker.asked.items():
            new.ask(number, batch)

    def _close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _start(self) -> _Worker:
        return _Worker(self._setup, self._threads, self._answers)


def setup_of(maker: RowMaker) -> dict[str, Any] | None:
    """What a process needs to make what `maker` makes; None for a tokenizer that cannot be sent, or for a template
    that had to be stopped already: each process would wait for it again."""
    chat = maker.chat
    tokenizer = None if chat.bounds else travelling(chat.tokenizer, chat.templates if chat.template else ())
    if tokenizer is None:
        return None
    limits = asdict(maker.limits)
    return {"tokenizer": tokenizer, "loss_on": chat.loss_on, "limits": limits, "max_length": maker.max_length}


class _Worker:
    """A running process, with a thread that writes what it is asked and one that reads what it answers."""

    def __init__(self, setup: bytes, threads: int, answers: queue.SimpleQueue[tuple[_Worker, bytes | None]]) -> None:
        command = [sys.executable, "-I", str(row_worker.__file__), json.dumps(child_process.import_path())]
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        environment |= {
            "RAYON_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false",
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.asked: dict[int, RawBatch] = {}
        self.ready = False
        self.since = time.monotonic()  # of its last answer, or of what it was asked when it had nothing to do
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._frames.put(setup)
        for target, args in ((_send, (self._process.stdin, self._frames)), (self._receive, (answers,))):
            threading.Thread(target=target, args=args, daemon=True).start()

    def ask(self, number: int, batch: RawBatch) -> None:
        if not self.asked:
            self.since = time.monotonic()
        self.asked[number] = batch
        self._frames.put(asked(batch))

    def end(self) -> None:
        self._frames.put(None)
        self._process.kill()
        self._process.wait()

    def how_it_ended(self) -> str:
        return f"ended with {child_process.how_it_ended(self._process.wait())}"

    def _receive(self, answers: queue.SimpleQueue[tuple[_Worker, bytes | None]]) -> None:
        stream = self._process.stdout
        assert stream is not None
        while len(head := stream.read(8)) == 8:
            size = int.from_bytes(head, "little")
            if size > MAX_FRAME_BYTES or len(frame := stream.read(size)) < size:
                break
            answers.put((self, frame))
        answers.put((self, None))
        stream.close()


def _send(stream: IO[bytes], frames: queue.SimpleQueue[bytes | None]) -> None:
    with suppress(OSError, ValueError):  # the process has gone, which whoever reads its answers sees
        while (frame := frames.get()) is not None:
            stream.write(len(frame).to_bytes(8, "little"))
            stream.write(frame)
            stream.flush()
    with suppress(OSError, ValueError):
        stream.close()
