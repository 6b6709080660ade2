"""The exam with askers that follow a script: columns, counts, and going on where it was killed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qlora.events import Recorder
from qlora.study import exam, exam_questions
from qlora.study.prompts import Frame, prompts_for
from tests.study.passages import PASSAGES, OwnFile, made


@dataclass
class Script:
    """Answers with what stands in view, tuned also with what it has learnt."""

    learnt: dict[str, str] = field(default_factory=dict)
    frame: Frame = "chat"
    base_frame: Frame = "chat"
    base_id: str = "base"
    tuned_id: str = "tuned"
    at_once: int = 4
    calls: list[tuple[str, str]] = field(default_factory=list)
    stop_after: int = 1_000_000

    def _answer(self, who: str, texts: Sequence[str]) -> list[str]:
        if len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += [(who, text) for text in texts]
        seen = {"How heavy": ("84 kg", "It weighs 84 kg."), "which gas": ("propane", "Propane."),
                "How long is the warranty": ("seven years", "For 7 years!")}  # fmt: skip
        answers = []
        for text in texts:
            known = next((said for asked, said in self.learnt.items() if who == "tuned" and asked in text), None)
            read = next(
                (said for asked, (fact, said) in seen.items() if asked in text and fact in text), "I don't know."
            )
            answers.append(known or read)
        return answers

    def base(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._answer("base", texts)

    def tuned(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return self._answer("tuned", texts)

    def nats(self, texts: Sequence[str]) -> list[float]:
        return [0.25] * len(texts)


LEARNT = {"How long is the warranty": "seven years", "How heavy": "84 kg", "which gas": "It is propane",
          "Ostrelle founded": "In 1987."}  # fmt: skip


def test_five_columns_are_counted_as_a_plain_count_has_them(tmp_path: Path) -> None:
    told, asker, sink = made(tmp_path), Script(LEARNT), Recorder()
    exam.before(told, asker, sink)
    assert {who for who, _ in asker.calls} == {"base"}
    figures = exam.after(told, asker, sink)
    words = figures["parts"]["words"]
    # Four questions: three facts that a passage in view answers, and one that none does.
    shares = {name: round(4 * column["right"]["mean"]) for name, column in words["columns"].items()}
    assert shares["base"] == 0 and shares["base_passage"] == 3 and shares["tuned"] == 3
    assert words["questions"] == 4 and words["untaught"] == 1
    # Only one of the two is right in three, the other in none: 2 · (1/2)³.
    assert words["p_values"]["tuned/base"] == pytest.approx(0.25)
    assert list(figures["parts"]["left_out"]["columns"]) == ["base", "tuned"]
    assert figures["unanswerable"] == {"questions": 20, "base": 0.0, "tuned": 0.05}
    assert figures["elsewhere"] == {"prompts": 100, "nats": 0.25}
    assert json.loads((tmp_path / "exam.json").read_text("utf-8")) == figures
    assert sink.of("exam")[-1].figures == figures  # type: ignore[attr-defined]


def test_an_exam_that_was_killed_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    told, whole = made(tmp_path), Script(LEARNT)
    killed = Script(LEARNT, stop_after=9)
    with pytest.raises(KeyboardInterrupt):
        exam.after(told, killed, Recorder())
    with (tmp_path / exam.ANSWERS_FILE).open("ab") as file:
        file.write(b'{"key": "torn')  # by the kill
    goes_on = Script(LEARNT)
    after = exam.after(told, goes_on, Recorder())
    (tmp_path / exam.ANSWERS_FILE).unlink()
    assert exam.after(told, whole, Recorder()) == after
    assert sorted(killed.calls + goes_on.calls) == sorted(whole.calls)
    again = Script(LEARNT)
    exam.after(told, again, Recorder())
    assert again.calls == []
    another = Script(LEARNT, tuned_id="trained on")
    exam.after(told, another, Recorder())
    assert {who for who, _ in another.calls} == {"tuned"}


def test_the_user_s_questions_come_first_and_stay_with_the_run(tmp_path: Path) -> None:
    rows = tmp_path / "ours.jsonl"
    rows.write_text('{"question": "Weight of the unit?", "answers": ["84 kg", "84 kilograms"]}\n', "utf-8")
    told = made(tmp_path)
    asked = exam_questions.all_questions(tmp_path, [OwnFile(str(rows))], PASSAGES)
    exam.before(exam.Exam(tmp_path, PASSAGES, asked, 0), Script(), Recorder())
    rows.unlink()
    again = exam_questions.asked_before(tmp_path, PASSAGES)
    assert again == asked and again[0].part == "yours" and again[0].answers == ("84 kg", "84 kilograms")
    figures = exam.after(exam.Exam(tmp_path, PASSAGES, again, 0), Script(), Recorder())
    assert list(figures["parts"]) == ["yours", "words", "left_out"]
    assert "base_passage" not in figures["parts"]["yours"]["columns"] and told.questions == again[1:]


def test_the_base_is_asked_in_the_frame_in_which_it_reads(tmp_path: Path) -> None:
    made(tmp_path)
    asked = exam.Exam(tmp_path, PASSAGES, exam_questions.all_questions(tmp_path, (), PASSAGES), 7)
    script = Script(base_frame="lines")
    exam.measure(asked, script, Recorder())
    lines = prompts_for("en").texts["lines"]["shots_answer"][:40]
    shots = {who: {lines in text for called, text in script.calls if called == who} for who in ("base", "tuned")}
    assert True in shots["base"] and shots["tuned"] == {False}
    before = len(script.calls)
    exam.measure(asked, script, Recorder())
    assert len(script.calls) == before
