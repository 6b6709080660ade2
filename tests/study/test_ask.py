"""Every sentence is asked about, in kinds that are spread, and what is asked follows from the passage alone."""

from __future__ import annotations

from collections import Counter

from qlora.study.ask import Asked, Task, ask, asked_key, second_tasks, tasks_of
from tests.study.cases import Scripted, passage, tiny_teacher

KINDS = ("fact", "backward", "how")


def test_kinds_are_spread_over_all_sentences() -> None:
    tasks = tasks_of(passage(), (), 9, KINDS, [0, 0, 0])
    assert Counter(task.sentence for task in tasks) == {0: 3, 1: 3, 2: 3}
    assert len(set(tasks)) == 9, "no sentence is asked twice in one kind before it was asked in all"
    few = tasks_of(passage(), (), 2, KINDS, [0, 0, 0])
    assert [task.sentence for task in few] == [0, 1]


def test_what_is_left_out_is_asked_for_the_exam_alone() -> None:
    tasks = tasks_of(passage(), {1}, 6, KINDS, [1, 3, 0])
    by_purpose = {
        purpose: [t.sentence for t in tasks if t.purpose == purpose] for purpose in ("train", "exam", "left_out")
    }
    assert by_purpose["exam"] == [0] and by_purpose["left_out"] == [1, 1, 1]
    assert Counter(by_purpose["train"]) == {0: 3, 2: 3}
    assert all(task.wording == ("ask" if task.purpose == "train" else "ask_exam") for task in tasks)
    assert {task.purpose for task in tasks_of(passage(), {0, 1, 2}, 6, KINDS, [1, 1, 1])} == {"left_out"}


def test_the_second_round_takes_kinds_that_were_not_tried() -> None:
    first = [Task(1, "fact", "train"), Task(1, "how", "train"), Task(0, "fact", "train")]
    assert second_tasks(first, {1}, ("fact", "how", "list", "case")) == (
        Task(1, "list", "train"),
        Task(1, "case", "train"),
        Task(1, "fact", "train"),
    )
    assert second_tasks(first, (), KINDS) == ()


def test_what_is_no_question_is_kept_for_what_it_is() -> None:
    tasks = tasks_of(passage(), (), 3, KINDS, [0, 0, 0])
    asked = ask(Scripted(asks=False), "chat", passage(), tasks, "0" * 32, 1)
    assert not asked.questions and [lost.text[:8] for lost in asked.unasked] == ["The pump"] * 3


def test_a_real_model_asks_the_same_again() -> None:
    tasks = tasks_of(passage(), (), 4, KINDS, [1, 0, 0])

    def again(seed: int) -> Asked:
        key = asked_key(passage(), tasks, "lines", 1, (seed,))
        return ask(tiny_teacher(), "lines", passage(), tasks, key, 1)

    assert again(1) == again(1) != again(2)
    assert len(again(1).questions) + len(again(1).unasked) == 5
