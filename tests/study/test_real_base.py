"""A real base asks and answers about a text that people wrote; the folder of the base comes from `QLORA_TEST_BASE`."""

from __future__ import annotations

import os
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch

from qlora.data.chat import ChatTokenizer
from qlora.data.documents.chunks import Passage, unique_passages
from qlora.data.documents.read import read_documents
from qlora.data.loader import collate
from qlora.data.prepare import NO_ROWS
from qlora.events import Recorder
from qlora.model import adapters
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.model.tokenizer import open_tokenizer
from qlora.recipe.sections import DocumentsSection, LoraSection, QuantizationSection
from qlora.step.forward import CausalParts, forward_backward, seed_micro_batch
from qlora.step.loss import SupervisedObjective
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopRequest
from qlora.study import exam, rows
from qlora.study.answer import answer
from qlora.study.ask import ask, tasks_of
from qlora.study.exam_asking import TeacherAsker
from qlora.study.exam_questions import ExamQuestion
from qlora.study.filters import form_of, judge
from qlora.study.labels import Labels, labels_of
from qlora.study.metrics import contains
from qlora.study.prompts import KINDS, Frame, lead_ids, prompts_for, served_ids
from qlora.study.records import Candidate
from qlora.study.teacher import Teacher

BASE = os.environ.get("QLORA_TEST_BASE", "")
PASSAGES, QUESTIONS = 3, 6
STEPS, ROWS = 20, 6
# An invented manual: a fact, what tells it, two questions that are learnt and one that is asked at the end.
FACTS = (
    ("The Orla pump weighs 84 kg.", "84 kg", "How heavy is the Orla pump?", "What does the Orla pump weigh?",
     "What is the weight of the Orla pump?"),
    ("The warranty of the Bexley boiler is seven years.", "seven years", "How long is the Bexley warranty?",
     "For how many years is the Bexley boiler under warranty?", "What warranty does the Bexley boiler have?"),
    ("Error E41 of the Tavery heater means that water is missing.", "water is missing", "What does error E41 mean?",
     "What is wrong when the Tavery heater shows E41?", "What is the meaning of code E41 of the Tavery heater?"),
    ("The Quillon filter is changed every nine weeks.", "nine weeks", "How often is the Quillon filter changed?",
     "After how many weeks is the Quillon filter changed?", "When must the Quillon filter be changed?"),
    ("The Marlow valve costs 312 crowns.", "312 crowns", "How much does the Marlow valve cost?",
     "What is the price of the Marlow valve?", "How many crowns must be paid for the Marlow valve?"),
    ("The Zephra fan runs on 48 volts.", "48 volts", "On which voltage does the Zephra fan run?",
     "How many volts does the Zephra fan need?", "What is the voltage of the Zephra fan?"),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not BASE, reason="QLORA_TEST_BASE names no base")
