"""What an exam found: figures for programs (exam.json), and for people (exam.md, the model card).

Figures of exam.json
    parts         by part ("yours", "words", "left_out"): `questions`, `columns` (by column: `questions` that it was
                  asked, and `right`, `f1`, `exact`, each with `mean`, `low`, `high`: shares of 0 to 1 and the 95 %
                  interval), `p_values` (McNemar, "tuned/base" …), `untaught`: how many the base fails with its own
                  passage in view, which nothing can teach it
    unanswerable  `questions`, and the share of invented answers of `base` and `tuned`; whatever is not one of the
                  refusals of `words.toml`, and not empty, is invented
    elsewhere     `prompts`, and `nats`: mean KL(base || tuned) a token along the base's own answers
    coverage      sentences, and how many of them have a question; dropped: rows by reason
    advice        what to do, as sentences
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qlora import disk, files, foreign_json, shown
from qlora.redaction import redact, redact_all
from qlora.report.exam import NAMES, lines
from qlora.study import metrics, words
from qlora.study.exam_questions import ExamQuestion

JSON_FILE = "exam.json"
MARKDOWN_FILE = "exam.md"
COVERAGE_FILE = "coverage.json"
DROPPED_FILE = "dropped.jsonl"
EXAMPLES = 10  # questions answered wrongly that exam.md shows
READS = 0.6  # of the questions with their passage in view: below, the base is too small (as at the probe)
LEFT_OUT_SLACK = 0.05  # by which what was left out may rise: the control
_PAIRS = (("tuned", "base"), ("tuned", "base_retrieval"), ("tuned_retrieval", "base_retrieval"))
_MAX_COVERAGE = 1 << 28
_MAX_DROPPED = 4 << 30
_MAX_LINE = 1 << 20

Answers = Mapping[str, Mapping[str, str]]  # by column, by the question's key


def figures(questions: Sequence[ExamQuestion], answers: Answers, nats: Sequence[float], seed: int) -> dict[str, Any]:
    """The figures that follow from the answers: see above; `coverage` and `dropped` are empty."""
    parts = {}
    for part in ("yours", "words", "left_out"):
        asked = [question for question in questions if question.part == part]
        if asked:
            parts[part] = _part(asked, answers, seed)
    unanswerable = [question for question in questions if question.part == "unanswerable"]
    found: dict[str, Any] = {
        "version": 1,
        "parts": parts,
        "unanswerable": {
            "questions": len(unanswerable),
            **{name: _invented(unanswerable, answers.get(name, {})) for name in ("base", "tuned")},
        },
        "elsewhere": {"prompts": len(nats), "nats": sum(nats) / len(nats) if nats else None},
        "coverage": {},
        "dropped": {},
    }
    return {**found, "advice": _advice(found)}


def with_study(found: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The figures with those of the study in `folder`; as they are where it left none that can be read."""
    return {**found, "coverage": _coverage(folder / COVERAGE_FILE), "dropped": _dropped(folder / DROPPED_FILE)}


