"""A run with documents: studied, examined, trained and examined again, stopped in between, gone on with, exported.

The study itself is a script here (its own tests ask a base); everything around it is the real thing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora import api, disk
from qlora.errors import QloraError, RecipeError, RunFolderError, StoppedBySignal, TrainingStopped
from qlora.events import Event, Recorder, Sinks
from qlora.examine import examine
from qlora.look_study import look_at_study
from qlora.recipe.reading import load_recipe
from qlora.stop import StopRequest
from qlora.study import exam, exam_questions, lesson
from qlora.study.study import Studied
from tests.data.cases import GOOD
from tests.training.cases import DOCUMENT_KEYS, MANUAL, script, write_manuals


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    keys: list[str] = []
    monkeypatch.setattr(lesson, "study", script(keys))
    # A few short answers say as much of the phases as many long ones.
    monkeypatch.setattr(lesson, "HOLD_TOKENS", 4)
    monkeypatch.setattr(exam, "MAX_TOKENS", 4)
    monkeypatch.setattr(exam, "neutral_prompts", lambda: ["What is rain?", "Why is the sky blue?"])
    monkeypatch.setattr(exam_questions, "UNANSWERABLE", 2)
    return keys


def train(recipe: Path, *keys: str, mode: api.Mode = "new", stop_at: str = "") -> Recorder:
    """Runs to the end, or until an event of `stop_at` (its kind, or kind:topic) is met."""
    recorder, stop = Recorder(), StopRequest()

    class StopAt(Recorder):
        def emit(self, event: Event) -> None:
            topic = event.as_dict().get("topic") or event.as_dict().get("task", "")
            if stop_at in (event.kind, f"{event.kind}:{topic}") and stop_at:
                stop.set()

    sinks = Sinks(recorder, StopAt())
    try:
        api.train(load_recipe(recipe, (*DOCUMENT_KEYS, *keys)), name="learn", mode=mode, sink=sinks, stop=stop)
    except StoppedBySignal:
        assert stop_at
    else:
        assert not stop_at
    return recorder


def final(recipe: Path) -> dict[str, str]:
    """What a finished run is: its adapter, its rows and the answers of its exam."""
    folder = recipe.parent / "runs" / "learn"
    names = ("adapter/adapter_model.safetensors", "study/rows.jsonl", "study/labels.bin", "study/exam.json")
    return {name: disk.sha256_file(folder / name) for name in names}


@pytest.mark.slow
def test_a_run_learns_documents_and_says_what_it_learnt(tmp_path: Path, llama: Path, asked: list[str]) -> None:
    recipe = write_manuals(tmp_path, llama)
    recorder = train(recipe)
    folder = tmp_path / "runs" / "learn"
    topics = [event.as_dict()["topic"] for event in recorder.of("notice")]
    assert {"documents", "passages", "rows"} <= set(topics)
    kinds = [event.kind for event in recorder.events if event.kind in ("plan", "step", "end", "exam")]
    assert kinds[0] == "plan" and kinds[-1] == "exam"
    rows = [json.loads(line) for line in (folder / "study" / "rows.jsonl").read_text().splitlines()]
    shown = [row for row in rows if "The Marlow pump" in row["messages"][0]["content"]]
    assert 4 <= len(rows) <= 6 and all(set(row) == {"messages"} for row in rows)
    assert shown  # by its question, or by its passage
    recorded = (folder / "recipe.toml").read_text()
    assert "r = 32" in recorded and "learning_rate = 0.0005" in recorded and "[study]" in recorded
    assert json.loads((folder / "study" / "exam.json").read_text())
    card = (folder / "adapter" / "README.md").read_text()
    assert "base + its own passage" in card.lower() or "own passage" in card.lower()
    # A second command finds all of it done, and an export reads the study's rows.
    before, answers = list(asked), (folder / "study" / "exam_answers.jsonl").read_bytes()
    train(recipe, mode="resume")
    assert asked == before
    # Nor does the exam ask again what the run has asked of the same weights, whoever asks.
    figures = examine(folder)
    assert (folder / "study" / "exam_answers.jsonl").read_bytes() == answers
    assert json.loads((folder / "study" / "exam.json").read_text()) == figures
    report = api.merge_and_export(folder, to="adapter-gguf", sink=(sink := Recorder()))
    assert report.products and not [e for e in sink.of("notice") if "cannot be read" in e.as_dict()["message"]]


@pytest.mark.slow
def test_a_stop_in_each_phase_changes_nothing(tmp_path: Path, llama: Path, asked: list[str]) -> None:
    whole, stopped = write_manuals(tmp_path / "a", llama), write_manuals(tmp_path / "b", llama)
    train(whole)
    train(stopped, stop_at="notice:passages")  # in the study
    for stop_at in ("progress:exam", "step", "end"):  # in the exam before, in the training, in the exam after
        train(stopped, mode="resume", stop_at=stop_at)
    train(stopped, mode="resume")
    assert final(stopped) == final(whole)
    assert len(asked) == 2 * len(set(asked))  # once by each run


@pytest.mark.slow
def test_a_look_at_the_study_is_the_run_s_own(tmp_path: Path, llama: Path, asked: list[str]) -> None:
    recipe = write_manuals(tmp_path, llama)
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    keys = (*DOCUMENT_KEYS, 'data.eval=[{path = "rows.jsonl"}]')
    folder = tmp_path / "runs" / "learn"
    for _ in range(2):  # looked at again, nothing is asked again
        seen = look_at_study(load_recipe(recipe, keys), name="learn", rows=2, sink=Recorder())
        assert seen.study.folder == str(folder / "study") and seen.documents is not None and seen.rows is not None
        made = (folder / "study" / "rows.jsonl").read_text()
        assert seen.study.rows == len(made.splitlines()) == seen.rows.as_dict()["train"]["rows"]
        assert seen.study.questions == 4 and seen.study.sentences == 6 and len(seen.study.examples) == 3
        (lost,) = seen.study.dropped
        assert (lost.reason, lost.count, lost.examples[0].answer) == ("no answer", 1, "no idea")
        assert len(asked) == 6 and not (folder / "checkpoints").exists() and not (folder / "adapter").exists()
    recorder = train(recipe, keys[-1], mode="resume")
    assert len(asked) == 6 and (folder / "study" / "rows.jsonl").read_text() == made
    assert recorder.of("eval")  # of rows that stand beside documents alone
    with pytest.raises(RunFolderError, match="trains already"):
        look_at_study(load_recipe(recipe, keys), name="learn")


@pytest.mark.slow
def test_anew_asks_only_about_what_has_changed(tmp_path: Path, llama: Path, asked: list[str]) -> None:
    recipe = write_manuals(tmp_path, llama)
    train(recipe)
    first = len(asked)
    (tmp_path / "manuals" / "manual.md").write_text(MANUAL.replace("seven years", "eight years"))
    with pytest.raises(RunFolderError, match=r"have changed since they were studied: .*manual\.md"):
        train(recipe, mode="resume")
    recorder = train(recipe, mode="fresh")
    assert len(asked) - first == 3  # the sentences of one passage of two
    assert any("not asked again" in event.as_dict()["message"] for event in recorder.of("notice"))


def test_a_check_stops_before_weights_and_foresees_the_rows(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_manuals(tmp_path, llama)
    recorder = Recorder()
    checked = api.check(load_recipe(recipe, DOCUMENT_KEYS), sink=recorder)
    assert len(checked.data.train.lengths) > 2 * 24  # as many as may be
    assert checked.memory is not None and not list((tmp_path / "runs").glob("*"))
    said = [event.as_dict()["message"] for event in recorder.of("notice")]
    assert any("2 passages" in message and "6 sentences" in message for message in said), said


@pytest.mark.parametrize(
    ("more", "keys", "error", "part"),
    [
        ('[lora]\ninit = "eva"\n', (), RecipeError, "eva"),
        ("[study]\nwith_passage = 0.5\nhold = 0.4\n", (), RecipeError, "0.9, over 0.8"),
        ('[[exam.questions]]\npath = "mine.jsonl"\n', (), QloraError, "mine.jsonl"),
        ("[eval]\nexact_match_rows = 3\n", (), RecipeError, "eval.exact_match_rows: there are no rows to evaluate"),
    ],
)
def test_what_documents_forbid_is_said_before_anything_is_loaded(
    tmp_path: Path, more: str, keys: tuple[str, ...], error: type[QloraError], part: str
) -> None:
    recipe = write_manuals(tmp_path, tmp_path / "no-base", more)
    with pytest.raises(error) as found:
        api.check(load_recipe(recipe, keys))
    assert part in str(found.value) and found.value.hint


def test_a_full_disk_keeps_what_was_asked(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Studied:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lesson, "study", full)
    with pytest.raises(TrainingStopped, match="the disk is full") as found:
        train(write_manuals(tmp_path, llama))
    assert "resume" in found.value.hint
