"""A real base asks and answers about a text that people wrote; the folder of the base comes from `QLORA_TEST_BASE`."""

from __future__ import annotations

import os
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch

from qlora.data.chat import ChatTokenizer
from qlora.data.documents.chunks import unique_passages
from qlora.data.documents.read import read_documents
from qlora.events import Recorder
from qlora.model.load import load_base
from qlora.model.resolve import resolve
from qlora.model.tokenizer import open_tokenizer
from qlora.recipe.sections import DocumentsSection, QuantizationSection
from qlora.stop import StopRequest
from qlora.study.answer import answer
from qlora.study.ask import ask, tasks_of
from qlora.study.filters import form_of, judge
from qlora.study.prompts import KINDS
from qlora.study.records import Candidate
from qlora.study.teacher import Teacher

BASE = os.environ.get("QLORA_TEST_BASE", "")
PASSAGES, QUESTIONS = 3, 6


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
