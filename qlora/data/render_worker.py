"""The process that renders chat templates. Run by its path, by `render.py`, and by nobody else.

A template is a program that a stranger wrote. It runs here, in jinja's sandbox, in a process that has no secrets in its
environment, can open no file, start no process, hold no more than MEMORY_BYTES, and ends itself when one rendering
takes too long (so that it stops even when whoever started it is gone). Only jinja2 is imported: starting takes 0.1 s,
against 1.9 s with transformers. What a template sees is the same as in transformers (`render_jinja_template`).

In: one line with {"templates": [...], "values": {...}} (values that every rendering gets), then one JSON array of
requests a line, each [number of the template, values, parts]. A part is null for all messages, or how many of the first
ones a server has when it asks for the next. Out: one JSON object a line for each part, in order. A text that is the
beginning of the last one that was written out is given as its length: prompts are beginnings of the whole.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

SECONDS = 2.0  # of one rendering, by the clock
OUTPUT_BYTES = 8 << 20
# jinja2 and Python take about 60 MiB of address space; the rest is for the template's own values.
MEMORY_BYTES = 1 << 30
POWER_BITS = 4096  # largest result of ** in bits: 9 ** 9 ** 9 would take minutes and gigabytes
FLUSH_SECONDS = 0.05  # a flush a rendering would wake the parent for each: half of the speed
# The day that templates write which ask for today's (gpt-oss): rows must not depend on the day on which they are
# tokenized, or a resumed run could see others. It is Llama 3's own default too.
DAY = datetime(2024, 7, 26)
OPEN_FILES = 3  # stdin, stdout, stderr


class TooMuch(Exception):
    """A template that leaves its bounds. The text says which."""


def build_environment() -> Any:
    """jinja2's sandbox with what transformers gives to chat templates."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Immutable values, and no operator that makes a huge value of two small ones."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_product(left, right) if operator == "*" else check_power(left, right)
            return super().call_binop(context, operator, left, right)

    class NoDunders(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    class PlainDict:
        """`dict(…)` without the class behind it."""

        def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
            return dict(*pairs, **named)

        def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
            return dict.fromkeys(keys, value)

    def namespace(*pairs: Any, **named: Any) -> Any:
        values = dict(*pairs, **named)
        if any(str(name).startswith("_") for name in values):
            raise jinja2.exceptions.SecurityError("a namespace may not hold names that begin with _")
        return NoDunders(values)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(), loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=raise_exception, dict=PlainDict(), namespace=namespace)
    environment.globals["strftime_now"] = DAY.strftime
    return environment


def check_product(left: Any, right: Any) -> None:
    """Raises TooMuch where text or a list times a number would be over the bound of the whole output."""
    for values, times in ((left, right), (right, left)):
        if isinstance(values, str | bytes | list | tuple) and isinstance(times, int):
            if len(values) * times > OUTPUT_BYTES:
                raise TooMuch("it repeats a value into more than 8 MiB")
            return
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > POWER_BITS:
        raise TooMuch("it computes with numbers of more than a thousand digits")


def check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and max(left.bit_length(), 1) * abs(right) > POWER_BITS:
        raise TooMuch("it computes with numbers of more than a thousand digits")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _generation_extension() -> Any:
    """The `{% generation %}` block: its text as it is, with the place of each noted as `environment.mark_in` asks."""
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an attribute of each extension)

        def __init__(self, environment: Any) -> None:
            super().__init__(environment)
            environment.extend(mark_in=self.mark_in)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            text = str(caller())
            start = sum(map(len, self.blocks))
            self.marks.append((start, start + len(text)))
            return text

        def mark_in(self, blocks: list[str]) -> list[tuple[int, int]]:
            """The list that will hold the marks of the rendering whose text is gathered in `blocks`."""
            self.blocks, self.marks = blocks, list[tuple[int, int]]()
            return self.marks

    return Generation


class Renderer:
    """Compiles each of `templates` once and renders requests with it."""

    def __init__(self, templates: Sequence[str], values: Mapping[str, Any]) -> None:
        self.environment = build_environment()
        self.templates = templates
        self.values = values
        self.compiled = lru_cache(8)(self.environment.from_string)

    def answer(self, number: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """{"text", "marks"}, or {"error"} when the template refuses, or {"bound"} when it leaves its bounds."""
        from qlora.errors import foreign_failures

        blocks: list[str] = []
        size = 0
        with foreign_failures(
            memory_too=True
        ) as failure:  # jinja2's errors, and Python's from the template's own operations
            template = self.compiled(self.templates[number])
            marks = self.environment.mark_in(blocks)
            for block in template.generate({**self.values, **values}):
                size += len(block)
                if size > OUTPUT_BYTES:
                    return {"bound": "it writes more than 8 MiB"}
                blocks.append(block)
            text = "".join(blocks)
            if len(text.encode("utf-8", "replace")) > OUTPUT_BYTES:
                return {"bound": "it writes more than 8 MiB"}
            return {"text": text, "marks": marks}
        if isinstance(failure.error, TooMuch):
            return {"bound": str(failure.error)}
        if isinstance(failure.error, MemoryError):
            return {"bound": "it needs more than 1 GiB of memory"}
        return {"error": f"{failure.error or type(failure.error).__name__}"[:2000]}


def _renderings(requests: Sequence[Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, values, parts in requests:
        for part in parts:
            served = {} if part is None else {"messages": values["messages"][:part], "add_generation_prompt": True}
            yield number, {**values, **served}


def confine() -> None:
    """Give up what rendering does not need. Windows has no such limits: there the parent's clock and count are all."""
    from qlora.child_process import limit_itself

    limit_itself({"AS": MEMORY_BYTES, "FSIZE": 0, "NOFILE": OPEN_FILES, "NPROC": 0, "CORE": 0})


def set_alarm(seconds: float) -> None:
    """The system ends the process in so many seconds; 0 calls it off. Windows cannot."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])  # the parent's: jinja2 may lie in a user's own site folder
    # Ctrl-C reaches every process of a terminal; when to end is the parent's business, by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever Python and jinja2 import or open late, they do now; errors too have code of their own.
    late = Renderer(["{{ [1] | tojson }}{{ strftime_now('%d %b %Y') }}{{ '' | trim }}", "{{ 1 / 0 }}", "{{"], {})
    for number in range(3):
        late.answer(number, {})
    confine()
    lines, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(b"ready\n")
    replies.flush()
    renderer = Renderer(**json.loads(lines.readline()))
    for line in lines:
        flushed, last = time.monotonic(), ""
        for number, values in _renderings(json.loads(line)):
            set_alarm(SECONDS + 1)  # a second more than the parent waits
            answer = renderer.answer(number, values)
            if "text" in answer and last.startswith(answer["text"]):
                answer["text"] = len(answer["text"])
            elif "text" in answer:
                last = answer["text"]
            reply = json.dumps(answer).encode()
            set_alarm(0)
            replies.write(reply + b"\n")
            if time.monotonic() - flushed > FLUSH_SECONDS:
                replies.flush()
                flushed = time.monotonic()
        replies.flush()


if __name__ == "__main__":
    main()
