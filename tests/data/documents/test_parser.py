"""One worker for many files, a fresh one after a file that ended it, and bounds that hold."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.data.documents import parser as parsers
from qlora.data.documents import worker
from qlora.data.documents.parsed import NotReadable
from qlora.data.documents.parser import Parser, parser
from qlora.errors import DataError
from tests.data.documents.cases import written

GOOD = b"# Pumps\n\nThe pump is warm."


@pytest.fixture
def opened() -> Iterator[Parser]:
    with parser() as found:
        yield found


def reason(opened: Parser, ending: str, data: bytes) -> str:
    with pytest.raises(NotReadable) as caught:
        opened.parse(ending, data)
    assert caught.value.hint
    return caught.value.reason


def test_one_process_reads_many_files(opened: Parser) -> None:
    first = opened.parse(".md", GOOD)
    process = opened._process
    assert reason(opened, ".pdf", b"nothing") and opened.parse(".md", GOOD) == first
    assert opened._process is process and [block.text for block in first.blocks] == ["Pumps", "The pump is warm."]


def test_a_file_that_ends_the_process_is_an_error_and_the_next_gets_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "worker.py"
    source = Path(worker.__file__).read_text(encoding="utf-8")
    sent = "data = requests.read(size)\n"
    assert sent in source
    trap = (
        sent + "        if data == b'end':\n            os._exit(9)\n        while data == b'turn':\n            pass\n"
    )
    text = source.replace(sent, trap).replace("import json\n", "import json\nimport os\n")
    # The alarm of a second stands before the trap, as it stands before parsing.
    script.write_text(text.replace("        data = req", "        set_alarm(1)\n        data = req"), encoding="utf-8")
    monkeypatch.setattr(worker, "__file__", str(script))
    with parser() as opened:
        assert reason(opened, ".md", b"end") == "it ended the process that reads it (exit code 9)"
        assert opened.parse(".md", GOOD).blocks
        assert reason(opened, ".md", b"turn") == "it takes more than 120 seconds to be read"
        assert opened.parse(".md", GOOD).blocks


def test_the_clock_ends_a_process_that_computes_nothing(monkeypatch: pytest.MonkeyPatch, opened: Parser) -> None:
    opened.parse(".md", GOOD)
    monkeypatch.setattr(parsers, "WALL_SECONDS", 0.2)
    assert opened._process is not None and opened._process.stdout is not None
    line, late = parsers._line(opened._process, opened._process.stdout)  # nothing was asked, nothing comes
    assert (line, late) == (b"", True)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    source = Path(worker.__file__).read_text(encoding="utf-8")
    script.write_text(source.replace("MEMORY_BYTES = 3 << 30", "MEMORY_BYTES = 160 << 20"), encoding="utf-8")
    monkeypatch.setattr(worker, "__file__", str(script))
    with parser() as opened:
        told = reason(opened, ".txt", b"word and " * 4_000_000)
        assert "of memory to be read" in told or told.startswith("it ended the process that reads it")
        assert opened.parse(".txt", b"word and ").blocks


@pytest.mark.parametrize("ending", [".html", ".md", ".txt", ".docx", ".epub", ".pdf"])
def test_deep_nesting_and_nonsense_are_no_traceback(opened: Parser, ending: str) -> None:
    for data in (
        b"<div>" * 3_000 + b"deep",
        b"> " * 5_000 + b"deep",
        b"<table>" * 500,
        b"\xff\xfe" * 9,
        b"[" * 9_999,
    ):
        try:
            assert opened.parse(ending, data).blocks
        except NotReadable as error:
            assert error.reason and "Traceback" not in error.reason


@pytest.mark.parametrize("ending", ["md", "html", "pdf", "docx", "epub"])
def test_files_that_were_changed_at_random_are_read_or_refused_and_end_no_process(opened: Parser, ending: str) -> None:
    chance, good = random.Random(5), written(ending)
    opened.parse(f".{ending}", good)
    process = opened._process
    for _ in range(25):
        data = bytearray(good)
        for _ in range(chance.choice((1, 3, 30))):
            place = chance.randrange(len(data))
            data[place : place + chance.choice((0, 1, 1, 40))] = chance.randbytes(chance.choice((1, 1, 8)))
        try:
            assert opened.parse(f".{ending}", bytes(data)).blocks
        except NotReadable as error:
            assert error.reason and error.hint and "\n" not in error.reason
    assert opened._process is process


def test_bombs_are_refused(opened: Parser) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * (80 << 20))
    assert "unpacks to 1,0" in reason(opened, ".docx", out.getvalue())
    xml = (
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
        + "".join(f'<!ENTITY a{n} "&a;&a;">' for n in range(9))
        + "]><x>&a8;</x>"
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("word/document.xml", xml)
    assert reason(opened, ".docx", out.getvalue()) == "its XML declares entities"


def test_no_process_to_be_had_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(parsers.subprocess, "Popen", refuse)
    with pytest.raises(DataError, match="no process could be started"), parser() as opened:
        opened.parse(".md", GOOD)
