"""Streams of any kind and homes that are missing: a command ends as it would have, its results on the disk."""

from __future__ import annotations

import io
import os
import pwd
import stat
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

from qlora import files
from qlora.cli import surroundings
from qlora.errors import UserError
from tests.attacks.terminals import command, foreign_controls, under_terminal, with_streams
from tests.runs import run_dir, write_recipe
from tests.sampling import sampled

FULL = "/dev/full"
CLOSED: dict[str, dict[int, str | None]] = {
    ">&-": {1: None},
    "2>&-": {2: None},
    "<&-": {0: None},
    "all closed": {0: None, 1: None, 2: None},
    ">/dev/full": {1: FULL},
    "2>/dev/full": {2: FULL},
    "both full": {1: FULL, 2: FULL},
    "one closed, one full": {0: None, 1: None, 2: FULL},
}
NOWHERE = ("QLORA_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "HF_TOKEN_PATH")
SHORT = [
    word
    for setting in (
        *("train.max_steps=1", "train.batch_size=2", "data.max_length=96", "data.eval_fraction=0.2", "eval.samples=0"),
        *("lora.r=4", 'quantization.type="none"', "train.micro_batch_size=1", "train.gradient_checkpointing=false"),
    )
    for word in ("--set", setting)
]


def streams(folder: Path, changes: dict[int, str | None]) -> dict[int, str | None]:
    return {0: os.devnull, 1: str(folder / "out"), 2: str(folder / "err"), **changes}


def said(folder: Path) -> list[str]:
    return (folder / "err").read_text().splitlines() if (folder / "err").exists() else []


@pytest.mark.parametrize("name", CLOSED)
def test_an_answer_that_is_lost_is_an_error_and_nothing_else_changes_a_code(tmp_path: Path, name: str) -> None:
    lost = code_of_a_lost_answer(name)
    for arguments, code in (
        (["--schema"], lost),
        (["--keys"], lost),
        (["--help"], lost),
        (["none.toml"], 2),
        (["--nonsense"], 2),
    ):
        (tmp_path / "err").unlink(missing_ok=True)
        assert with_streams(command("train", *arguments), streams(tmp_path, CLOSED[name])) == code, arguments
        if 2 not in CLOSED[name]:
            lines = said(tmp_path)
            assert [line[:7] for line in lines] == (["error: ", " " * 7] if code else []), lines
            if arguments[0] in ("--schema", "--keys", "--help"):
                assert not lost or f"standard output: {'No space left' if lost == 4 else 'there is none'}" in lines[0]


def code_of_a_lost_answer(name: str) -> int:
    """4 where the disk is full, 2 where there is no output."""
    return {FULL: 4, None: 2}.get(CLOSED[name].get(1, ""), 0)


def whole_commands(tmp_path: Path, llama: Path, name: str) -> None:
    recipe, given = write_recipe(tmp_path, llama), streams(tmp_path, CLOSED[name])
    assert with_streams(command("train", str(recipe), *SHORT), given) == 0
    run = run_dir(recipe)
    assert {"adapter", "checkpoints", "events.jsonl", "recipe.toml"} <= {path.name for path in run.iterdir()}
    lost = code_of_a_lost_answer(name)
    export = ["export", str(run), "--no-verify", "--to"]
    assert with_streams(command(*export, "adapter-gguf"), given) == 0
    assert with_streams(command(*export, "hf", "--json"), given) == lost
    assert all((run / "export" / product / "manifest.json").is_file() for product in ("adapter-gguf", "hf"))
    assert with_streams(command("estimate", str(recipe)), given) == lost
    assert with_streams(command("train", str(recipe)), given) == 2
    # What was opened while a stream was closed has not got its number: nothing was printed into it.
    events = (run / "events.jsonl").read_text().splitlines()
    assert all(line.startswith('{"event"') for line in events)


def test_whole_commands_with_all_streams_closed(tmp_path: Path, llama: Path) -> None:
    whole_commands(tmp_path, llama, "all closed")


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled([*CLOSED], ">&-", "2>/dev/full", "one closed, one full"))
def test_whole_commands_with_streams_of_any_kind(tmp_path: Path, llama: Path, name: str) -> None:
    whole_commands(tmp_path, llama, name)


def test_a_reader_that_has_left_is_141(tmp_path: Path) -> None:
    def leave() -> None:
        theirs, ours = os.pipe()
        os.dup2(ours, 1)
        os.close(theirs)
        os.close(ours)

    given = streams(tmp_path, {})
    assert with_streams(command("train", "--schema"), given, before=leave) == 141
    assert said(tmp_path) == []


@pytest.mark.parametrize("encoding", ["ascii", "ascii:surrogateescape", "latin-1", "cp437"])
def test_another_encoding_shows_what_it_can(tmp_path: Path, encoding: str) -> None:
    name = "ä│\udc9b31m\x9b.toml"
    given = streams(tmp_path, {})
    settings = {"PYTHONIOENCODING": encoding}
    assert with_streams(command("train", name), given, settings) == 2
    assert with_streams(command("train", "--keys"), given, settings) == 0
    data = (tmp_path / "err").read_bytes()
    assert b"\\x9b31m" in data and b"\x9b" not in data and data.count(b"\n") == 2
    (tmp_path / "out").unlink()

    def work() -> None:
        surroundings.prepare()
        print("│Ѐ\udc9b.")

    assert with_streams(work, given, settings) == 0
    written = (tmp_path / "out").read_bytes()
    assert written.endswith(b".\n") and b"\x9b" not in written and b"?" in written


