"""A study goes on where it was killed, with the same rows and labels; what changed is asked again, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora.data.documents.chunks import Passage
from qlora.errors import ModelError, RunFolderError
from qlora.stop import StopAsked
from qlora.study.study import Studied, StudySettings, study
from tests.study.cases import Killed, Scripted, passage, passages, settings


def run(teacher: Scripted, folder: Path, asked: Sequence[Passage], wanted: StudySettings | None = None) -> Studied:
    folder.mkdir(exist_ok=True)
    return study(teacher, asked, wanted or settings(), folder, teacher.sink, teacher.stop)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def notices(teacher: Scripted) -> list[str]:
    return [event.as_dict()["message"] for event in teacher.recorder.of("notice")]


def test_a_good_base_gives_rows_an_exam_and_what_was_dropped(tmp_path: Path) -> None:
    teacher = Scripted()
    found = run(teacher, tmp_path, passages())
    assert found.split.train and found.split.exam and found.split.left_out
    hidden = {(c.question.passage, c.question.sentence) for c in found.split.left_out}
    assert not hidden & {(c.question.passage, c.question.sentence) for c in found.split.train}
    for candidate in found.split.train:
        labels = found.labels.get(candidate.question.key)
        assert labels is not None
        end = teacher.chat.end_token_ids[0]
        assert tuple(labels.token_ids) == (*candidate.answer.token_ids, end)
        assert candidate.answer.text in candidate.passage.text
    for line in (tmp_path / "dropped.jsonl").read_text().splitlines():
        assert json.loads(line)["reason"]
    covered = json.loads((tmp_path / "coverage.json").read_text())
    assert covered["sentences"] == 12 and covered["with_question"] >= 8
    assert any("coverage:" in message for message in notices(teacher))


def check_kill(tmp_path: Path, moments: Sequence[int], whole: Scripted, expected: Studied) -> None:
    for kill_at in moments:
        folder = tmp_path / f"killed at {kill_at}"
        with pytest.raises(Killed):
            run(Scripted(kill_at), folder, passages(2))
        again = Scripted()
        found = run(again, folder, passages(2))
        assert found.split == expected.split
        assert files_of(folder) == files_of(tmp_path / "whole")
        assert again.calls <= whole.calls


def test_a_kill_in_each_phase_leaves_the_same_rows_and_labels(tmp_path: Path) -> None:
    whole = Scripted()
    expected = run(whole, tmp_path / "whole", passages(2))
    probed = 2 * 2 * 5  # calls: frames, passages, and a question with its three readings and a score
    # In the probe, as a passage is asked, as it is answered, and in the last reading of all.
    check_kill(tmp_path, [3, probed + 2, probed + 4, whole.calls], whole, expected)


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_same_rows_and_labels(tmp_path: Path) -> None:
    whole = Scripted()
    expected = run(whole, tmp_path / "whole", passages(2))
    check_kill(tmp_path, range(1, whole.calls + 1), whole, expected)


def test_what_a_kill_tore_is_made_again(tmp_path: Path) -> None:
    run(Scripted(), tmp_path / "whole", passages(3))
    whole = files_of(tmp_path / "whole")
    for name in ("questions.jsonl", "answers.jsonl", "labels.bin"):
        for cut in (1, len(whole[name]) // 2):
            folder = tmp_path / f"{name} {cut}"
            folder.mkdir()
            for other, data in whole.items():
                (folder / other).write_bytes(data[:-cut] if other == name else data)
            run(Scripted(), folder, passages(3))
            left, right = (run(Scripted(), place, passages(3)) for place in (folder, tmp_path / "whole"))
            assert left.split == right.split
            for candidate in left.split.train:
                mine, other_labels = (each.labels.get(candidate.question.key) for each in (left, right))
                assert mine is not None and other_labels is not None
                assert mine.logprobs.tobytes() == other_labels.logprobs.tobytes()


def test_a_finished_study_asks_nothing_again(tmp_path: Path) -> None:
    first = run(Scripted(), tmp_path, passages())
    before = files_of(tmp_path)
    again = Scripted()
    assert run(again, tmp_path, passages()).split == first.split
    assert again.calls == 0 and files_of(tmp_path) == before
    assert any("4 of 4 passages were asked and answered before" in message for message in notices(again))


def test_one_changed_document_asks_only_its_passages(tmp_path: Path) -> None:
    run(Scripted(), tmp_path, passages())
    changed = [*passages(3), passage("Tavery", 90)]
    again = Scripted()
    run(again, tmp_path, changed)
    probed = 40  # the probe looks at the passages as they are now, in two frames
    assert any("3 of 4 passages were asked and answered before" in message for message in notices(again))
    texts = [text for text in again.sampled if "warranty of 90 years" not in text]
    assert len(texts) <= probed
    back = Scripted()
    run(back, tmp_path, passages())
    assert any("4 of 4 passages" in message for message in notices(back)), "what was asked before the edit is kept"


def test_a_sentence_without_a_question_is_asked_a_second_time(tmp_path: Path) -> None:
    class Hesitant(Scripted):
        """Asks nothing about filters in the first round."""

        def _question(self, text: str, seed: int) -> str:
            first = not (tmp_path / "answers.jsonl").exists() or len(self.recorder.of("progress")) < 8
            return "No." if first and "filter" in text.rpartition("Sentence: ")[2] else super()._question(text, seed)

    teacher = Hesitant()
    found = run(teacher, tmp_path, passages(3), settings(left_out=0.01))
    again = [candidate for candidate in found.split.train if candidate.question.round == 2]
    assert again and all("filter" in candidate.passage.sentences[candidate.question.sentence] for candidate in again)
    assert '"reason": "no question"' in (tmp_path / "dropped.jsonl").read_text()
    quiet = Scripted()
    assert run(quiet, tmp_path, passages(3), settings(left_out=0.01)).split == found.split and quiet.calls == 0


@pytest.mark.parametrize(
    "changed", [{"base": "another"}, {"seed": 6}, {"questions": 7}, {"kinds": ("fact",)}, {"left_out": 0.5}]
)
def test_other_settings_ask_anew(tmp_path: Path, changed: dict[str, Any]) -> None:
    run(Scripted(), tmp_path, passages())
    again = Scripted()
    run(again, tmp_path, passages(), settings(**changed))
    assert not any("4 of 4 passages were asked" in message for message in notices(again))


def test_a_base_that_cannot_read_is_refused_unless_told_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="too small to teach itself") as error:
        run(Scripted(reads=False), tmp_path, passages())
    assert error.value.exit_code == 2 and "study.probe = false" in error.value.hint
    assert (tmp_path / "probe.json").is_file() and not (tmp_path / "questions.jsonl").exists()
    found = run(Scripted(reads=False), tmp_path, passages(), settings(probe=False))
    assert not found.split.train


def test_a_base_that_asks_nothing_is_told_so_with_an_example(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The pump and the pump") as error:
        run(Scripted(asks=False), tmp_path, passages())
    assert "ask itself" in error.value.hint


def test_the_time_limit_goes_on_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = Scripted()
    monkeypatch.setattr("qlora.study.study.time.monotonic", lambda: float(len(teacher.sampled)))  # a second a question
    found = run(teacher, tmp_path, passages(6), settings(max_minutes=0.5, probe=False))
    message = next(message for message in notices(teacher) if "max_minutes" in message)
    asked = {json.loads(line)["passage"] for line in (tmp_path / "questions.jsonl").read_text().splitlines()}
    assert 0 < len(asked) < 6 and f"{len(asked)} of 6 passages" in message
    assert found.split.train
    monkeypatch.undo()
    again = Scripted()
    resumed = run(again, tmp_path, passages(6), settings(max_minutes=0.5, probe=False))
    assert resumed.split == found.split and not again.sampled, "a later process has time, and asks nothing more"
    whole = run(Scripted(), tmp_path, passages(6))
    assert whole.split == run(Scripted(), tmp_path / "anew", passages(6)).split, "the limit changed no question"


def test_a_stop_is_honoured_and_the_end_is_told(tmp_path: Path) -> None:
    teacher = Scripted()
    run(teacher, tmp_path, passages())
    assert any("3 more until about" in message for message in notices(teacher))
    stopped = Scripted()
    stopped.stop.set()
    with pytest.raises(StopAsked):
        run(stopped, tmp_path / "stopped", passages())


def test_other_languages_are_told(tmp_path: Path) -> None:
    teacher = Scripted()
    run(teacher, tmp_path, [passage(language="other"), passage("Bexley", 20)], settings(probe=False))
    assert any(message.startswith("1 passages are in another language") for message in notices(teacher))
    assert any("Write in the language of the text." in text for text in teacher.sampled)


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(RunFolderError, match=r"answers\.jsonl:1"):
        run(Scripted(), tmp_path, passages())
