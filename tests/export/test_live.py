"""A child that dies, says no or is silent becomes two lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qlora.errors import DoesNotFit, ExportError, QloraError
from qlora.export.llama_cpp import live
from qlora.export.llama_cpp.live import open_live

CHILD = """
import json, sys, os, signal, struct
asked = json.loads(sys.stdin.readline())
print(json.dumps({"tokens": 3}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    {then}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    return tmp_path / "x.gguf"


@pytest.fixture
def opened(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[live.Live]:
    """A child that does what the test says with a request."""
    (tmp_path / "child.py").write_text(CHILD.replace("{then}", request.param))
    monkeypatch.setattr(live.live_child, "__file__", str(tmp_path / "child.py"))
    with open_live(file, 100) as found:
        assert found.about == {"tokens": 3}
        yield found
    assert found._process.poll() is not None


@pytest.mark.parametrize(
    "opened",
    ["sys.stdout.buffer.write(b'{\"logits\": 12}\\n' + struct.pack('<3f', 1, 2, 3)); sys.stdout.flush()"],
    indirect=True,
)
def test_logits_come_behind_their_line(opened: live.Live) -> None:
    for _ in range(2):
        found = opened.extend([1, 2], 0, True)
        assert found is not None and np.array_equal(found, [1, 2, 3])


@pytest.mark.parametrize(
    ("opened", "error", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGABRT)", ExportError, r"llama.cpp crashed \(SIGABRT\)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", DoesNotFit, "out of memory"),
        ("sys.stderr.write('x: error: bad magic\\n'); sys.exit(9)", ExportError, "bad magic"),
        ("print(json.dumps({'failed': 'not of this kind'}), flush=True)", ExportError, "not of this kind"),
        ("print(json.dumps({'failed': 'llama.cpp has no memory for 9'}), flush=True)", DoesNotFit, "no memory for 9"),
    ],
    indirect=["opened"],
)
def test_a_child_that_ends_is_two_lines(opened: live.Live, error: type[QloraError], said: str) -> None:
    for _ in range(2):  # who asks after that is told as well, and does not wait
        with pytest.raises(error, match=said) as raised:
            opened.tokenize("hi")
        assert "x.gguf" in raised.value.what and raised.value.hint


ONCE = """
    first = not os.path.exists(asked["file"] + ".seen"); open(asked["file"] + ".seen", "w")
    if first: sys.stderr.write("error: out of memory\\n"); os.kill(os.getpid(), signal.SIGABRT)
    print(json.dumps({"lost": True} if request.get("start") else {"ids": [7]}), flush=True)"""


@pytest.mark.parametrize("opened", [ONCE], indirect=True)
def test_a_child_that_has_ended_is_started_anew_and_has_forgotten_the_row(opened: live.Live) -> None:
    with pytest.raises(QloraError):
        opened.extend([1], 3, True)
    assert opened.extend([1], 3, True) is None and opened.tokenize("hi") == [7]
    opened._process.kill()  # while nothing is asked: nobody notices
    opened._process.wait()
    assert opened.tokenize("hi") == [7]


TELLS = """
    line = {"logits": 4} if "ids" in request else {"ids": [len(request["text"])]}
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\\n" + b"abcd" * ("ids" in request)); sys.stdout.flush()"""


@pytest.mark.parametrize("opened", [TELLS], indirect=True)
@pytest.mark.parametrize("waited", [0, 1])
def test_an_answer_that_nobody_waited_for_is_not_the_next_ones(
    opened: live.Live, monkeypatch: pytest.MonkeyPatch, waited: int
) -> None:
    """A notebook's kernel lives on after an interrupt, and so does the chat in it."""

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(opened, ["_more", "_take"][waited], interrupted)
        opened.extend([1, 2, 3], 0, True) if waited else opened.tokenize("one")
    assert opened.tokenize("four") == [4]
    child = opened._process
    assert opened.extend([1], 0, True) is not None and opened.tokenize("eight") == [5] and opened._process is child


@pytest.mark.parametrize("opened", ["os.kill(os.getpid(), signal.SIGABRT)"], indirect=True)
def test_a_child_that_is_started_anew_must_find_the_same_file(opened: live.Live) -> None:
    with pytest.raises(ExportError, match="crashed"):
        opened.tokenize("hi")
    opened.about = {"tokens": 4}
    for _ in range(2):
        with pytest.raises(ExportError, match="another file than the one that was opened"):
            opened.tokenize("hi")
    opened.about = {"tokens": 3}


@pytest.mark.parametrize("opened", ["pass"], indirect=True)
def test_a_child_that_is_silent_is_not_waited_for(opened: live.Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "START_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(ExportError, match="did not answer in time"):
            opened.tokenize("hi")
    assert opened._process.poll() is not None  # a late answer would be taken for another's


def test_without_llama_cpp_the_command_that_installs_it_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "find_runtime", lambda: None)
    with pytest.raises(ExportError, match="not installed") as raised, open_live(file, 100):
        pass
    assert "pip install" in raised.value.hint and sys.executable
