"""What a template leaves out is said once, with its count."""

from __future__ import annotations

from collections import Counter

from qlora.data import dropped
from qlora.data.dropped import notices


def test_a_notice_for_each_kind_that_was_met() -> None:
    found = list(notices(Counter({"words": 3, "history": 2, "calls": 0})))
    assert [(notice.topic, notice.count) for notice in found] == [("reasoning", 2), ("template", 3)]
    assert found[0].message == "2 answers without their reasoning, which the template drops from history"
    assert found[1].message.startswith("3 answers are trained without the words beside their tool call")
    assert len(list(notices(dict.fromkeys(dropped._SAID, 1)))) == len(dropped._SAID)
