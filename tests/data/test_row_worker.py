"""The process that makes rows: it says why where it cannot, and ends with its pipe."""

from __future__ import annotations

import json
import subprocess
import sys

from qlora import child_process
from qlora.data import row_worker


def test_a_tokenizer_that_differs_is_said_and_ends_it() -> None:
    command = [sys.executable, "-I", row_worker.__file__, json.dumps(child_process.import_path())]
    setup = json.dumps({"tokenizer": {"engine": "{}", "split_special": False, "probe": []}}).encode()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(len(setup).to_bytes(8, "little") + setup)
    process.stdin.flush()
    answer = process.stdout.read(int.from_bytes(process.stdout.read(8), "little"))
    assert b"another one here" in answer
    _, errors = process.communicate(timeout=60)
    assert not errors
