"""The process of a reward: what a function is called with, what it may give, and what is said of anything else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from qlora.rewards.worker import OWN, Told, arguments, numbers, raised

ROWS = [{"answer": "5", "level": 1}, {"answer": "6"}]
GIVEN: dict[str, Any] = dict(zip(OWN, (["p", "q"], ["5", "7"], ROWS), strict=True))


def called(function: Callable[..., Any]) -> dict[str, Any]:
    return arguments(list(inspect.signature(function).parameters.values()), GIVEN, ROWS)


def test_a_function_gets_what_it_names() -> None:
    assert called(lambda completions: 0) == {"completions": ["5", "7"]}
    assert called(lambda rows, prompts: 0) == {"rows": ROWS, "prompts": ["p", "q"]}
    assert called(lambda completions, answer: 0) == {"completions": ["5", "7"], "answer": ["5", "6"]}
    assert called(lambda level, scale=2.0: 0) == {"level": [1, None]}
    everything = called(lambda **kwargs: 0)  # as functions for TRL are written
    assert everything == {**GIVEN, "answer": ["5", "6"], "level": [1, None]}


def test_what_no_row_has_is_told_with_what_there_is() -> None:
    with pytest.raises(Told, match=r"asks for 'answers', which no row has \(there are: prompts, completions, rows, an"):
        called(lambda completions, answers: 0)
    with pytest.raises(Told, match="by its place alone"):
        called(eval("lambda completions, /: 0"))


def test_numbers_are_what_float_takes() -> None:
    class Scalar:
        def __float__(self) -> float:
            return 0.5

    assert numbers([1, True, 0.25, Scalar()], 4) == [1.0, 1.0, 0.25, 0.5]
    assert numbers((1, 2), 2) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "gave None, and a list of numbers"),
        (1.0, "gave a float, and a list of numbers"),
        ("11", "gave a str, and a list of numbers"),
        ({0: 1, 1: 2}, "gave a dict"),
        ([1.0], "gave 1 numbers for 2 answers"),
        ([1.0, None], "gave None for answer 1"),
        ([1.0, "1"], "gave a str for answer 1"),
        ([float("nan"), 1], "gave nan for answer 0"),
        ([0, float("-inf")], "gave -inf for answer 1"),
    ],
)
def test_what_are_no_numbers_is_told(values: Any, said: str) -> None:
    with pytest.raises(Told, match=said):
        numbers(values, 2)


def test_an_exception_is_told_with_the_line_of_the_users_file() -> None:
    source = "def score():\n    x = {}\n    return x['a']\n"
    space: dict[str, Any] = {}
    exec(compile(source, "r.py", "exec"), space)
    with pytest.raises(KeyError) as error:
        space["score"]()
    assert raised(error.value, "r.py") == "raised KeyError: 'a' (line 3)"
    with pytest.raises(SyntaxError) as broken:
        compile("def score(:\n", "r.py", "exec")
    assert raised(broken.value, "r.py").endswith("(line 1)")
    missing = raised(ModuleNotFoundError("No module named 'helpers'"), "r.py")
    assert missing.endswith("only what is installed is found, not what lies beside the file")
