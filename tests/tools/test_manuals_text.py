"""The handbook and the tiny base that reads it: nothing of the one stands in what the other was pre-trained on."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MANUALS = ROOT / "recipes" / "manuals"
BASE = MANUALS / "base"
sys.path.insert(0, str(ROOT / "tools"))

import make_manuals  # noqa: E402
from make_manuals_base import build_model, writer_of  # noqa: E402
from manuals_relations import CLAUSE_FRAMES, FAMILIES, NOUN_FRAMES, STORIES  # noqa: E402
from manuals_values import handbook_names  # noqa: E402

RUN = 6  # words
WEIGHTS_LIMIT = 5_000_000


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def runs(text: str) -> Iterator[tuple[str, ...]]:
    """Each run of six words."""
    found = words(text)
    return zip(*(found[start:] for start in range(RUN)), strict=False)


def end_of_log() -> dict[str, float | str]:
    return dict(json.loads((BASE / "pretraining_log.jsonl").read_text(encoding="utf-8").splitlines()[-1]))


def handbook_texts() -> list[str]:
    return [text for _, text in make_manuals.sources().values()]


def test_the_documents_are_the_generated_ones(tmp_path: Path) -> None:
    make_manuals.write(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name: path.read_bytes() for path in (MANUALS / "documents").iterdir()} == written
    assert sorted(Path(name).suffix for name in written) == [".docx", ".html", ".md", ".md", ".pdf"]


def test_the_handbook_is_large_enough_and_says_each_fact_once() -> None:
    sections = [section for _, _, _, sections in make_manuals.handbook() for section in sections]
    said = [fact for _, facts in sections for fact in facts]
    assert len(sections) == 40
    assert len({(fact.entity, fact.relation.name) for fact in said}) == len(said) >= 200
    assert all(fact.entity in fact.sentence and fact.value in fact.sentence.replace("Only ", "") for fact in said)


def test_no_relation_is_told_in_a_form_of_the_pre_training_text() -> None:
    told = {form for family in FAMILIES for relation in family.relations for form in relation.statements}
    assert told.isdisjoint(form for forms in make_manuals.FORMS.values() for form in forms)


def test_names_stand_so_near_in_questions_that_no_long_run_is_shared() -> None:
    """Five words at most before and after a name: what is asked about another name has no six words in common."""
    for relation in {relation for family in FAMILIES for relation in family.relations}:
        framed = [frame.replace("{x}", noun) for frame in NOUN_FRAMES for noun in relation.nouns]
        framed += [frame.replace("{x}", clause) for frame in CLAUSE_FRAMES for clause in relation.clauses]
        told = [f"{story} {case}" for story in STORIES for case in relation.case]
        for wording in (*relation.asked, *framed, *told, *relation.backward):
            before, after = re.split(r"\{[evX]\}", wording, maxsplit=1)
            assert len(words(before)) < RUN and len(words(after)) < RUN, wording


def test_the_handbooks_names_are_nobody_elses() -> None:
    names = {name.lower() for part in handbook_names() for name in part}
    for text in writer_of(5).documents(2_000, 5):
        assert names.isdisjoint(words(text))


def test_another_seed_is_another_text() -> None:
    first, again, other = (list(writer_of(seed).documents(50, seed)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_an_untrained_base_copies_what_it_has_seen() -> None:
    """Of random tokens that come twice, the second time: one in 2,048 by chance."""
    model = build_model(1)
    half_BS = torch.randint(3, 2048, (8, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        said_BS = model(input_ids=torch.cat([half_BS, half_BS], 1)).logits.argmax(-1)
    assert (said_BS[:, 40:-1] == half_BS[:, 1:]).float().mean() > 0.4


@pytest.mark.slow
def test_no_name_and_no_six_words_of_the_handbook_stand_in_the_pre_training_text() -> None:
    end = end_of_log()
    names = {name.lower() for part in handbook_names() for name in part}
    told = {run for text in handbook_texts() for run in runs(text)}
    digest = hashlib.sha256()
    for text in writer_of(int(end["seed"])).documents(int(end["documents"]), int(end["seed"])):
        digest.update(text.encode())
        assert told.isdisjoint(runs(text))
        assert names.isdisjoint(words(text))
    assert digest.hexdigest() == end["text_sha256"]


def test_the_base_is_small_and_reads() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
    assert str(model.dtype) == "torch.bfloat16"
    assert model.num_parameters() <= WEIGHTS_LIMIT
    end = end_of_log()
    assert float(end["read"]) >= 0.85
