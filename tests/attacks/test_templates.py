"""Chat templates from strangers: they escape nowhere, stop within 2 s and 8 MiB, and end neither us nor the machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qlora.data import render, render_worker
from qlora.data.chat import ChatTokenizer
from qlora.data.render import Renderer, request_of
from qlora.data.row_json import RowError
from qlora.errors import TokenizerError
from qlora.events import Recorder
from tests.attacks.payloads import shell
from tests.data.toys import FAMILIES, toy_tokenizer

ESCAPES = (
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('CMD') }}",
    "{{ lipsum.__globals__['os'].popen('CMD').read() }}",
    "{{ joiner.__init__.__globals__.os.system('CMD') }}",
    "{{ namespace.__init__.__globals__['os'].system('CMD') }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('CMD') }}",
    "{{ self._TemplateReference__context.environment.from_string('{{ 1 }}') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['os'].system('CMD') }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ dict.mro() }}",
    "{{ '%s'.format.__self__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.' ~ '__class__}').format_map({'0': ''}) }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('CMD') }}",
    "{% extends '/etc/passwd' %}",
    "{{ request.application.__globals__ }}",
    "{{ config.items() }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ __import__('os').system('CMD') }}",
    "{{ (raise_exception | attr('__func__')).__code__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ (messages|groupby('role')).__class__ }}",
    "{{ ''.join.__self__.__class__ }}",
)
BOMBS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{{ 9**9**9**9 }}",
    "{{ (9**300) ** 300 }}",
    "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'|indent(10**10, true) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%0999999999d' | format(1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    "{{ range(99999)|list|map('string')|join('x' * 9999) }}",
    "{{ lipsum(n=99999) }}",
    "{{ messages[0]['content']|wordwrap(1)|urlize|replace('', 'y' * 999999) }}",
)
ROW = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "It."}]


def asked(template: str) -> str:
    renderer = Renderer([template], {})
    return renderer.render(request_of(0, {"messages": ROW, "tools": None, "add_generation_prompt": False})).text


@pytest.mark.parametrize("template", ESCAPES)
def test_nothing_gets_out(tmp_path: Path, template: str) -> None:
    """An escape is an error, or renders to words about nothing: no class, no code, no file, no command."""
    marker = tmp_path / "marker"
    try:
        text = asked(template.replace("CMD", shell(marker)))
    except RowError as error:
        assert error.reason.startswith("the chat template ")
    else:
        assert "<class" not in text and "root:" not in text and "built-in" not in text, text
    assert not marker.exists()


@pytest.mark.parametrize("template", BOMBS)
def test_bombs_are_stopped(template: str) -> None:
    started = time.monotonic()
    try:
        text = asked(template)
    except RowError as error:
        assert error.reason.startswith("the chat template ")
    else:
        assert len(text.encode()) <= render_worker.OUTPUT_BYTES
    assert time.monotonic() - started < render_worker.SECONDS + 3


def test_a_template_that_takes_too_long_is_told_so() -> None:
    with pytest.raises(RowError, match="was stopped: it took more than 2 seconds"):
        asked(BOMBS[0])


def test_a_template_that_writes_too_much_is_told_so() -> None:
    """Ten million letters in small pieces, then seven million, which is much and allowed."""
    with pytest.raises(RowError, match="was stopped: it writes more than 8 MiB"):
        asked("{% for i in range(9999) %}{{ 'x' * 1000 }}{% endfor %}")
    assert len(asked("{% for i in range(7000) %}{{ 'x' * 1000 }}{% endfor %}")) == 7_000_000


def test_the_next_row_gets_a_new_process_and_three_offences_end_it() -> None:
    """One row of a batch is a bomb: the others are rendered, and the row alone is an error."""
    template = "{% if 'bomb' in messages[0].content %}{{ 'a' * 10**9 }}{% endif %}{{ messages[0].content }}"
    renderer = Renderer([template], {})
    requests = [
        request_of(0, {"messages": [{"role": "user", "content": text}]})
        for text in ("one", "bomb 1", "two", "bomb 2", "three", "bomb 3")
    ]
    renderer.ask_ahead(requests)
    assert renderer.render(requests[0]).text == "one"
    for number, request in enumerate(requests[1:], start=1):
        if number < 5:
            if number % 2:
                with pytest.raises(RowError, match="more than 8 MiB"):
                    renderer.render(request)
            else:
                assert renderer.render(request).text in ("two", "three")
    with pytest.raises(TokenizerError, match="was stopped 3 times") as given_up:
        renderer.render(requests[5])
    assert "original publisher" in given_up.value.hint


def test_a_bomb_in_a_base_is_two_lines() -> None:
    with pytest.raises(TokenizerError, match=r"chat template fails: .* was stopped: it repeats") as refused:
        ChatTokenizer(toy_tokenizer(FAMILIES["qwen2"], "{{ 'a' * 10**9 }}"), "assistant", Recorder())
    assert refused.value.hint


def test_a_template_of_megabytes_is_no_template() -> None:
    with pytest.raises(TokenizerError, match="a million characters"):
        ChatTokenizer(toy_tokenizer(FAMILIES["qwen2"], "x" * (1 << 20) + "y"), "assistant", Recorder())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits")
def test_the_process_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret in its environment, no file to open, no process to start, a bound on memory."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    worker = render._Worker()
    pid = worker._process.pid
    environment = Path(f"/proc/{pid}/environ")
    if not environment.exists():
        pytest.skip("needs /proc")
    assert b"hf_" not in environment.read_bytes() and b"0123456789abcdef" not in environment.read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max open files            3 " in limits and "Max file size             0 " in limits
    assert "Max processes             0 " in limits
    assert f"Max address space         {render_worker.MEMORY_BYTES} " in limits
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "torch" not in maps
    worker.end()
    assert not Path(f"/proc/{pid}").exists()
