"""Marks on rows and turns that change what may be learned from them: ratings, switches of training, media.

Other trainers read them; a row whose mark is passed over would teach the opposite of what it says. Each is honoured,
or the row is refused with the way out. `columns = { ignored_label = "label" }` is the way to pass over one knowingly:
the key is then read by nothing, and the notice of such keys names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from qlora.data.role_words import plain_word, role_of
from qlora.data.row_json import RowError, is_blank, kind_of
from qlora.data.unread import CONTEXT, NOT_ANSWERS, Fields, Ledger

# Whether an answer is a good one: TRL's KTO rows (`label`), LLaMA-Factory's (`kto_tag`), and exports of feedback.
_RATINGS = (
    *("label", "kto_tag", "rating", "feedback", "thumbs", "thumbs_up"),
    *("good", "is_good", "desirable", "is_desirable", "liked", "preferred", "is_preferred", "accepted", "is_accepted"),
    *("correct", "is_correct", "approved", "is_approved"),
)
_REVERSED = ("rejected", "is_rejected", "disliked", "thumbs_down", "bad", "is_bad", "undesirable")
ALL_RATINGS = frozenset((*_RATINGS, *_REVERSED))
_GOOD = {"true", "1", "good", "chosen", "desirable", "like", "liked", "up", "thumbs_up", "upvote", "accepted", "yes"}
_BAD = {
    *("false", "0", "_1", "bad", "rejected", "undesirable", "dislike", "disliked", "down", "thumbs_down", "downvote"),
    *("no", "👎", "falsch", "faux", "falso"),
}
# Switches of a turn, by the trainer that reads them: OpenAI `weight`, axolotl `train`, `training`, `train_detail`,
# ms-swift `loss`, NeMo `mask`, torchtune `masked`.
_TRAINED_IF_TRUE = (
    *("train", "weight", "train_on", "training", "trained", "trainable", "loss", "loss_mask", "loss_weight"),
    *("train_on_turn", "calculate_loss"),
)
_TRAINED_IF_FALSE = ("masked", "is_masked", "ignore_loss", "no_loss", "mask_loss")
_SWITCHES = frozenset((*_TRAINED_IF_TRUE, *_TRAINED_IF_FALSE))
_UNCLEAR = ("mask", "train_detail", "loss_scale", "training_detail")
# Switches of a row: what they say here already, so that only the other value changes anything.
_OURS = {"train_on_inputs": False, "train_on_input": False, "train_on_prompt": False, "mask_history": False}

_MEDIA = ("images", "image", "videos", "video", "audios", "audio", "image_path", "image_paths", "pixel_values")
_PLACEHOLDER = re.compile(r"<(?:image|video|audio|img|image_placeholder)>|<\|(?:image|video|audio)(?:_pad)?\|>")


def ignoring(key: str) -> str:
    """The line of the recipe that passes over a column knowingly."""
    own = re.sub(r"\W+", "_", key.casefold()).strip("_") or "column"
    return f'columns = {{ ignored_{own} = "{key}" }}'


def check_rating(fields: Fields) -> None:
    """Raise RowError for an answer that is marked as a bad one. A mark of a good one is read; others stay unread."""
    for key in fields.among(ALL_RATINGS):
        value = fields.peek(key)
        if is_blank(value) or isinstance(value, list | tuple | dict):
            continue
        word = _word(value)
        bad, good = (_GOOD, _BAD) if key in _REVERSED else (_BAD, _GOOD)
        if key in _REVERSED and not (isinstance(value, bool) or word in ("true", "false", "0", "1")):
            continue  # a rejected answer itself, which is somebody else's matter
        if word in bad:
            raise RowError(f"{fields.where(key)} is {value!r}: {_MARKED_BAD}", _rating_hint(fields, key))
        if word in good:
            fields.take(key)


def is_rated_good(key: str, value: Any) -> bool:
    """What a mark says. Raises RowError for one that says neither."""
    word = {"👍": "up", "👎": "down"}.get(value, _word(value)) if isinstance(value, str) else _word(value)
    good, bad = (_BAD, _GOOD) if plain_word(key) in _REVERSED else (_GOOD, _BAD)
    if word not in good and word not in bad:
        raise RowError(f"{key} is {_shown(value)}: a mark is true or false", f"write {key} as true or false")
    return word in good


_MARKED_BAD = "this marks a bad answer, which would be trained as a good one"


def _rating_hint(fields: Fields, key: str) -> str:
    if fields.place:
        return "train the turns marked good alone: write train = false on the others, or give the rest its own file"
    return f"train the rows marked good from a file of their own; if {key} is no rating: {ignoring(key)}"


def check_media(fields: Fields, texts: Iterable[str] = ()) -> None:
    """Raise RowError for images, videos or sounds beside the text, and for their places in `texts`."""
    for key in fields.among(_MEDIA):
        hint = f"train rows of text from a file of their own; to pass over the column: {ignoring(key)}"
        if not is_blank(fields.peek(key)):
            raise RowError(f"{fields.where(key)}: this row brings {key.replace('_', ' ')}, and {ONLY_TEXT}", hint)
        if place := next(filter(None, map(_PLACEHOLDER.search, texts)), None):
            raise RowError(f"the text holds the place of a medium ({place[0]}, column {key}), and {ONLY_TEXT}", hint)


ONLY_TEXT = "only text is trained on"


def trained(fields: Fields, role: str, ledger: Ledger) -> bool:
    """Whether a turn is trained, by every switch that it has. Raises RowError where they contradict or are unclear.

    A turn that is no answer is never trained by itself; a switch that asks for it is a remark.
    """
    found: dict[str, bool] = {}
    for key in fields.among(_SWITCHES):
        if (value := fields.take(key)) is not None:
            found[key] = _switch(fields, key, value) != (key in _TRAINED_IF_FALSE)
    for key in fields.among(_UNCLEAR):
        if not is_blank(fields.peek(key)):
            what = f"{fields.where(key)} is {_shown(fields.take(key))}: what it trains is not clear"
            raise RowError(what, "say it with train = true or train = false on each assistant message")
    if role != "assistant":
        for key in (key for key, value in found.items() if value):
            ledger.say(NOT_ANSWERS, fields.where(key))
        return True
    if len(set(found.values())) > 1:
        what = " and ".join(f"{key} = {_shown(fields.peek(key))}" for key in found)
        raise RowError(f"{fields.place}: {what} contradict each other", "keep one of the two on that message")
    for key, value in found.items():
        if not value:
            ledger.say(CONTEXT, fields.where(key))
    return all(found.values())


def _switch(fields: Fields, key: str, value: Any) -> bool:
    if isinstance(value, bool) and key != "weight":
        return value
    if isinstance(value, int | float) and value in (0, 1) and not isinstance(value, bool):
        return value == 1
    if isinstance(value, str) and key not in ("weight", "train") and _word(value) in ("true", "false"):
        return _word(value) == "true"
    known = "0 and 1" if key == "weight" else "true and false"
    what = f"{fields.where(key)} is {_shown(value)} (known are {known})"
    raise RowError(what, f"write {key} as one of {known}, or train = true or false in its place")


def _shown(value: Any) -> str:
    return kind_of(value) if isinstance(value, list | tuple | dict) else repr(value)


def check_row_switches(row: Fields) -> None:
    """Raise RowError for a row that is not to be trained, or that asks for other turns than the answers."""
    for key in row.among(_OURS):
        if (value := _truth(row.peek(key))) is None:
            continue
        if value != _OURS[key]:
            way = "write train = false on earlier answers" if "history" in key else 'set data.loss_on = "all"'
            what = f"{key} is {row.peek(key)!r}: all answers of a row are trained, and they alone"
            raise RowError(what, f"{way}; to pass over the column: {ignoring(key)}")
        row.take(key)
    for key in (*row.among(_SWITCHES), *row.among(_UNCLEAR)):
        value = row.peek(key)
        if isinstance(value, list | tuple) and value:
            raise RowError(f"{key} is a list: it trains some turns of the row and not others", _row_hint(key))
        inverted = key in _TRAINED_IF_FALSE or key in _UNCLEAR
        role, on = role_of(value), _truth(value)
        if role is not None:  # NeMo's mask names who is not trained, axolotl's train_on who is
            on = (role == "assistant") != inverted
        elif on is not None:
            on = on != inverted or key in _UNCLEAR
        if on is False:
            raise RowError(f"{key} is {value!r}: by that the answers of this row are not trained", _row_hint(key))
        if on:
            row.take(key)


def _word(value: Any) -> str:
    """A short value as it is compared; "" for a longer text, which is no mark, and for anything else."""
    if not isinstance(value, str | int | float) or len(str(value)) >= 40:
        return ""
    return plain_word(str(value)).removesuffix(".0")  # a table with empty cells makes floats of them


def _truth(value: Any) -> bool | None:
    """true, false, 0, 1 and their texts; None for anything else."""
    return {"true": True, "1": True, "false": False, "0": False}.get(_word(value))


def _row_hint(key: str) -> str:
    return (
        f"leave such rows out, or say it with train = false on each message; to pass over the column: {ignoring(key)}"
    )
