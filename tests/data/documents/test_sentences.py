"""A paragraph to sentences."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.data.documents.sentences import sentences_of

CASES = [
    ("en", "It costs $3.50. Dr. Smith paid. He left!|\"Why?\" she asked. See No. 5, e.g. the valve."),
    ("en", "Open it at 5 p.m. or later. The answer is no. Then wait... It stops.|J. R. Brown of the U.S. Navy came."),
    ("de", "Am 3. Mai kam er an. Die 2. Auflage ist z. B. besser, vgl. S. 12. Es waren 3. Danach ging er.|Für 5,50 €."),
    ("de", "Karl V. von Spanien. Prüfen Sie ggf. Pumpe bzw. Ventil. „Halt!“ rief er. Nr. 5 fehlt. Ende 2019. Dann."),
    ("fr", "M. Dupont est là. Voir p. 12 et art. 3. Le prix est de 3.50 €. Est-ce vrai ? Oui !"),
    ("es", "El Sr. García llegó. ¿Dónde está? ¡Aquí! Véase pág. 3. Fin."),
    ("zh", "打开阀门。等待五分钟！水热吗？“是的。”他说。价格是3.5元。"),
]  # fmt: skip
EXPECTED = [
    ["It costs $3.50.", "Dr. Smith paid.", "He left!", '"Why?" she asked.', "See No. 5, e.g. the valve."],
    ["Open it at 5 p.m. or later.", "The answer is no.", "Then wait...", "It stops.",
     "J. R. Brown of the U.S. Navy came."],
    ["Am 3. Mai kam er an.", "Die 2. Auflage ist z. B. besser, vgl. S. 12.", "Es waren 3.", "Danach ging er.",
     "Für 5,50 €."],
    ["Karl V. von Spanien.", "Prüfen Sie ggf. Pumpe bzw. Ventil.", "„Halt!“ rief er.", "Nr. 5 fehlt.",
     "Ende 2019.", "Dann."],
    ["M. Dupont est là.", "Voir p. 12 et art. 3.", "Le prix est de 3.50 €.", "Est-ce vrai ?", "Oui !"],
    ["El Sr. García llegó.", "¿Dónde está?", "¡Aquí!", "Véase pág. 3.", "Fin."],
    ["打开阀门。", "等待五分钟！", "水热吗？", "“是的。”", "他说。", "价格是3.5元。"],
]  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), [*zip(CASES, EXPECTED, strict=True)], ids=str)
def test_where_sentences_end(case: tuple[str, str], expected: list[str]) -> None:
    language, text = case
    assert sentences_of(text.replace("|", "\n"), language) == expected


@given(st.text(alphabet="ab Ä3.!?…\"') \n。）(", max_size=60), st.sampled_from(["en", "de", "fr", "es", "zh", "other"]))
def test_nothing_is_lost(text: str, language: str) -> None:
    assert "".join("".join(sentences_of(text, language)).split()) == "".join(text.split())
