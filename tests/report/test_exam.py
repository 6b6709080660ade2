"""An exam's lines: what a person reads, drawn from figures alone."""

from __future__ import annotations

from qlora.report import exam
from tests.report.cases import FIGURES

DRAWN = """\
200 questions in other words, none of them trained   right    95 %
base                                                12.0 %    8–17
base + best 3 passages                              61.5 %    55–68
base + its own passage                              88.0 %    83–92     of 198    what this base can read out at all
tuned                                               74.0 %    68–80
tuned + best 3 passages                             83.5 %    78–88
left out of the study, 40: base 10 %, tuned 12 %       cannot be answered, 20: invented 35 % → 60 %
elsewhere, 100 prompts                            0.04 nats from the base
coverage: 93 % of 2,140 sentences have a question; 278 rows dropped: 181 ungrounded, 97 unsure
Do this."""


def test_lines_are_those_of_the_figures() -> None:
    assert "\n".join(exam.lines(FIGURES)) == DRAWN


def test_what_was_not_asked_is_not_drawn() -> None:
    nothing = {"questions": 0, "base": None, "tuned": None}
    empty = {**FIGURES, "parts": {}, "unanswerable": nothing, "elsewhere": {"prompts": 0, "nats": None}, "advice": []}
    assert exam.lines({**empty, "coverage": {}, "dropped": {}}) == []


def test_the_user_s_own_questions_stand_first() -> None:
    words = FIGURES["parts"]["words"]
    assert exam.lines({**FIGURES, "parts": {"words": words, "yours": words}})[0].startswith("200 questions of yours ")
