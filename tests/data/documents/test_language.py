"""Which language a text is written in."""

from __future__ import annotations

import pytest

from qlora.data.documents.language import LANGUAGES, language_of

TEXTS = {
    "en": "Open the valve before you start the pump. The warranty of the TX-200 is seven years.",
    "de": "Öffnen Sie das Ventil, bevor Sie die Pumpe starten. Die Garantie der TX-200 beträgt sieben Jahre ab Kauf.",
    "fr": "Ouvrez la vanne avant de démarrer la pompe. La garantie de la TX-200 est de sept ans à partir de la vente.",
    "es": "Abra la válvula antes de poner en marcha la bomba. La garantía de la TX-200 es de siete años.",
    "zh": "启动水泵之前请先打开阀门。TX-200 的保修期为七年，自销售之日起计算。",
}
OTHERS = {
    "it": "Aprire la valvola prima di avviare la pompa. La garanzia del prodotto è di sette anni dalla vendita.",
    "pt": "Abra a válvula antes de ligar a bomba. A garantia do produto é de sete anos e não inclui as peças da bomba.",
    "nl": "Open de klep voordat u de pomp start. De garantie van het apparaat is zeven jaar, en niet op de filters.",
    "pl": "Przed uruchomieniem pompy należy otworzyć zawór. Gwarancja wynosi siedem lat i nie jest dłuższa.",
    "sv": "Öppna ventilen innan du startar pumpen. Garantin på produkten är sju år och den gäller inte för filtret.",
    "ru": "Перед запуском насоса откройте клапан. Гарантия на изделие составляет семь лет.",
    "ja": "ポンプを起動する前にバルブを開いてください。保証期間は七年です。",
    "ko": "펌프를 시작하기 전에 밸브를 여십시오. 보증 기간은 7년입니다.",
    "nothing": "E41 | E42 | 4990",
    "empty": "",
}


@pytest.mark.parametrize("language", TEXTS)
def test_the_five_languages_are_told(language: str) -> None:
    assert language_of(TEXTS[language]) == language and language in LANGUAGES


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_others(name: str) -> None:
    assert language_of(OTHERS[name]) == "other"
