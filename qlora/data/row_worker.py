"""The process that makes rows of tokens. Run by its path, by `row_workers.py`, and by nobody else.

It imports no torch and no transformers, and has a process of its own that renders chat templates. What it is sent comes
from the process that started it; when that has gone, however it went, the pipe ends and this process with it.

In: frames (8 bytes of length, then values): first JSON of what a `RowMaker` is made of, then what `asked` makes of each
batch. Out: frames, first `ready` or why not, then what `packed` makes of each batch, in order.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import IO, Any

READY = b"ready"


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    from qlora.child_process import limit_itself

    limit_itself({"FSIZE": 0, "CORE": 0})  # it writes no file, and rows are nobody's business
    # Ctrl-C reaches every process of a terminal; when to end is the parent's business, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, frames), name="parent", daemon=True).start()
    out = sys.stdout.buffer
    try:
        maker = _maker(json.loads(frames.get()))
    except ValueError as error:
        _write(out, str(error).encode())
        os._exit(1)  # the thread that reads holds the pipe
    from qlora.data.made_rows import packed, understood

    _write(out, READY)
    while True:
        _write(out, packed(maker.made(understood(frames.get()))))


def _maker(setup: dict[str, Any]) -> Any:
    from qlora.data.chat import ChatTokenizer
    from qlora.data.light_tokenizer import LightTokenizer
    from qlora.data.limits import TextLimits
    from qlora.data.made_rows import RowMaker
    from qlora.events import Sinks

    tokenizer: Any = LightTokenizer(setup["tokenizer"])
    chat = ChatTokenizer(tokenizer, setup["loss_on"], Sinks())
    return RowMaker(chat, TextLimits(**setup["limits"]), setup["max_length"])


def _write(out: IO[bytes], data: bytes) -> None:
    out.write(len(data).to_bytes(8, "little") + data)
    out.flush()


def _read(stream: IO[bytes], frames: queue.SimpleQueue[bytes]) -> None:
    while len(head := stream.read(8)) == 8:
        frames.put(stream.read(int.from_bytes(head, "little")))
    os._exit(1)  # the parent has gone, and threads of native libraries may be at work


if __name__ == "__main__":
    main()
