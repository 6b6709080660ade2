"""A tokenizer in another process does what it does here, or says that it does not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora.data.chat import ChatTokenizer
from qlora.data.light_tokenizer import LightTokenizer, travelling
from qlora.events import Recorder
from tests.data.toys import CASES, FAMILIES, family_tokenizer


def light(family: str) -> tuple[Any, Any]:
    tokenizer = family_tokenizer(family)
    templates = (tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}]))
    state = travelling(tokenizer, templates)
    assert state is not None
    return tokenizer, LightTokenizer(json.loads(json.dumps(state)))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_same_as_with_the_tokenizer_itself(family: str) -> None:
    theirs, ours = (ChatTokenizer(one, "assistant", Recorder()) for one in light(family))
    assert (ours.pad_id, ours.end_token_ids, ours.templates) == (theirs.pad_id, theirs.end_token_ids, theirs.templates)
    for case in CASES:
        rows = [str(chat.encode_many([case.make()])[0]) for chat in (theirs, ours)]
        assert rows[0] == rows[1]


def test_one_that_does_something_beside_its_engine_does_not_travel() -> None:
    tokenizer = family_tokenizer("qwen2")

    class Own(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **keys: Any) -> Any:
            return super()._encode_plus(*args, **keys)

    other = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert travelling(other, ()) is None


def test_an_engine_that_reads_otherwise_there_is_refused() -> None:
    tokenizer = family_tokenizer("qwen2")
    state = travelling(tokenizer, ())
    assert state is not None
    LightTokenizer(state)
    with pytest.raises(ValueError, match="differs"):
        LightTokenizer(state | {"probe": [[1], [[0, 1]], [1]]})
    with pytest.raises(ValueError, match="another one here"):
        LightTokenizer(state | {"engine": "{}"})


def test_places_of_tokens_are_the_engines() -> None:
    tokenizer, ours = light("qwen2")
    texts = ["größer 🌧 it's", "", "a b"]
    places = ours(texts, add_special_tokens=False)["offset_mapping"]
    theirs = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert [list(one) for one in places] == theirs == [[one[at] for at in range(len(one))] for one in places]
    assert places[0][-1] == theirs[0][-1] and places[0][:2] == theirs[0][:2]
