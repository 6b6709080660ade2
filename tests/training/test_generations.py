"""The folder of what was answered: whole lines, read back to the last bit or not at all, and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.files import UnsafePathError
from qlora.training import generations
from qlora.training.generations import Kept
from tests.training.answer_cases import drawn


def kept(folder: Path, read_again: bool = True) -> Kept:
    return Kept(
        folder, ("one", "other"), lambda ids: " ".join(map(str, ids)), lambda row: f"rows:{row + 1}", read_again
    )


def judged() -> list[generations.Answer]:
    from dataclasses import replace

    return [replace(one, rewards=(0.1, 1.0), reward=1.1) for one in drawn([0.3, -0.7, 0.1, 1.0, 0.0, -1.0])]


def test_answers_are_read_back_as_they_were(tmp_path: Path) -> None:
    answers = judged()
    sha256 = kept(tmp_path).write(4, answers)
    assert kept(tmp_path).read(4, sha256) == answers
    line = json.loads((tmp_path / "generations" / "step-000005.jsonl").read_text().splitlines()[1])
    assert (line["step"], line["where"], line["number"], line["ended"]) == (5, "rows:1", 1, True)
    assert line["completion"] == " ".join(map(str, answers[1].token_ids))
    assert line["rewards"] == {"one": 0.1, "other": 1.0} and line["logprobs"] == list(answers[1].logprobs)


def test_only_what_is_read_again_has_its_log_probabilities(tmp_path: Path) -> None:
    kept(tmp_path, read_again=False).write(0, judged())
    assert "logprobs" not in json.loads((tmp_path / "generations" / "step-000001.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("change", ["gone", "cut", "other", "not read"])
def test_what_is_not_those_answers_is_not_read(tmp_path: Path, change: str) -> None:
    sha256: str | None = kept(tmp_path).write(0, judged())
    file = tmp_path / "generations" / "step-000001.jsonl"
    if change == "gone":
        file.unlink()
    elif change == "cut":
        file.write_text(file.read_text()[:-20])
    elif change == "other":
        file.write_text(file.read_text().replace("1.1", "1.2"))
    else:
        sha256 = None
    assert kept(tmp_path).read(0, sha256) is None


def test_the_oldest_go_where_all_are_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = kept(tmp_path)
    one.write(0, judged())
    size = (tmp_path / "generations" / "step-000001.jsonl").stat().st_size
    (tmp_path / "generations" / "notes.txt").write_text("a user's own")
    monkeypatch.setattr(generations, "MOST_BYTES", round(2.5 * size))
    for step in (1, 2, 3):
        one.write(step, judged())
    names = ["notes.txt", "step-000003.jsonl", "step-000004.jsonl"]
    assert sorted(path.name for path in (tmp_path / "generations").iterdir()) == names
    monkeypatch.setattr(generations, "MOST_BYTES", 1)
    one.write(4, judged())
    assert [path.name for path in (tmp_path / "generations").glob("step-*")] == ["step-000005.jsonl"]


def test_nothing_is_written_or_removed_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of somebody's, whose files have names like ours, put in the place of ours while the run goes on."""
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    theirs.mkdir()
    (theirs / "step-000001.jsonl").write_text("mine\n")
    (run / "generations").symlink_to(theirs)
    monkeypatch.setattr(generations, "MOST_BYTES", 1)
    with pytest.raises(UnsafePathError, match="generations is a link"):
        kept(run).write(1, judged())
    assert {path.name: path.read_text() for path in theirs.iterdir()} == {"step-000001.jsonl": "mine\n"}
