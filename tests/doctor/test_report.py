"""The JSON that may be attached to a report: no path, no name, no program, no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.doctor import report
from qlora.doctor.caches import Kept
from qlora.doctor.finding import green, red, yellow


def test_nothing_of_the_owner_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "maria.rossi")
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret00")
    lines = [
        green("disk: runs", "55 of 252 GiB are free", "/home/maria.rossi/runs", {"free_bytes": 7}),
        red("torch", f"OSError: {tmp_path}/lib/libtorch.so: cannot open; hf_secretsecretsecret00", "mend"),
        yellow("GPU memory", "1 of 2 GiB", "end them", "held by thesis_of_maria.rossi (77)"),
        red("driver", "too old", "pip install torch --index-url https://download.pytorch.org/whl/cu126"),
    ]
    found = report.as_dict(lines)
    text = json.dumps(found)
    for word in ("maria", "rossi", str(tmp_path), "hf_secret", "thesis", "(77)"):
        assert word not in text, word
    assert found["worst"] == "red" and found["count"] == {"green": 1, "yellow": 1, "red": 2}
    assert found["checks"][0]["figures"] == {"free_bytes": 7}
    assert "https://download.pytorch.org/whl/cu126" in found["checks"][3]["mend"]


def test_caches_are_told_with_their_folders() -> None:
    entries = [Kept("tokens", Path("/c/a"), 5, "rows"), Kept("hub", Path("/h"), 7, "models", "not ours")]
    found = report.caches_as_dict(entries, ["/c/a"])
    assert found["bytes"] == 12 and [one["cleared"] for one in found["entries"]] == [True, False]
