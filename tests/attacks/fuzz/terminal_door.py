"""What a terminal, a shell and an environment hand to a command, and strangers' words on their way to the screen."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
import typing
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from random import Random
from types import UnionType
from typing import Any
from unittest import mock

from qlora import events
from tests.attacks.fuzz import nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Command, Work, control_characters, exit_code
from tests.report.cases import FIGURES

VARIABLES: dict[str, tuple[str | None, ...]] = {
    "COLUMNS": ("0", "-1", "1", "9", "abc", "100000000", "", "²"),
    "LINES": ("0", "-5", "x"),
    "TERM": ("dumb", "", "xterm-256color", "\x1b[2J", "unknown", None),
    "LANG": ("C", "POSIX", "tr_TR.UTF-8", "xx", "", None),
    "HOME": (None, "", "/nowhere", "~no-such-user", "/dev/null", "relative", "/root/\udcff"),
    "QLORA_CACHE": (
        None,
        "",
        "~no-such-user/x",
        "~",
        "/dev/null",
        "/dev/full/x",
        "/proc/1/x",
        "relative",
        "a/../b",
        "/dev/null/x",
    ),
    "XDG_CACHE_HOME": ("~no-such-user", "", "/dev/null", "relative"),
    "HF_HOME": ("~no-such-user", "/dev/null", "", "/dev/zero"),
    "HF_TOKEN": ("", "\x1b[2J_a_token_of_ours", "x" * 100_000, "\udcff" * 10),
    "HF_TOKEN_PATH": ("/dev/zero", "PIPE", "~no-such-user/token", "/etc/shadow", ""),
    "HF_HUB_OFFLINE": ("1", "yes", "²"),
    "NO_COLOR": ("", "1"),
    "FORCE_COLOR": ("1", ""),
    "TTY_COMPATIBLE": ("1", "x"),
    "PYTHONIOENCODING": ("ascii", "xx"),
    "CUDA_VISIBLE_DEVICES": ("", "-1", "abc"),
    "OMP_NUM_THREADS": ("0", "abc", "-1"),
}
ARGUMENTS = (
    *(
        "--help",
        "--schema",
        "--keys",
        "--check",
        "--resume",
        "--fresh",
        "--verify-resume",
        "--json",
        "--fit",
        "--version",
    ),
    *("--set", "lora.r=8", "--set=x", "--vram", "12GiB", "--vram=", "--gpu", "RTX 4090", "--stack", "plain", "--quant"),
    *("q4_k_m", "--to", "gguf", "--to=hf", "--out", "--max-kl", "nan", "-1", "1e999", "--base", "nf4", "--dtype", "--"),
    *("--plot", "BASE", "RECIPE", "RUN", "--vram=1e400GiB", "--vram=" + "9" * 5000, "--vram=nan", "--gpu=\x1b[2J"),
)
# What is drawn by us on a terminal: colours and styles, lines that are drawn anew, the cursor that hides meanwhile.
OURS = re.compile(r"\x1b\[(?!38;5;199m)[0-9;]*m|\x1b\[[0-9]*[AK]|\x1b\[2K|\x1b\[\?25[lh]|\r")
STREAMS = ("none", "closed", "full", "ascii", "nobody", "terminal", "fine")


def make(scene: Scene) -> Work:
    kind = scene.chance.random()
    if kind < 0.45:
        return drawn_events(scene)
    if kind < 0.7:
        return command(scene)
    return refusal(scene)


class Screen(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        return True


class Terminal(io.TextIOWrapper):
    """The same, as bytes."""

    def isatty(self) -> bool:
        return True


# --- words of strangers, drawn by every sink -------------------------------------------------------------------------


def drawn_events(scene: Scene) -> Work:
    chance = scene.chance
    kinds = [kind for kind in events.Event.__subclasses__() if kind.kind]
    made = [event(chance.choice(kinds), chance, scene.goods.drawn) for _ in range(3)]
    variables = {"COLUMNS": chance.choice(("1", "2", "20", "80", "300", "100000")), "TERM": "xterm-256color"}
    file = Screen() if chance.random() < 0.6 else io.StringIO()

    def work() -> None:
        from qlora.report.console import ConsoleSink
        from qlora.report.files import JsonLines

        with redirect_stdout(file), mock.patch.dict(os.environ, variables):
            sink = events.Sinks(ConsoleSink(), JsonLines(scene.place / "events.jsonl"))
            for item in made:
                sink.emit(item)
            sink.close()
        shown = OURS.sub("", file.getvalue())
        if found := control_characters(shown):
            raise AssertionError(f"on the screen: {sorted(map(hex, map(ord, found)))} of {made}"[:1500])

    return work


def event(kind: type[events.Event], chance: Random, drawn: list[Any]) -> events.Event:
    """An event whose texts are strangers' and whose numbers are what they are declared to be."""
    hints = typing.get_type_hints(kind)
    values = {field.name: of_type(hints[field.name], chance, field.name) for field in dataclasses.fields(kind)}
    return kind(**values)