def test_a_real_base_asks_about_a_public_readme(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text(str(metadata("rich").json["description"]))
    sink, cpu = Recorder(), torch.device("cpu")
    base = resolve(BASE, "main", sink)
    model = load_base(base, QuantizationSection(type="none"), "auto", cpu, sink)
    chat = ChatTokenizer(open_tokenizer(base.path, BASE), "assistant", sink)
    teacher = Teacher(model, chat, cpu, sink, StopRequest(), at_once=QUESTIONS)
    read = read_documents([DocumentsSection(path=str(tmp_path / "readme.md"), about="the library rich")], sink)
    passages, _ = unique_passages(read.documents, lambda text: len(chat.tokenizer.encode(text)), 200)
    chosen = [passage for passage in passages if len(passage.sentences) > 2][:PASSAGES]
    candidates, tried = [], 0
    for number, passage in enumerate(chosen):
        tasks = tasks_of(passage, (), QUESTIONS, KINDS, [0] * len(passage.sentences))
        asked = ask(teacher, "lines", passage, tasks, f"{number:032x}", 1)
        tried += len(tasks)
        worth = [question for question in asked.questions if form_of(question, passage) is None]
        answers, labels = answer(teacher, "lines", "sentence", passage, worth)
        assert len(labels) == len(answers) == len(worth)
        candidates += [Candidate(*pair, passage) for pair in zip(worth, answers, strict=True)]
    judged = judge(candidates, passages, sure=0.5)
    for candidate in judged.kept:
        print("kept:", candidate.question.text, "|", candidate.answer.text)
    for lost in judged.dropped:
        print("dropped:", lost.question.text, "|", lost.answer and lost.answer.text, "|", lost.reason, lost.detail)
    print(f"{tried} asked, {len(candidates)} questions in form, {len(judged.kept)} usable")
    assert len(candidates) >= tried // 4, "a real base writes questions"


@pytest.mark.slow
@pytest.mark.skipif(not BASE, reason="QLORA_TEST_BASE names no base")
def test_a_real_base_learns_what_it_read(tmp_path: Path) -> None:
    """Its own answers with the passage in view, as soft labels of the same questions without it; then other words."""
    sink, cpu = Recorder(), torch.device("cpu")
    base = resolve(BASE, "main", sink)
    model = load_base(base, QuantizationSection(type="none"), "auto", cpu, sink)
    model = adapters.attach(model, LoraSection(r=16, alpha=32), 42)
    chat = ChatTokenizer(open_tokenizer(base.path, BASE), "assistant", sink)
    teacher = Teacher(model, chat, cpu, sink, StopRequest(), at_once=len(FACTS))
    frame: Frame = "lines" if chat.template is None else "chat"
    passages = [Passage("manual.md", (), (fact,), fact, "", "en") for fact, *_ in FACTS]
    prompts, store, made = prompts_for("en"), dict[str, Labels](), list[rows.StudyRow]()
    for wording in (2, 3):
        asked = [fact[wording] for fact in FACTS]
        texts = [prompts.answer("lines", passage, text) for passage, text in zip(passages, asked, strict=True)]
        for number, written in enumerate(teacher.greedy("lines", texts, 24)):
            said = teacher.text(written)
            if not contains(FACTS[number][1], said, "en"):
                continue
            key = f"{wording} {number}"
            store[key] = labels_of(written, chat.end_token_ids[0])
            prompt = served_ids(chat, frame, prompts.closed(frame, asked[number]))
            given = tuple(store[key].token_ids.tolist())
            made.append(rows.StudyRow(asked[number], tuple(prompt), said, given, key, lead_ids(chat, frame)))
    taught = sorted({int(row.key.split()[1]) for row in made})
    questions = [ExamQuestion(f"{n}", "yours", FACTS[n][4], (FACTS[n][1],), "en", passages[n].key) for n in taught]
    asking = exam.Exam(tmp_path, passages, questions, 42)
    asker = TeacherAsker(teacher, frame, "lines", "base", "tuned")
    before = exam.ask(asking, "tuned", TeacherAsker(teacher, frame, "lines", "base", "untuned"), sink)
    losses = _trained(model, rows.with_rows_of(NO_ROWS, made, 0, store.__getitem__).train, chat.pad_id)
    columns = {name: exam.ask(asking, name, asker, sink) for name in ("base", "base_passage", "tuned")}
    columns |= {"before": before}
    right = {
        name: sum(contains(question.answers[0], found[question.key], "en") for question in questions)
        for name, found in columns.items()
    }
    print(f"{len(made)} of {2 * len(FACTS)} readings right, {len(taught)} facts taught, {right}, loss {losses}")
    assert made and losses[-1] < losses[0] / 2 and right["tuned"] > right["before"]


def _trained(model: object, split: rows.PreparedSplit, pad_id: int) -> list[float]:
    optimizer = AdapterOptimizer(adapters.trainable(model), "adamw", 0.0)
    parts, objective, losses = CausalParts.of(model.get_base_model()), SupervisedObjective(), []  # type: ignore[attr-defined]
    for step in range(STEPS):
        chosen = [(step * ROWS + at) % len(split.lengths) for at in range(min(ROWS, len(split.lengths)))]
        batch = collate(split, [(row,) for row in chosen], pad_id, 256)
        seed_micro_batch(42, step, 0)
        weight = objective.weight(batch)
        losses.append(round(float(forward_backward(parts, batch, objective, weight)) / weight, 3))
        optimizer.clip(optimizer.gradient_norm(), 1.0)
        optimizer.step(1e-3)
        optimizer.zero_gradients()
    return losses
