"""What the others get of process 0: what the reference said, rows of a study with their labels; and they train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora.data.prepare import NO_ROWS
from qlora.model.load import load_base
from qlora.processes import Place
from qlora.recipe.reading import load_recipe
from qlora.study import exam, exam_questions, lesson
from qlora.study.labels import COLUMNS, Labels
from qlora.study.lesson import Learnt
from qlora.study.rows import StudyRow, with_rows_of
from qlora.training import handing
from tests.runs import run_dir
from tests.sampling import sampled
from tests.together import apart, events, stops_after, train
from tests.training.cases import DOCUMENT_KEYS, script, write_manuals
from tests.training.preference_cases import write_recipe
from tests.training.wires import Held

LOADED = load_base  # what a run imports lies in this process, from which its processes are forked
PAIRS = (
    "train.max_steps=3",
    "train.batch_size=5",
    "train.micro_batch_size=1",
    "train.learning_rate=1e-3",
    'train.optimizer="adamw"',
    "lora.dropout=0.1",
    "data.max_length=96",
    "data.eval_fraction=0.3",
    "eval.every_steps=2",
    "eval.samples=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    'report.sinks=["jsonl"]',
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "count", "packing"),
    sampled(
        [
            *(("dpo", 2, "true"), ("ipo", 2, "false"), ("orpo", 2, "true"), ("simpo", 2, "true"), ("kto", 2, "true")),
            *(("kto", 4, "false"), ("dpo", 4, "false")),
        ],
        *(("dpo", 2, "true"), ("orpo", 2, "true"), ("kto", 4, "false")),
    ),
)
def test_objectives_of_preference_end_where_one_process_does(
    tmp_path: Path, llama: Path, objective: str, count: int, packing: str
) -> None:
    """5 units a step, so that processes have unequal numbers; KTO's divergence is that of the whole step."""
    one, some = (write_recipe(tmp_path / name, llama, objective) for name in ("one", "some"))
    assert train(one, 1, *PAIRS, f"data.packing={packing}").codes == [0]
    ended = train(some, count, *PAIRS, f"data.packing={packing}")
    assert ended.codes == [0] * count and ended.said[1:] == [""] * (count - 1), ended.said
    assert apart(one, some, 3) <= 1e-6
    ones, theirs = events(one, "preference"), events(some, "preference")
    assert [event["step"] for event in ones] == [event["step"] for event in theirs] == [0, 1, 2, 2, 3, 3]
    for mine, its in zip(ones, theirs, strict=True):
        assert its["compared"] == mine["compared"] and its["accuracy"] == mine["accuracy"]
        for key in ("margin", "better_reward", "worse_reward", "divergence", "kl"):
            assert its[key] == (mine[key] if mine[key] is None else pytest.approx(mine[key], abs=1e-5)), key
    assert events(one, "eval")[0]["loss"] == events(some, "eval")[0]["loss"]
    kept = [(run_dir(recipe) / "reference" / "logprobs.safetensors") for recipe in (one, some)]
    assert kept[0].is_file() == (objective in ("dpo", "ipo", "kto"))
    if kept[0].is_file():
        assert kept[0].read_bytes() == kept[1].read_bytes()


@pytest.mark.slow
def test_a_run_of_pairs_goes_on_with_another_number_of_them(tmp_path: Path, llama: Path) -> None:
    """Begun by two, from an adapter; the reference is read again, and the others are told what it said."""
    before, one, some = (write_recipe(tmp_path / name, llama, "dpo") for name in ("before", "one", "some"))
    assert train(before, 1, *PAIRS, "train.max_steps=1").codes == [0]
    from_it = f'lora.from="{run_dir(before)}"'
    assert train(one, 1, *PAIRS, from_it).codes == [0]
    assert train(some, 2, *PAIRS, from_it, hooks={0: stops_after(1)}).codes == [143, 0]
    assert train(some, 4, *PAIRS, from_it, flag="--resume").codes == [0] * 4
    assert apart(one, some, 3) <= 1e-6
    assert any("answers read from" in event["message"] for event in events(some, "notice"))