def of_type(hint: Any, chance: Random, name: str) -> Any:
    text = chance.choice([word for word in nasty.TEXTS if len(word) < 1000])
    options = typing.get_args(hint)
    if type(None) in options:
        return None if chance.random() < 0.3 else of_type(options[0], chance, name)
    if isinstance(hint, UnionType):
        return of_type(chance.choice(options), chance, name)
    if hint is str:
        return text if name not in ("task",) or chance.random() < 0.5 else "load"
    if hint is bool:
        return chance.random() < 0.5
    if hint is int:
        return chance.choice((0, 1, 2, 100, 10**6, 10**12))
    if hint is float:
        may_be_wild = any(word in name for word in ("loss", "norm", "perplexity", "kl"))
        return chance.choice((0.0, 0.5, 1e-12, 3.0, 1e9, *((float("nan"), float("inf")) if may_be_wild else ())))
    if name == "entries":
        numbers = {"kl": 0.1, "perplexity": 2.0, "top1": 0.5, "bytes": 100}
        return ({"name": text, "measured_by": text, **numbers},)
    if name == "examples":
        return (text, "rows.jsonl:1")
    if name == "figures":  # of an exam: its own numbers, with words of documents and of older versions
        return {**FIGURES, "dropped": {text: 3}, "advice": [text]}
    if name == "versions":
        return {text: text}
    if name == "rewards":
        return {text: 0.5}
    return {} if name == "phases" else None


# --- errors on streams that are not what they should be --------------------------------------------------------------


def refusal(scene: Scene) -> Work:
    chance = scene.chance
    words = [chance.choice(nasty.TEXTS) for _ in range(4)]
    # A command that begins without streams opens others; in its middle there are some.
    kind, stream, error_stream = chance.randrange(4), chance.choice(STREAMS[1:]), chance.choice(STREAMS[1:])
    variables = environment(chance, scene)

    def work() -> int:
        from qlora.cli import common
        from qlora.errors import Problem, RecipeError, UserError

        def refused() -> None:
            print(ascii(words[0]))
            if kind == 0:
                raise RecipeError([Problem(words[0], words[1], words[2])] * 2)
            if kind == 1:
                raise UserError(*words[:2])
            if kind == 2:
                raise OSError(chance.choice((2, 13, 28, 5, 24)), words[0], words[1])

        return on_streams(lambda: common.run(refused), stream, error_stream, variables)

    return Command(work)


def on_streams(work: Callable[[], None], out: str, err: str, variables: dict[str, str | None]) -> int:
    """The exit code of the work with these streams and variables."""
    kept, made = {**os.environ}, {"out": opened(out), "err": opened(err)}
    code = 0
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        with redirect_stdout(made["out"]), redirect_stderr(made["err"]):
            work()
    except SystemExit as ended:
        code = exit_code(ended)
    finally:
        os.environ.clear()
        os.environ.update(kept)
    written = made["err"].buffer.getvalue() if err in ("ascii", "fine") and made["err"] is not None else b""
    if found := control_characters(written.decode("utf-8", "replace")):
        raise AssertionError(f"control characters: {sorted(map(hex, map(ord, found)))}")
    return code


def opened(kind: str) -> Any:
    if kind == "none":
        return None
    if kind == "full":
        return os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    if kind == "closed":  # by whoever started us, as daemons do: the system refuses what is written
        return os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")
    if kind == "nobody":
        reading, writing = os.pipe()
        os.close(reading)
        return os.fdopen(writing, "w", encoding="utf-8")
    if kind == "terminal":
        return Terminal(io.BytesIO(), encoding="utf-8")
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii" if kind == "ascii" else "utf-8")


def environment(chance: Random, scene: Scene) -> dict[str, str | None]:
    """Up to three variables as a strange machine has them."""
    names = chance.sample(sorted(VARIABLES), chance.randrange(4))
    chosen = {name: chance.choice(VARIABLES[name]) for name in names}
    found = {name: str(scene.pipe()) if value == "PIPE" else value for name, value in chosen.items()}
    for name in ("HOME", "QLORA_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        if name in found and not (found[name] and scene.spares(str(found[name]))):
            found[name] = str(scene.place / "relative" / "..")  # as good as any place, and nobody's
    return found


# --- whole commands --------------------------------------------------------------------------------------------------


def command(scene: Scene) -> Work:
    chance = scene.chance
    name = chance.choice(("train", "export", "estimate"))
    places = {"BASE": str(scene.goods.base), "RECIPE": str(scene.goods.recipe), "RUN": str(scene.place / "no-run")}
    words = [chance.choice(ARGUMENTS if chance.random() < 0.7 else nasty.TEXTS) for _ in range(chance.randrange(5))]
    words = [places.get(word, word).replace("\0", "") for word in words]
    if name == "train" and not {"--check", "--schema", "--keys", "--help"} & set(words):
        words.append("--check")
    variables, stream, error_stream = environment(chance, scene), chance.choice(STREAMS), chance.choice(STREAMS)

    def work() -> int:
        import importlib

        app = importlib.import_module(f"qlora.cli.{name}").app
        with mock.patch.object(sys, "argv", [f"qlora-{name}", *words]):
            return on_streams(app, stream, error_stream, variables)

    return Command(work)


DOOR = Door("terminal", make)
