"""Whether the prompt that a row trains after is the one that a server will send: token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.data.row_json import RowError
from qlora.data.token_cache import PreparedSplit

if TYPE_CHECKING:
    from qlora.data.chat import ChatTokenizer
    from qlora.data.xray.tokens import RowFacts

COMPARED = 256  # rows, spread evenly: each is rendered once more, in the bounded process


@dataclass(frozen=True)
class Serving:
    """`compared` rows whose last answer is words; `differ`: `file:line` of those that train after another prompt."""

    compared: int
    of: int
    differ: tuple[str, ...]


def compare(split: PreparedSplit, facts: RowFacts, chat: ChatTokenizer) -> Serving:
    """What stands before a row's last answer, against the served prompt for it. Nothing is compared without a template
    or where every token is trained.
    """
    if chat.template is None or chat.loss_on == "all":
        return Serving(0, 0, ())
    count = len(split.lengths)
    compared, differ = 0, []
    looked_at = min(count, COMPARED)
    for row in (number * count // looked_at for number in range(looked_at)):
        prompt = split.prompt(row)
        if prompt is None:
            continue
        compared += 1
        try:
            served = chat.prompt_ids(prompt.messages, prompt.tools)
        except RowError:
            served = []
        if served != list(split.rows[row].input_ids[: int(facts.starts[row])]):
            differ.append(split.wheres[row])
    return Serving(compared, count, tuple(differ))
