"""What renders chat templates, asked in this process: its answers, its bounds, and what a template may use."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from qlora.data import render_worker
from qlora.data.render_worker import Renderer, TooMuch, check_power, check_product


def answer(template: str, **values: Any) -> dict[str, Any]:
    return Renderer([template], {}).answer(0, values)


def test_marks_are_the_places_of_generation_blocks() -> None:
    template = "<s>{% for m in ms %}{% generation %}{{ m }}.{% endgeneration %}|{% endfor %}"
    found = answer(template, ms=["one", "é"])
    assert found == {"text": "<s>one.|é.|", "marks": [(3, 7), (8, 10)]}
    assert [found["text"][start:end] for start, end in found["marks"]] == ["one.", "é."]


def test_values_of_every_rendering_and_of_one() -> None:
    renderer = Renderer(["{{ bos }}{{ x }}", "{{ x }}{{ bos }}"], {"bos": "<s>", "x": "default"})
    assert renderer.answer(0, {"x": 1})["text"] == "<s>1" and renderer.answer(1, {})["text"] == "default<s>"


@pytest.mark.parametrize(
    ("template", "error"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ 1 / 0 }}", "division by zero")],
)
def test_a_template_that_refuses_is_an_error_in_its_own_words(template: str, error: str) -> None:
    assert answer(template) == {"error": error}


def test_a_template_that_leaves_its_bounds_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_worker, "OUTPUT_BYTES", 100)
    assert answer("{% for i in range(60) %}éé{% endfor %}") == {"bound": "it writes more than 8 MiB"}
    assert answer("{{ 'a' * 101 }}") == {"bound": "it repeats a value into more than 8 MiB"}
    assert answer("{{ 9 ** 9999 }}") == {"bound": "it computes with numbers of more than a thousand digits"}
    assert answer("{{ 'a' * 100 }}")["text"] == "a" * 100


@pytest.mark.parametrize("values", [("ab", 1 << 22), (1 << 22, [1, 2, 3]), (1 << 4000, 1 << 100)])
def test_products_are_bounded_on_either_side(values: tuple[Any, Any]) -> None:
    with pytest.raises(TooMuch):
        check_product(*(value * 3 if isinstance(value, str) else value for value in values))


def test_ordinary_arithmetic_is_allowed() -> None:
    for left, right in ((2, 3), ("ab", 10), (1.5, 2), (0, 1 << 4000), ([], 1 << 60)):
        check_product(left, right)
    for left, right in ((2, 64), (0, 4096), (1.5, 9999), (-2, 3)):
        check_power(left, right)
    for left, right in ((2, 5000), (9**300, 300), (2, -5000)):
        with pytest.raises(TooMuch):
            check_power(left, right)


def test_dict_and_namespace_are_what_templates_expect() -> None:
    assert answer("{{ dict(a=1)['a'] }}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}")["text"] == "12"
    assert answer("{{ {'é': [1, None]} | tojson }}")["text"] == '{"é": [1, null]}'


def test_the_module_loads_nothing_heavy() -> None:
    """It is run by its path for every base: jinja2 alone takes 0.1 s, with transformers it would be 2 s."""
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({render_worker.__file__!r}, run_name='worker')\n"
        "assert not {'torch', 'transformers', 'numpy', 'qlora.data.render'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
