"""A child process: its answer, what it printed, and how it ended."""

from __future__ import annotations

import json
from pathlib import Path

from qlora.export import child


def test_request_answer_and_log(tmp_path: Path) -> None:
    """json.tool prints the request that it is given, and answers nothing."""
    done = child.run("json.tool", {"rows": range(3), "name": "an  Error"}, tmp_path, 60)
    assert (done.code, done.answer) == (0, {})
    assert json.loads("".join(done.log)) == {"rows": [0, 1, 2], "name": "an Error"}
    assert done.last_line() == "}" and done.last_line("error", "assert") == '"name": "an Error"'
    assert done.last_line("segmentation") == ""
    child.write_answer(tmp_path / "request.json", {"results": []})
    assert child.run("json.tool", {}, tmp_path, 60).answer == {"results": []}
    assert child.read_request(tmp_path / "request.json") == {}


def test_a_child_that_fails_and_one_that_takes_too_long(tmp_path: Path) -> None:
    done = child.run("no_such_module", {}, tmp_path, 60)
    assert done.code == 1 and done.last_line() == "ImportError: No module named no_such_module"
    assert child.run("json.tool", {}, tmp_path, 0.0).code is None