def test_a_terminal_that_goes_away_ends_no_command(tmp_path: Path) -> None:
    """Both ends of a pseudo-terminal, of which ours is closed at once: writing to the other one is an error."""

    def hang_up() -> None:
        ours, theirs = os.openpty()
        for handle in (0, 1, 2):
            os.dup2(theirs, handle)
        os.close(ours)

    given = streams(tmp_path, {})
    assert with_streams(command("train", "none.toml"), given, before=hang_up) == 2
    assert with_streams(command("train", "--nonsense"), given, before=hang_up) == 2


def test_without_any_streams_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a Windows process without a console."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    surroundings.prepare()
    print("to nobody")
    print("to nobody", file=sys.stderr)
    assert sys.stdin.read() == ""
    assert isinstance(sys.stderr, surroundings.PlainErrors) and not sys.stderr.isatty()
    surroundings.prepare()
    assert not isinstance(sys.stderr.inner, surroundings.PlainErrors)


def test_what_libraries_write_to_stderr_steers_nothing() -> None:
    def work() -> None:
        import logging

        surroundings.prepare()
        text = "of a stranger: \x1b]0;owned\x07\x9b31m\rx"
        sys.stderr.write(warnings.formatwarning(text, UserWarning, "x.py", 1))  # pytest catches those that are raised
        logging.getLogger("somebody").addHandler(logging.StreamHandler())
        logging.getLogger("somebody").warning("of a stranger: \x1b[2J\u202e")
        surroundings.write_errors(sys.stderr, "\x1b[1mours\x1b[0m\n")

    code, output = under_terminal(work)
    assert code == 0 and foreign_controls(output) == []
    assert "␛]0;owned␇\\x9b31m␍".encode() in output and "␛[2J\\u202e".encode() in output
    assert b"\x1b[1mours\x1b[0m" in output


def test_errors_that_cannot_be_written_are_no_errors() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    def work() -> None:
        sys.stderr = surroundings.PlainErrors(Full())
        print("lost", file=sys.stderr)
        sys.stderr.flush()

    assert under_terminal(work) == (0, b"")


def without_a_name() -> None:
    """A container's user: an id that no file gives a name or a home."""

    def unknown(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    pwd.getpwuid = unknown  # type: ignore[assignment]


@pytest.mark.parametrize("home", [None, "/proc/nobody"])
def test_a_user_without_a_home_or_with_one_that_cannot_be_written_can_work(
    tmp_path: Path, llama: Path, home: str | None
) -> None:
    recipe, given = write_recipe(tmp_path, llama), streams(tmp_path, {})
    settings = {**dict.fromkeys(NOWHERE), "HOME": home, "TMPDIR": str(tmp_path)}
    tempfile.tempdir = None
    assert with_streams(command("train", str(recipe), "--check", *SHORT), given, settings, without_a_name) == 0
    assert said(tmp_path) == [] and not list(tmp_path.glob("~*"))


def test_the_home_of_our_making_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(surroundings, "_has_home", lambda: False)

    def prepared() -> Path:
        for name in ("QLORA_CACHE", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        surroundings.prepare()
        assert Path(os.environ["HF_HOME"]).parent == Path(os.environ["QLORA_CACHE"]).parent
        return Path(os.environ["QLORA_CACHE"]).parent

    home = prepared()
    assert home.parent == tmp_path and stat.S_IMODE(home.stat().st_mode) == 0o700 and prepared() == home
    home.chmod(0o777)
    assert prepared() != home  # others could have put something there
    home.chmod(0o700)
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    assert prepared() not in (home, tmp_path / "elsewhere")
    monkeypatch.setenv("QLORA_CACHE", "/chosen")
    surroundings.prepare()
    assert os.environ["QLORA_CACHE"] == "/chosen"


@pytest.mark.parametrize("name", ["QLORA_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH"])
def test_a_variable_that_names_no_place_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "~no-such-user/cache")
    with pytest.raises(UserError, match=f"^{name}: ~no-such-user/cache: there is no such home"):
        surroundings.prepare()
    monkeypatch.setenv(name, "~/cache")
    surroundings.prepare()
    assert os.environ[name] == str(files.user_path("~/cache"))


@pytest.mark.parametrize("path", ["~no-such-user/x", "a\0b", "a\udcff", "~no-such-user/x.toml", "a\udcff.toml"])
def test_a_path_that_cannot_be_one_is_two_lines(tmp_path: Path, path: str) -> None:
    for arguments in (("train", path), ("export", path), ("estimate", path)):
        (tmp_path / "err").unlink(missing_ok=True)
        assert with_streams(command(*arguments), streams(tmp_path, {})) == 2, arguments
        lines = said(tmp_path)
        assert len(lines) == 2 and "internal" not in lines[0], lines


@pytest.mark.parametrize(
    ("value", "kept"), [("80", True), ("²", False), ("", False), ("-1", False), ("100000000", False)]
)
def test_a_size_of_the_terminal_that_is_none_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, value: str, kept: bool
) -> None:
    """rich takes a digit of any script for one, and then fails; a width of any size is a line of any size."""
    monkeypatch.setenv("COLUMNS", value)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    surroundings.prepare()
    assert ("COLUMNS" in os.environ) == kept


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_becomes_what_is_nearest(tmp_path: Path, encoding: str) -> None:
    """One letter for one, so that columns stay where they are; nothing fails and nothing is left out."""

    def work() -> None:
        sys.stdout = io.TextIOWrapper((tmp_path / "out").open("wb"), encoding=encoding)
        surroundings.prepare()
        print("█─│…→ é² 日 \udcff|")
        sys.stdout.flush()

    assert under_terminal(work) == (0, b"")
    wanted = {"ascii": "#-|~> e2 ? ?|", "latin-1": "#-|~> é² ? ?|", "cp1252": "#-|…> é² ? ?|"}
    assert (tmp_path / "out").read_bytes() == f"{wanted[encoding]}\n".encode(encoding)
