"""The exam of a run: the untuned base is asked when its study is done, the tuned one when it has been trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import disk, files, heap, run_folder
from qlora.data.documents.chunks import Passage
from qlora.disk import MANIFEST
from qlora.model.adapter_tensors import ADAPTER_FILE
from qlora.study import exam, exam_questions, exam_report, plain_text
from qlora.study.exam_asking import TeacherAsker
from qlora.study.material import keeping
from qlora.study.prompts import Frame

if TYPE_CHECKING:
    from qlora.recipe.reading import Recipe
    from qlora.study.teacher import Teacher

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class RunExam:
    """`frames`: in which rows are served, and in which the base reads better (see `exam.Asker`). `base` names the
    weights that answer: hash of them, as they are held. `learnt`: the rows (`lesson.Learnt`), for other
    processes that train."""

    asked: exam.Exam
    teacher: Teacher
    frames: tuple[Frame, Frame]
    base: str
    learnt: Any = None

    @classmethod
    def of(
        cls, folder: Path, passages: Sequence[Passage], recipe: Recipe, asker: tuple[Teacher, tuple[Frame, Frame], str]
    ) -> RunExam:
        """Of the questions that the study kept apart in `folder`, and of the user's own."""
        questions = exam_questions.all_questions(folder, recipe.exam.own, passages)
        yours = (question.text for question in questions if question.part == "yours")
        plain_text.tell(asker[0].chat, yours, "your questions", asker[0].sink)
        return cls(exam.Exam(folder, passages, questions, recipe.train.seed), *asker)

    def before(self) -> None:
        """Ask the base: alone, with what a search finds, with the right passage. What was asked is not asked again."""
        exam.before(self.asked, self._asker(""), self.teacher.sink)
        self.teacher.tell_thoughts()

    def after(self, run_dir: Path) -> None:
        """Ask the model with its delivered adapter, and put what came of it into the adapter's card."""
        with keeping(self.teacher.stop, self.asked.folder), heap.another_phase():
            figures = exam.after(self.asked, self._asker(tuned_id(run_dir / "adapter")), self.teacher.sink)
        self.teacher.tell_thoughts()
        section = exam_report.card_section(figures)
        adapter = run_dir / "adapter"
        card = (
            files.read_bytes(adapter / CARD, MAX_CARD_BYTES).decode(errors="replace")
            if (adapter / CARD).is_file()
            else ""
        )
        if section.strip() in card:
            return
        title = section.partition("\n")[0]
        card, _, older = card.partition(f"{title}\n")  # of an exam with other figures
        card += older[older.find("\n## ") + 1 :] if "\n## " in older else ""

        def write(folder: Path) -> None:
            for entry in sorted(adapter.iterdir()):
                if entry.name not in (CARD, MANIFEST) and not files.is_link(entry):
                    copy = shutil.copytree if entry.is_dir() else shutil.copy2
                    copy(entry, folder / entry.name)
            (folder / CARD).write_text(f"{card.rstrip()}\n\n{section.strip()}\n", encoding="utf-8")

        run_folder.publish_adapter(run_dir, write, self.teacher.sink)

    def _asker(self, tuned: str) -> TeacherAsker:
        return TeacherAsker(self.teacher, *self.frames, self.base, tuned)


def tuned_id(adapter_dir: Path) -> str:
    """What a tuned model's answers follow from: the delivered weights, whoever asks them, and where they lie."""
    return disk.sha256_file(adapter_dir / ADAPTER_FILE)
