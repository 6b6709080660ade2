"""A run is examined again by what its folder holds; what is none of it is refused in two lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora import api
from qlora.cli.exam import app
from qlora.errors import DataError, ExportError, QloraError, RunFolderError
from qlora.events import Recorder
from qlora.examine import examine
from qlora.study import exam_questions
from qlora.study.exam_questions import ExamQuestion
from tests import runs
from tests.families import make_base
from tests.study.passages import PASSAGES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with an exam of two questions, as a study leaves it."""
    folder = tmp_path_factory.mktemp("examined")
    recipe = runs.write_recipe(folder, make_base("llama", folder / "base"))
    settings = ("train.max_steps=2", "data.max_length=96", "eval.samples=0", "eval.exact_match_rows=0")
    runs.train(recipe, *settings, "train.seed=1")  # by 42 two of four answers are ties
    run_dir = runs.run_dir(recipe)
    study = run_dir / "study"
    study.mkdir()
    exam_questions.save_passages(study, PASSAGES)
    asked = [
        ExamQuestion("k1", "words", "How heavy is it?", ("84 kg",), "en", PASSAGES[0].key),
        ExamQuestion("k2", "left_out", "What gas is it?", ("propane",), "en", PASSAGES[0].key),
    ]
    lines = [json.dumps(vars(question), default=list) for question in asked]
    (study / "exam.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return run_dir


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"


@pytest.fixture(autouse=True)
def few_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of the hundred and twenty that are asked beside the questions."""
    monkeypatch.setattr("qlora.study.exam.neutral_prompts", lambda: ["Describe a cat."])
    monkeypatch.setattr("qlora.study.exam_questions.UNANSWERABLE", 1)
    monkeypatch.setattr("qlora.study.exam.MAX_TOKENS", 4)


def test_a_run_is_asked_again_and_its_figures_are_written(run: Path) -> None:
    sink = Recorder()
    figures = examine(run, sink=sink)
    assert list(figures["parts"]) == ["words", "left_out"]
    assert list(figures["parts"]["words"]["columns"]) == [
        "base", "base_retrieval", "base_passage", "tuned", "tuned_retrieval",
    ]  # fmt: skip
    assert figures["elsewhere"]["prompts"] == 1 and figures["elsewhere"]["nats"] >= 0
    assert json.loads((run / "study" / "exam.json").read_text("utf-8")) == figures
    assert sink.of("exam")[0].figures == figures  # type: ignore[attr-defined]
    written = (run / "study" / "exam_answers.jsonl").read_bytes()
    assert examine(run) == figures and (run / "study" / "exam_answers.jsonl").read_bytes() == written


def test_other_questions_do_not_touch_the_run_s_own_figures(run: Path, tmp_path: Path) -> None:
    examine(run)
    before = (run / "study" / "exam.json").read_bytes()
    (tmp_path / "ours.csv").write_text("question,answer\nHow heavy?,84 kg\n", "utf-8")
    figures = examine(run, questions=tmp_path / "ours.csv")
    assert list(figures["parts"]) == ["yours"] and (run / "study" / "exam.json").read_bytes() == before


@pytest.mark.slow
def test_exports_are_asked_in_the_adapter_s_place(run: Path) -> None:
    own = examine(run)
    api.merge_and_export(run, to=["hf", "gguf"], quants=["f16"], options=api.export_options(verify=False))
    texts = {}
    for of in (run / "export" / "hf", *(run / "export").glob("gguf*")):
        figures = examine(run, of=of)
        assert figures["elsewhere"]["prompts"] == 0
        assert figures["parts"]["words"]["columns"]["base"] == own["parts"]["words"]["columns"]["base"]
        lines = (run / "study" / "exam_answers.jsonl").read_text("utf-8").splitlines()
        texts[of.name] = [json.loads(line)["text"] for line in lines][-4:]
    # The same greedy answers by transformers and by llama.cpp, up to a tie.
    first, second = texts.values()
    assert sum(a == b for a, b in zip(first, second, strict=True)) >= 3


@pytest.mark.slow
def test_another_model_s_export_is_refused(run: Path, tmp_path: Path) -> None:
    other = make_base("llama", tmp_path / "other", overrides={"hidden_size": 32})
    with pytest.raises(ExportError, match="another model"):
        examine(run, of=other)
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, but nothing of it")
    with pytest.raises(QloraError, match=r"broken\.gguf"):
        examine(run, of=file)


def test_what_is_no_run_or_has_no_exam_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run's folder"):
        examine(tmp_path / "nothing")
    (copy / "study" / "exam.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"exam\.jsonl: is not there") as told:
        examine(copy)
    assert "no exam" in told.value.hint
    (copy / "study" / "chunks.jsonl").write_text("{broken\n")
    with pytest.raises(RunFolderError, match=r"chunks\.jsonl:1"):
        examine(copy)
    shutil.rmtree(copy / "study")
    with pytest.raises(RunFolderError, match="is not there"):
        examine(copy)
    (copy / "study").symlink_to(tmp_path)
    with pytest.raises(RunFolderError, match="is a link"):
        examine(copy)


def test_questions_and_exports_that_are_none_are_refused_before_anything_is_loaded(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        examine(copy, questions=tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"frage": "Was?", "antwort": "Das"}\n', "utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*frage"):
        examine(copy, questions=tmp_path / "rows.jsonl")
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    with pytest.raises(DataError, match="empty"):
        examine(copy, questions=tmp_path / "empty.jsonl")
    for of in (tmp_path, tmp_path / "none.gguf", tmp_path / "rows.jsonl"):
        with pytest.raises(ExportError, match="neither a GGUF file nor"):
            examine(copy, of=of)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ExportError, match="2 GGUF files"):
        examine(copy, of=tmp_path)


def test_the_command_says_it_in_two_lines(copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        app([str(copy), "--of", str(tmp_path / "none.gguf"), "--json"])
    said = capfd.readouterr()
    assert end.value.code == 2 and not said.out and len(said.err.strip().splitlines()) == 2 and "--of" in said.err
