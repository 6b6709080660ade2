"""The process that runs one reward: a user's Python function, or a JSON schema. Run by its path, by `child.py` alone.

A function is a user's own code, named on the command line; it runs here so that what hangs, ends the process, prints or
eats memory does none of it to a run. It gets the environment of the run, and imports what is installed: not what lies
beside its file, which no sha256 of the run would know. A schema comes from a recipe, so a stranger may have written it:
its patterns go through an engine without backtracking, nothing is fetched for it, and its process is confined.

In: one line that says what to run, then one JSON array [prompts, completions, rows] a line. Out: one JSON object a
line, `scores` or `error`. What is printed goes to stderr, which the parent reads.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import queue
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

OWN = ("prompts", "completions", "rows")  # what every function may ask for; other names are columns
MEMORY_BYTES = 1 << 30  # of a schema's process
NOT_INSTALLED = "needs jsonschema-rs, which is not installed"
MAX_REGEX_BYTES = 1 << 20  # of a compiled pattern, and of the states that it has met

Judge = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Any]


class Told(Exception):
    """What is wrong with a reward, in half a sentence."""


def main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    asked, out = _own_pipes()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked, requests), daemon=True).start()
    judge: Judge | None = None
    file = ""
    from qlora.errors import foreign_failures

    while line := requests.get():
        answer: dict[str, Any] = {}
        try:
            with foreign_failures(memory_too=True) as failure:
                if judge is None:
                    what = json.loads(line)
                    file = what.get("file", "")
                    judge, answer = _opened(what), {"ready": True}
                else:
                    prompts, completions, rows = json.loads(line)
                    answer = {"scores": numbers(judge(prompts, completions, rows), len(completions))}
        except SystemExit as error:
            answer = {"error": f"ended its process (SystemExit: {error.code})"}
        if failure.error is not None:  # whatever a user's function raises is told
            answer = {"error": str(failure.error) if isinstance(failure.error, Told) else raised(failure.error, file)}
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()


def _own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Our requests and replies; a function that reads finds nothing, and what it prints goes to stderr."""
    asked, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return asked, out


def _read(asked: IO[bytes], requests: queue.SimpleQueue[bytes]) -> None:
    """Lines as they come; when the parent has gone, this process ends, whatever its function is doing."""
    for line in asked:
        requests.put(line)
    os._exit(0)


def _opened(what: Mapping[str, Any]) -> Judge:
    return _schema(what["schema"]) if "schema" in what else _function(what["file"], what["source"], what["function"])


def _function(file: str, source: str, name: str) -> Judge:
    """A user's function, of the text that the run's sha256 is of."""
    module = types.ModuleType("rewards")
    module.__file__ = file
    sys.modules["rewards"] = module  # dataclasses and pickle look their module up
    exec(compile(source, file, "exec"), module.__dict__)
    function = getattr(module, name, None)
    if function is None:
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise Told(f"has no function {name!r} (it has: {', '.join(there[:10]) or 'none'})")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise Told(f"{name!r} is no plain function")
    try:
        wanted = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise Told(f"{name!r} does not say what it takes") from None

    def judge(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Any:
        given = dict(zip(OWN, (prompts, completions, rows), strict=True))
        return function(**arguments(list(wanted), given, rows))

    return judge


def arguments(
    wanted: Sequence[inspect.Parameter], given: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a function is called with: of `prompts`, `completions` and `rows` what it names, and columns of the rows as
    lists, under their names; all of them where it takes **kwargs, as functions for TRL do. Raises Told."""
    passed: dict[str, Any] = {}
    columns = dict.fromkeys(key for row in rows for key in row)
    for one in wanted:
        if one.kind is one.VAR_KEYWORD:
            passed |= {key: value for key, value in given.items() if key not in passed}
            passed |= {key: [row.get(key) for row in rows] for key in columns if key not in passed}
        elif one.kind is one.POSITIONAL_ONLY:
            raise Told(f"takes {one.name!r} by its place alone: name it (prompts, completions, rows or a column)")
        elif one.kind is not one.VAR_POSITIONAL and one.name in given:
            passed[one.name] = given[one.name]
        elif one.kind is not one.VAR_POSITIONAL and one.name in columns:
            passed[one.name] = [row.get(one.name) for row in rows]
        elif one.kind is not one.VAR_POSITIONAL and one.default is one.empty:
            there = ", ".join((*OWN, *columns))
            raise Told(f"asks for {one.name!r}, which no row has (there are: {there})")
    return passed


def numbers(values: Any, wanted: int) -> list[float]:
    """What a function gave as one finite number for each answer. Raises Told."""
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise Told(f"gave {_kind(values)}, and a list of numbers is wanted, one for each answer")
    found = list(values)
    if len(found) != wanted:
        raise Told(f"gave {len(found)} numbers for {wanted} answers")
    return [_number(value, at) for at, value in enumerate(found)]


def _number(value: Any, at: int) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise Told(f"gave {_kind(value)} for answer {at}, and a number is wanted")
    number = float(value)
    if not math.isfinite(number):
        raise Told(f"gave {number} for answer {at}, and a finite number is wanted")
    return number


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def raised(error: BaseException, file: str) -> str:
    """What a function raised: the class, the message, and the line of the user's file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    message = str(error)
    if isinstance(error, SyntaxError):
        lines, message = [error.lineno], error.msg
    where = next((f" (line {line})" for line in lines[-1:] if line), "")
    beside = isinstance(error, ModuleNotFoundError)
    hint = ": only what is installed is found, not what lies beside the file" if beside else ""
    said = " ".join(message.split())[:300]
    return f"raised {type(error).__name__}{f': {said}' if said else ''}{where}{hint}"


# --- a schema ---------------------------------------------------------------------------------------------------------


def _schema(schema: Any) -> Judge:
    from qlora import child_process
    from qlora.errors import foreign_failures

    try:
        import jsonschema_rs
    except ImportError:
        raise Told(NOT_INSTALLED) from None
    child_process.limit_itself({"AS": MEMORY_BYTES, "FSIZE": 0})
    engine = jsonschema_rs.RegexOptions(size_limit=MAX_REGEX_BYTES, dfa_size_limit=MAX_REGEX_BYTES)
    with foreign_failures(memory_too=True) as failure:
        validator = jsonschema_rs.validator_for(schema, retriever=_refused, pattern_options=engine)
    if failure.error is not None:
        raise Told(f"is no JSON schema: {failure.reason}")

    def judge(_prompts: Sequence[str], completions: Sequence[str], _rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return [float(fits(validator, text)) for text in completions]

    return judge


def _refused(uri: str) -> Any:
    raise ValueError(f"nothing is fetched for a schema, and it refers to {uri[:100]}")


def fits(validator: Any, text: str) -> bool:
    """Whether a text is JSON, strictly, that the schema allows."""
    try:
        return bool(validator.is_valid(json.loads(text, parse_constant=_no_json)))
    except (ValueError, RecursionError):
        return False


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON value")


if __name__ == "__main__":
    main()