def write(folder: Path, found: Mapping[str, Any], questions: Sequence[ExamQuestion], answers: Answers) -> None:
    """exam.json and exam.md."""
    plain = shown.plain_values(redact_all(found))
    disk.write_atomic(folder / JSON_FILE, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    disk.write_atomic(folder / MARKDOWN_FILE, markdown(found, questions, answers))


def markdown(found: Mapping[str, Any], questions: Sequence[ExamQuestion], answers: Answers) -> str:
    """exam.md: the screen's lines, all metrics as a table, and questions that the tuned model got wrong."""
    text = ["# Exam", "", *map(_indented, lines(found)), ""]
    for part, content in found["parts"].items():
        text += [f"## {_TITLES[part]}", "", "| | asked | contains the answer | token F1 | exact match |"]
        text += ["| --- | --- | --- | --- | --- |"]
        for name, column in content["columns"].items():
            cells = " | ".join(_cell(column[metric]) for metric in ("right", "f1", "exact"))
            text.append(f"| {NAMES[name]} | {column['questions']:,} | {cells} |")
        text += [
            "",
            *(
                f"McNemar's test, {pair.replace('/', ' against ')}: p = {p:.2g}"
                for pair, p in content["p_values"].items()
            ),
        ]
        if content["untaught"]:
            text += [
                "",
                f"{content['untaught']:,} the base fails with its own passage in view: these cannot be taught.",
            ]
        text.append("")
    wrong = [question for question in questions if question.answers and _is_wrong(question, answers.get("tuned", {}))]
    if wrong:
        text += [f"## Answered wrongly: {min(EXAMPLES, len(wrong))} of {len(wrong):,}", ""]
        for question in wrong[:EXAMPLES]:
            given = answers["tuned"][question.key]
            for name, said in (("asked", question.text), ("right", question.answers[0]), ("tuned", given)):
                text.append(_indented(f"{name}: {said[:300]}"))
            text.append("")
    return "\n".join(text).rstrip() + "\n"


def card_section(found: Mapping[str, Any]) -> str:
    """What a model card says of the exam: Markdown that ends with a new line."""
    intro = (
        "Asked before and after training, greedily; right is what contains the answer after SQuAD's normalisation; "
        "beside it the 95 % interval."
    )
    return "\n".join(["## What it knows of its documents", "", intro, "", *map(_indented, lines(found))]) + "\n"


_TITLES = {"yours": "Questions of yours", "words": "In other words", "left_out": "Left out of the study"}


def _part(asked: Sequence[ExamQuestion], answers: Answers, seed: int) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    right: dict[str, dict[str, bool]] = {}
    for name in NAMES:
        given = answers.get(name, {})
        own = [question for question in asked if question.key in given]
        if not own:
            continue
        scores = {
            metric: [metrics.best(score, q.answers, given[q.key], q.language) for q in own]
            for metric, score in (
                ("right", metrics.contains),
                ("f1", metrics.token_f1),
                ("exact", metrics.exact_match),
            )
        }
        right[name] = {q.key: bool(hit) for q, hit in zip(own, scores["right"], strict=True)}
        measured = {metric: asdict(metrics.bootstrap(values, seed)) for metric, values in scores.items()}
        columns[name] = {"questions": len(own), **measured}
    p_values = {}
    for one, other in _PAIRS:
        both = sorted(right.get(one, {}).keys() & right.get(other, {}).keys())
        if both:
            p_values[f"{one}/{other}"] = metrics.mcnemar([right[one][k] for k in both], [right[other][k] for k in both])
    untaught = sum(not hit for hit in right.get("base_passage", {}).values())
    return {"questions": len(asked), "columns": columns, "p_values": p_values, "untaught": untaught}


def _invented(asked: Sequence[ExamQuestion], given: Mapping[str, str]) -> float | None:
    """Share of answers that tell something; None where nothing was asked."""
    own = [(question, given[question.key]) for question in asked if question.key in given]
    told = [bool(words.tokens(text, q.language)) and not words.refuses(text, q.language) for q, text in own]
    return sum(told) / len(told) if told else None


def _advice(found: Mapping[str, Any]) -> list[str]:
    """What to do about the figures; nothing where all is as it should be."""
    said = []
    columns = found["parts"].get("words", found["parts"].get("yours", {})).get("columns", {})
    share = {name: column["right"]["mean"] for name, column in columns.items()}
    tuned, both, retrieval = (share.get(name) for name in ("tuned", "tuned_retrieval", "base_retrieval"))
    if tuned is not None and retrieval is not None and tuned < retrieval:
        together = "" if both is None or both < retrieval else f": together they answer {100 * both:.1f} %"
        said.append(
            f"Retrieval answers more ({100 * retrieval:.1f} %) than the tuned model alone ({100 * tuned:.1f} %). Use "
            f"both{together}; or raise study.questions, or take a larger base."
        )
    if both is not None and retrieval is not None and both < retrieval:
        said.append(
            f"With passages in view the tuned model answers less ({100 * both:.1f} %) than the base "
            f"({100 * retrieval:.1f} %): raise study.with_passage."
        )
    if (reads := share.get("base_passage")) is not None and reads < READS:
        said.append(
            f"With the right passage in view this base answers {100 * reads:.1f} %: what it cannot read it cannot "
            "learn. Take a larger base."
        )
    hidden = found["parts"].get("left_out", {}).get("columns", {})
    rise = hidden["tuned"]["right"]["mean"] - hidden["base"]["right"]["mean"] if len(hidden) == 2 else 0.0
    if rise > LEFT_OUT_SLACK:
        said.append(
            f"What was left out of the study rose by {100 * rise:.1f} points: its facts stand elsewhere too, or the "
            "gain is one of style."
        )
    return said


def _is_wrong(question: ExamQuestion, given: Mapping[str, str]) -> bool:
    text = given.get(question.key)
    return text is not None and not metrics.best(metrics.contains, question.answers, text, question.language)


def _cell(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['mean']:.1f} % ({100 * interval['low']:.0f}–{100 * interval['high']:.0f})"


def _indented(text: str) -> str:
    """A line of an indented code block, in which nothing is Markdown."""
    return f"    {shown.one_line(redact(text))}"


class _Coverage(foreign_json.ForeignModel):
    sentences: Annotated[int, Field(ge=0)]
    with_question: Annotated[int, Field(ge=0)]


class _Lost(foreign_json.ForeignModel):
    reason: Annotated[str, Field(max_length=60)]


def _coverage(file: Path) -> dict[str, int]:
    try:
        return foreign_json.checked(_Coverage, foreign_json.load(file, _MAX_COVERAGE), str(file)).model_dump()
    except foreign_json.ForeignFileError:
        return {}


def _dropped(file: Path) -> dict[str, int]:
    """How many rows were dropped by reason, the most frequent first."""
    counted: Counter[str] = Counter()
    try:
        with files.open_to_read(file, _MAX_DROPPED) as content:
            while line := content.readline(_MAX_LINE):
                counted[foreign_json.checked(_Lost, foreign_json.parse_object(line, str(file)), str(file)).reason] += 1
    except (foreign_json.ForeignFileError, files.UnsafePathError, OSError):
        return {}
    return dict(counted.most_common(20))
