"""Marks that change what may be learned: ratings, switches of training, media."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from qlora.data.marks import check_media, check_rating, check_row_switches, ignoring, trained
from qlora.data.row_json import RowError
from qlora.data.unread import CONTEXT, NOT_ANSWERS, Ledger

RATINGS = ("label", "kto_tag", "rating", "feedback", "is_good", "thumbs_up", "accepted")


@pytest.mark.parametrize(
    "value", [False, 0, 0.0, -1, "false", "False", "0", "bad", "rejected", "Undesirable", "thumbs_down"]
)
@pytest.mark.parametrize("key", RATINGS)
def test_a_bad_answer_is_refused_by_its_column_and_the_way_out_is_said(key: str, value: Any) -> None:
    with pytest.raises(RowError) as caught:
        check_rating(Ledger().open({key: value}))
    assert caught.value.reason.startswith(f"{key} is {value!r}: this marks a bad answer")
    assert "train the rows marked good from a file of their own" in caught.value.hint
    line = caught.value.hint.partition("columns = ")[2]
    assert tomllib.loads(f"columns = {line}") == {"columns": {f"ignored_{key}": key}}


@pytest.mark.parametrize("value", [True, 1, "true", "1", "good", "chosen", "desirable"])
def test_a_mark_of_a_good_answer_is_read(value: Any) -> None:
    ledger = Ledger()
    check_rating(ledger.open({"label": value}))
    assert ledger.remarks() == ()


@pytest.mark.parametrize("value", [5, "science", 0.5, "positive", [False], {"a": False}])
def test_what_is_no_mark_of_good_or_bad_stays_unread_and_is_named(value: Any) -> None:
    ledger = Ledger()
    check_rating(ledger.open({"label": value}))
    assert [remark.name for remark in ledger.remarks()] == ["label"]


def test_reversed_marks_are_bad_where_they_are_true_and_a_rejected_text_is_none() -> None:
    for values in ({"thumbs_down": True}, {"rejected": "true"}, {"is_bad": 1}):
        with pytest.raises(RowError, match="this marks a bad answer"):
            check_rating(Ledger().open(values))
    for values in ({"thumbs_down": False}, {"rejected": "Another answer."}, {"rejected": [{"role": "assistant"}]}):
        check_rating(Ledger().open(values))


def test_a_bad_turn_is_refused_with_its_place() -> None:
    with pytest.raises(RowError) as caught:
        check_rating(Ledger().open({"rating": "bad"}, "messages[3]"))
    assert caught.value.reason.startswith("messages[3].rating is 'bad'")
    assert "train = false" in caught.value.hint


@pytest.mark.parametrize(
    "values",
    [
        *({key: False} for key in ("train", "train_on", "training", "trainable", "loss", "loss_mask")),
        *({"weight": 0}, {"loss": 0}, {"loss_mask": 0}, {"training": "false"}, {"masked": True}, {"masked": 1}),
        {"train": False, "weight": 0, "masked": True},
    ],
)
def test_switches_of_other_trainers_are_honoured_and_counted(values: dict[str, Any]) -> None:
    ledger = Ledger()
    assert not trained(ledger.open(values, "messages[1]"), "assistant", ledger)
    assert {(remark.kind, remark.name) for remark in ledger.remarks()} == {
        (CONTEXT, f"messages[].{key}") for key in values
    }


@pytest.mark.parametrize(
    "values", [{}, {"train": None}, {"train": True}, {"weight": 1}, {"masked": False}, {"loss": 1}]
)
def test_a_turn_is_trained_otherwise(values: dict[str, Any]) -> None:
    ledger = Ledger()
    assert trained(ledger.open(values), "assistant", ledger)
    assert ledger.remarks() == ()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"weight": 0.5}, "m.weight is 0.5 (known are 0 and 1)"),
        ({"train": "no"}, "m.train is 'no' (known are true and false)"),
        ({"loss": [1]}, "m.loss is a list"),
        ({"mask": True}, "m.mask is True: what it trains is not clear"),
        ({"train_detail": [{"begin_offset": 0}]}, "m.train_detail is a list: what it trains is not clear"),
        ({"train": True, "weight": 0}, "train = True and weight = 0 contradict each other"),
    ],
)
def test_what_is_not_clear_is_refused(values: dict[str, Any], reason: str) -> None:
    ledger = Ledger()
    with pytest.raises(RowError) as caught:
        trained(ledger.open(values, "m"), "assistant", ledger)
    assert reason in caught.value.reason
    assert caught.value.hint


def test_a_switch_that_asks_for_a_users_turn_is_said() -> None:
    ledger = Ledger()
    assert trained(ledger.open({"train": True, "weight": 0}, "messages[0]"), "user", ledger)
    assert [tuple(remark) for remark in ledger.remarks()] == [(NOT_ANSWERS, "messages[].train")]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"train": False}, "train is False: by that the answers of this row are not trained"),
        ({"weight": 0}, "weight is 0: by that"),
        ({"masked": True}, "masked is True: by that"),
        ({"mask": "Assistant"}, "mask is 'Assistant': by that"),
        ({"train_on": "user"}, "train_on is 'user': by that"),
        ({"loss_mask": [0, 1]}, "loss_mask is a list"),
        ({"train_on_inputs": True}, "train_on_inputs is True"),
        ({"mask_history": "true"}, "mask_history is 'true'"),
    ],
)
def test_a_row_that_asks_for_other_turns_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        check_row_switches(Ledger().open(values))
    assert reason in caught.value.reason
    assert ignoring(next(iter(values))) in caught.value.hint


@pytest.mark.parametrize("values", [{"mask": "User"}, {"train_on": "assistant"}, {"train": True}, {"masked": False}])
def test_a_row_that_asks_for_what_is_done_is_read(values: dict[str, Any]) -> None:
    ledger = Ledger()
    check_row_switches(ledger.open({**values, "weight": 2.5}))
    assert [remark.name for remark in ledger.remarks()] == ["weight"]


@pytest.mark.parametrize("key", ["images", "image", "videos", "video", "audios", "audio"])
def test_media_are_refused_by_name_and_so_are_their_places_in_the_text(key: str) -> None:
    with pytest.raises(RowError) as caught:
        check_media(Ledger().open({key: ["a.png"]}))
    assert caught.value.reason.startswith(f"{key}: this row brings {key}") and ignoring(key) in caught.value.hint
    with pytest.raises(RowError, match="holds the place of a medium \\(<image>, column"):
        check_media(Ledger().open({key: []}), ["hello", "<image>\nWhat is it?"])
    check_media(Ledger().open({key: []}), ["no place"])
    check_media(Ledger().open({}), ["the tag <image> in XML"])
