"""The process that reads documents. Run by its path, by `parser.py`, and by nobody else.

A document is a stranger's file, and its parsers are large: PDFium is C++, a DOCX is XML in a zip. They run here, in a
process that has no secrets in its environment, can write no file, holds no more than MEMORY_BYTES, and is ended by the
system when it has computed for SECONDS on one file. It is given bytes and no path.

In, for each file: a line `[ending, number of bytes]`, then the bytes. Out: a line of JSON for each, in order:
{"blocks": [[kind, text, level, rows], ...], "pages", "left_out": [[what, count], ...]}, or {"error", "hint"}.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.data.documents.parsed import Parsed

SECONDS = 120  # of computing, for one file: 5,000 pages of a PDF take about half of it
MEMORY_BYTES = 3 << 30
OUTPUT_BYTES = 256 << 20  # of text that one file becomes
_BROKEN = "make it anew from its source, or leave it out"
_CODECS = ("utf-16-le", "utf-16-be", "utf-32-le", "cp1252", "cp437")


def _reader(module: str) -> Callable[[bytes], Parsed]:
    """The reader of that name, alone imported: what another needs may not be installed."""
    if module == "docx":
        from qlora.data.documents.docx import parse as reader
    elif module == "epub":
        from qlora.data.documents.epub import parse as reader
    elif module == "html":
        from qlora.data.documents.html import parse as reader
    elif module == "markdown":
        from qlora.data.documents.markdown import parse as reader
    elif module == "pdf":
        from qlora.data.documents.pdf import parse as reader
    elif module == "text":
        from qlora.data.documents.text import parse as reader
    else:
        raise ValueError(f"there is no reader {module}")
    return reader


def parse(module: str, data: bytes) -> dict[str, Any]:
    """What the reader of that name makes of a file's bytes, or why it cannot."""
    from qlora.data.documents.blocks import finished
    from qlora.data.documents.parsed import NotReadable
    from qlora.errors import foreign_failures

    with foreign_failures(memory_too=True) as failure:
        parsed = _reader(module)(data)
        blocks = finished(parsed.blocks)
        if not blocks:
            raise NotReadable("there is no text in it", "leave it out, or give its text as .txt")
        size = sum(len(block.text) + sum(len(cell) for row in block.rows for cell in row) for block in blocks)
        if size > OUTPUT_BYTES // 4:
            raise NotReadable(f"it becomes {size:,} characters of text (at most {OUTPUT_BYTES // 4:,})", _BROKEN)
        told = [[block.kind, block.text, block.level, block.rows] for block in blocks]
        return {"blocks": told, "pages": parsed.pages, "left_out": parsed.left_out}
    if isinstance(failure.error, NotReadable):
        return {"error": failure.error.reason, "hint": failure.error.hint}
    if isinstance(failure.error, MemoryError):
        return {"error": f"it needs more than {MEMORY_BYTES >> 30} GiB of memory to be read", "hint": _BROKEN}
    if isinstance(failure.error, RecursionError):
        return {"error": "what is in it is nested too deep", "hint": _BROKEN}
    return {"error": f"it cannot be read ({failure.reason})", "hint": _BROKEN}


def confine() -> None:
    """Give up what reading does not need. Windows has no such limits: there the parent's clock and count are all."""
    from qlora.child_process import limit_itself

    limit_itself({"AS": MEMORY_BYTES, "FSIZE": 0, "CORE": 0})


def set_alarm(seconds: float) -> None:
    """The system ends the process when it has computed for so long from now on; 0 calls it off. Windows cannot."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's: a parser may lie in a user's own site folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # when to end is the parent's business
    from qlora.data.documents.kinds import KINDS

    for codec in _CODECS:  # loaded late otherwise, when memory may be short
        "".encode(codec)
    confine()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(b"ready\n")
    replies.flush()
    while line := requests.readline():
        ending, size = json.loads(line)
        data = requests.read(size)
        if len(data) < size:  # the parent has gone, or could not read the file to its end
            return
        set_alarm(SECONDS)
        reply = json.dumps(parse(KINDS[ending].module, data), ensure_ascii=False)
        set_alarm(0)
        replies.write(reply.encode("utf-8", "replace") + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
