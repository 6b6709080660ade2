"""What the processes of a run told each other of their cards."""

from __future__ import annotations

import json

import pytest

from qlora import ranks
from qlora.foreign_json import ForeignFileError, checked
from qlora.ranks import Rank


def test_it_is_known_inside_of_the_run() -> None:
    one = Rank(name="cpu", on_card=False, total_bytes=0, free_bytes=1)
    with ranks.told([one, one]):
        assert ranks.of_run() == (one, one)
    assert ranks.of_run() == ()


def test_equal_cards_are_equal_however_much_of_them_is_free() -> None:
    first, second = (Rank(name="RTX 3090", on_card=True, total_bytes=9, free_bytes=n, capability=86) for n in (8, 7))
    assert first.kind == second.kind != first.model_copy(update={"capability": 89}).kind


def test_another_process_s_words_are_checked() -> None:
    kept = json.loads(Rank(name="cpu", on_card=False, total_bytes=0, free_bytes=1).model_dump_json())
    assert checked(Rank, kept, "process 1").free_bytes == 1
    with pytest.raises(ForeignFileError, match="process 1"):
        checked(Rank, {**kept, "free_bytes": -1}, "process 1")
