"""The JSON of proofs: hardware, versions and figures; no path, and no name of a person or a machine."""

from __future__ import annotations

import getpass
import json
import platform
import tempfile
from pathlib import Path

import pytest

from qlora.prove import report
from qlora.prove.proof import Outcome, Proof
from qlora.prove.suite import Result
from tests.card import Card, rehearsal
from tests.prove.cases import place

PROOF = Proof("p", "promise", "0", "source", lambda place: Outcome(True, ""))


def results(*outcomes: Outcome) -> list[Result]:
    return [Result(PROOF, outcome, 1.25) for outcome in outcomes]


def test_what_was_found_is_counted(tmp_path: Path) -> None:
    found = report.as_dict(
        place(tmp_path), results(Outcome(True, "a", {"x": 1}), Outcome(False, "b"), Outcome(None, "c"))
    )
    assert found["outcomes"] == {"held": 1, "broken": 1, "not here": 1} and found["seconds"] == 3.8
    assert found["proofs"][0]["measured"] == {"x": 1} and found["format"] == 1
    assert found["hardware"]["device"] == "cpu" and found["versions"]["torch"]
    json.dumps(found)


def test_a_card_is_described_and_a_laptop_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rehearsal(monkeypatch, Card(name="NVIDIA GeForce RTX 4060 Laptop GPU", capability=(8, 9))):
        facts = report.hardware_facts(place(tmp_path))
    assert facts["laptop"] is True and facts["capability"] == "8.9" and facts["total_bytes"] == 2**30


def test_no_path_and_no_name_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "maria.rossi")
    monkeypatch.setenv("HOME", "/home/maria.rossi")
    monkeypatch.setattr(platform, "node", lambda: "workhorse.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "mrossi")
    said = (
        f"{tmp_path}/x: no space; /home/maria.rossi/runs/a.bin, C:\\Users\\mrossi\\runs; on workhorse, maria.rossi; "
        f"{tempfile.gettempdir()}/qlora-prove-1; hf_ThisIsTheHubTokenOfATest0123"
    )
    text = json.dumps(report.as_dict(place(tmp_path), results(Outcome(False, said, {"where": said}))))
    for word in ("maria", "rossi", "workhorse", "example.org", "home", "Users", "qlora-prove-1", "runs", "hf_This"):
        assert word not in text, word
    assert str(tmp_path) not in text and tempfile.gettempdir() not in text and "no space" in text
