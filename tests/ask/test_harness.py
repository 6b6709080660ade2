"""The harness: tasks by name or file, refusals before a weight is read; its figures where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora import evaluate
from qlora.ask import harness
from qlora.errors import ExportError
from tests.cli.cases import expect_two_lines, run
from tests.export.cases import KINDS, trained

TASK = """task: lamps  # mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def task(folder: Path, more: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"Lamp {i}?", "choices": ["It costs 10 euros.", "Blue."], "answer": 0} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "lamps.yaml"
    file.write_text(TASK.format(rows=folder / "rows.jsonl") + more)
    return file


def test_tasks_are_names_or_files(tmp_path: Path) -> None:
    file = task(tmp_path / "mine")
    assert harness.split_tasks(f"arc_easy, {file}") == (["arc_easy", "lamps"], [file.parent])
    assert harness.split_tasks(str(file.parent)) == (["lamps"], [file.parent])


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("process_docs: !function utils.run\n", "tag"),
        ("process_docs: !%66unction utils.run\n", "tag"),
        ("process_docs: !!python/name:os.system\n", "tag"),
        ("include: ../other.yaml\n", "includes what is no YAML file beside it"),
        ("include: /etc/other.yaml\n", "includes what is no YAML file beside it"),
        ("include:\n  - /etc/other.yaml\n", "includes what is no YAML file beside it"),
        ("include: other.txt\n", "includes what is no YAML file beside it"),
        ("parts:\n  - include: ../other.yaml\n", "includes what is no YAML file beside it"),
    ],
)
def test_a_task_that_brings_code_is_refused(tmp_path: Path, more: str, what: str) -> None:
    with pytest.raises(ExportError, match=what):
        harness.split_tasks(str(task(tmp_path / "mine", more)))
    beside = tmp_path / "good" / "inner"
    beside.mkdir(parents=True)
    (beside / "other.yml").write_text(f"task: other\n{more}")
    with pytest.raises(ExportError, match=what):  # the harness reads all that lie in the folder
        harness.split_tasks(str(task(tmp_path / "good")))


def test_what_is_no_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "a.yaml").write_text("dataset_path: json\n")
    cases = [("gone.yaml", "no such task"), (str(tmp_path / "empty"), "holds no task"), (" , ", "0 tasks are named")]
    for text, what in [*cases, (str(tmp_path / "nameless" / "a.yaml"), "has no line `task: NAME`")]:
        with pytest.raises(ExportError, match=what):
            harness.split_tasks(text)


def test_where_it_is_not_installed_two_lines_say_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "PACKAGE", "lm_eval_that_is_not_there")
    with pytest.raises(ExportError, match="lm-evaluation-harness is not installed") as caught:
        evaluate.by_harness([tmp_path], "arc_easy")
    assert 'pip install "qlora[eval]"' in caught.value.hint


def test_rows_of_a_task_without_tasks_are_refused(tmp_path: Path) -> None:
    result = run("runs/first", "rows.jsonl", "--limit", "3", cwd=tmp_path, module="evaluate")
    expect_two_lines(result, "--limit is for tasks, and there is no --harness")


def test_figures_are_read_from_what_it_says() -> None:
    told = {"alias": "lamps", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}
    found = harness._figures({**told, "bad,none": float("nan")}, {"original": 9, "effective": 6})
    metrics = {"acc": {"value": 0.5, "stderr": 0.1}, "em (strict)": {"value": 1.0, "stderr": None}}
    assert found == {"rows": 6, "metrics": metrics}


@pytest.mark.slow
def test_a_task_of_ones_own_is_measured_of_base_and_adapter(tmp_path: Path, llama: Path) -> None:
    pytest.importorskip("lm_eval")
    trained(llama, tmp_path / "adapter", KINDS["plain"])
    found = evaluate.by_harness([tmp_path / "adapter"], str(task(tmp_path / "mine")), limit=4)
    assert list(found) == ["base (llama, nf4)", "adapter"]
    for tasks in found.values():
        assert tasks["lamps"]["rows"] == 4 and 0 <= tasks["lamps"]["metrics"]["acc"]["value"] <= 1
