"""What a run of GRPO reports is kept as any event is: plain values, without secrets, whatever a reward is called."""

from __future__ import annotations

import json

from qlora.events import clean
from qlora.reward_events import Rewarded


def test_it_is_a_line_of_plain_values() -> None:
    event = Rewarded(3, False, 8, 0.5, {"exact_match": 0.5}, 7.5, 0.0, without_signal=0.25)
    line = json.loads(json.dumps(event.as_dict()))
    assert (line["event"], line["step"], line["rewards"], line["kl"]) == ("rewards", 3, {"exact_match": 0.5}, None)
    assert clean(event) is event


def test_what_a_reward_is_called_steers_no_terminal() -> None:
    (name,) = clean(Rewarded(1, True, 1, 0.0, {"regex:\x1b[2J": 0.0}, 1.0, 0.0)).rewards  # type: ignore[attr-defined]
    assert "\x1b" not in name