def learnt() -> Learnt:
    made: Any = np.random.default_rng(7)
    labels = {
        key: Labels(
            np.arange(count, dtype=np.int32),
            made.integers(-1, 50, (count, COLUMNS)).astype(np.int32),
            made.normal(size=(count, COLUMNS)).astype(np.float16),
        )
        for key, count in (("a", 3), ("b", 1))
    }
    rows = [StudyRow("who?", (1, 2), "she", (0, 1, 2), "a", (9,)), StudyRow("wo?", (3,), "da", (0,), "b")]
    store: Any = type("Studied", (), {"labels": labels})()
    return Learnt((), store, rows, "base")


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_rows_of_a_study_arrive_as_they_were_made(tmp_path: Path, labels: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[model]\nbase = "a/b"\n[[data.train]]\npath = "own.jsonl"\n[[data.documents]]\npath = "doc.md"\n'
        f'[[data.train]]\npath = "study/rows.jsonl"\nformat = "messages"\n[study]\nlabels = "{labels}"\n'
    )
    recipe, channel, of_study = load_recipe(path), Held(), learnt()
    word = handing.told(recipe, of_study)
    bare = load_recipe(path).model_validate(handing.without_documents(recipe, of_study))
    assert not bare.data.documents and [source.path for source in bare.data.train] == [recipe.data.train[0].path]
    handing.give(channel, recipe, of_study)  # type: ignore[arg-type]
    assert len(channel.held) == (labels == "soft")
    channel.place = Place(1, 2, 1, 2)
    handed = handing.taken(channel, bare, word)  # type: ignore[arg-type]
    assert handed is not None and handed.recipe.data.train == recipe.data.train
    whole, data, exam = handed.learn(None, tmp_path, None, NO_ROWS, None)
    expected = with_rows_of(NO_ROWS, of_study.rows, 1, of_study.labels if labels == "soft" else None)
    assert whole.data.train == recipe.data.train and exam is None
    assert data.fingerprint == expected.fingerprint and data.train.sources == [1, 1]
    assert list(data.train.rows) == list(expected.train.rows)


def test_without_documents_nothing_is_handed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[model]\nbase = "a/b"\n[[data.train]]\npath = "own.jsonl"\n')
    recipe = load_recipe(path)
    assert handing.told(recipe, None) is None and handing.taken(Held(), recipe, None) is None  # type: ignore[arg-type]
    assert "study" not in handing.without_documents(recipe, None)


def test_what_the_reference_said_arrives() -> None:
    channel, said = Held(), {"train": torch.tensor([-1.5, -2.25]), "eval": torch.zeros(0)}
    channel.held = [said["train"], said["eval"]]
    channel.place = Place(1, 2, 1, 2)
    found = handing.taken_reference(channel, {"sizes": {"train": 2, "eval": 0}})  # type: ignore[arg-type]
    assert found["train"].tolist() == [-1.5, -2.25] and found["eval"].numel() == 0


def scripted() -> None:
    """The study is a script, the exam's answers are short."""
    lesson.study = script([])
    lesson.HOLD_TOKENS = exam.MAX_TOKENS = 4
    exam.neutral_prompts = lambda: ["What is rain?"]
    exam_questions.UNANSWERABLE = 1


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_documents_are_studied_by_one_and_trained_by_all(tmp_path: Path, llama: Path, labels: str) -> None:
    made = []
    settings = (*DOCUMENT_KEYS, f'study.labels="{labels}"', "train.max_steps=2", "train.batch_size=3")
    settings = (*settings, "train.micro_batch_size=1", "data.packing=false", 'train.optimizer="adamw"')
    for count in (1, 2):
        recipe = write_manuals(tmp_path / str(count), llama)
        ended = train(recipe, count, *settings, 'report.sinks=["jsonl"]', hooks={0: scripted})
        assert ended.codes == [0] * count and ended.said[1:] == [""] * (count - 1), ended.said
        assert (run_dir(recipe) / "study" / "exam.json").is_file()
        made.append(recipe)
    assert apart(*made, 2) <= 1e-6
    ones, theirs = (events(recipe, "step") for recipe in made)
    assert [event["trained_tokens"] for event in ones] == [event["trained_tokens"] for event in theirs]
    assert [event["loss"] for event in theirs] == pytest.approx([event["loss"] for event in ones], abs=1e-5)
