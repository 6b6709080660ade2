"""What must not leave this machine: found in bytes across blocks and in texts, taken out of what we wrote."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from qlora.export.leaks import MAIL, Private, line_of

HOME = "/home/maria-owner"


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Private:
    for name in ("LOGNAME", "USERNAME", "EMAIL", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": HOME, "USER": "maria-owner", "HOSTNAME": "anvil-7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 30)
    monkeypatch.setattr("getpass.getuser", lambda: "maria-owner")
    monkeypatch.setattr("platform.node", lambda: "anvil-7.lan")
    return Private.of_owner(
        [Path("/data/projects/lamps"), Path("/root"), Path("/")], ["m.huber@example.org"], ["hub/x"]
    )


def test_what_is_known_of_the_owner(private: Private) -> None:
    assert {HOME, "/data/projects/lamps", "m.huber@example.org", "hf_" + "q" * 30} <= set(private.needles)
    assert "/root" not in private.needles and "/" not in private.needles  # words of many vocabularies
    assert set(private.words) == {"maria-owner", "anvil-7", "anvil-7.lan"}


def test_a_word_that_is_public_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "qwen")
    monkeypatch.setattr("platform.node", lambda: "localhost")
    for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME"):
        monkeypatch.setenv(name, "Qwen")
    monkeypatch.setenv("HOME", "/home/user")
    assert Private.of_owner([], [], ["owner/support", "Qwen/Qwen3-4B"]).words == ()


CLEANED = [
    (f"in {HOME}/rows.jsonl and {HOME}.", "in rows.jsonl and …."),
    ("/mnt/a/b/c.jsonl, ~/x/y, ~maria/z/q", "c.jsonl, y, q"),
    ("C:\\Users\\maria\\x.txt and D:/a/b", "x.txt and b"),
    ("file:///srv/models/llama", "file://llama"),
    ("a.b+c@mail.example.com wrote", "… wrote"),
    ("maria-owner on Anvil-7, not Anvil-77", "… on …, not Anvil-77"),
    ("https://huggingface.co/a/b/c?x=/y", "https://huggingface.co/a/b/c?x=/y"),
    (
        "s3://bucket/key/x, and/or, 1/2/3, </tool_call>, </a/b>",
        "s3://bucket/key/x, and/or, 1/2/3, </tool_call>, </a/b>",
    ),
    ("FROM ./x.gguf, ../y/z, /bye, a: b/c, 3/4", "FROM ./x.gguf, ../y/z, /bye, a: b/c, 3/4"),
    ("| `/a/b` | (/c/d) |", "| `b` | (d) |"),
    ("hf_" + "q" * 30, "[hidden]"),
]


@pytest.mark.parametrize(("text", "clean"), CLEANED)
def test_a_text_of_ours_is_cleaned(private: Private, text: str, clean: str) -> None:
    assert private.clean(text) == clean
    assert private.clean(clean) == clean


def test_values_are_cleaned_and_paths_lose_their_folders(private: Private) -> None:
    value = {"base": "/srv/my models/llama 3/", f"{HOME}/k": [f"{HOME}/x y/z", 1, None, True], "hub": "owner/base"}
    assert private.clean_values(value) == {"base": "llama 3", "k": ["z", 1, None, True], "hub": "owner/base"}
    assert private.clean_values({"text": "no / path", "root": "/", "one": "/bye"}) == {
        "text": "no / path", "root": "/", "one": "/bye",
    }  # fmt: skip


@pytest.mark.parametrize("cut", [1, 3, 7, 64, 1000])
def test_bytes_are_searched_across_blocks(private: Private, cut: int) -> None:
    data = bytes(range(256)) * 3 + HOME.encode() + bytes(100)
    blocks = [data[at : at + cut] for at in range(0, len(data), cut)]
    sha256, size, found = private.scan(blocks)
    assert (sha256, size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert found is not None and (found.what, found.at) == ("a folder of this machine", 768)
    clean = data.replace(HOME.encode(), b"/home/maria-owne")
    assert private.scan(clean[at : at + cut] for at in range(0, len(clean), cut))[2] is None


def test_a_needle_is_found_as_json_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERPROFILE", "C:\\Users\\jörg")
    monkeypatch.setattr("qlora.export.leaks.PurePath", __import__("pathlib").PureWindowsPath)
    private = Private.of_owner([], [], [])
    for text in ("C:\\Users\\jörg", json.dumps("C:\\Users\\jörg"), json.dumps("C:\\Users\\jörg", ensure_ascii=False)):
        assert private.scan([text.encode()])[2] is not None, text
    assert private.scan([b"C:/Users/j\xc3\xb6rg/x"])[2] is not None


SPELLED = [
    quote(HOME, "").encode(),
    quote(HOME, "").lower().encode(),
    HOME.replace("/", "\\/").encode(),
    HOME.encode("utf-16-le"),
    f"x{HOME}".encode("utf-16-be"),
    b"https://x.example/?key=" + b"hf_" + b"q" * 30,
    b"m.huber%40example.org",
    "m.huber@example.org".encode("utf-16"),
]


@pytest.mark.parametrize("text", SPELLED)
def test_a_needle_is_found_in_other_spellings(private: Private, text: bytes) -> None:
    assert private.scan([b"in front of it ", text[:9], text[9:], b" and behind"])[2] is not None


def test_a_folder_with_blanks_and_letters_is_found_in_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/jörg the owner")
    private = Private.of_owner([], [], [])
    for text in (b"file:///home/j%C3%B6rg%20the%20owner/x", b"file:///home/j%c3%b6rg%20the%20owner/x"):
        assert private.scan([text])[2] is not None


def test_texts_of_others(private: Private) -> None:
    hit = private.in_text(f"a\nb {HOME}/x")
    assert hit is not None and (hit.what, line_of(f"a\nb {HOME}/x", hit.at)) == ("a folder of this machine", 2)
    assert private.in_text("see /home/other/x") and private.in_text("C:\\\\Users\\\\other\\\\x")
    assert private.in_text("see /home/other/x", homes_too=False) is None
    assert private.in_text("a@b.example") is None and private.in_text("a@b.example", mails_too=True)
    hidden = private.in_text("key sk-abcdefghijklmnopqrstuvwx")
    assert hidden is not None and "token" in hidden.what and hidden.at == 4
    assert private.in_text("{% if /home/ %} user@ @x") is None


def test_what_is_a_mail_address() -> None:
    assert all(MAIL.search(text) for text in ("a@b.de", "<x.y+z@sub.example.museum>", "mailto:a_b@c-d.org."))
    assert not any(MAIL.search(text) for text in ("@user", "a@b", "x@1.2", "pkg@1.2.3", "a @ b.de", "<|im@start|>"))


def test_gits_address_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dotfiles").write_text("[user]\n\temail = maria@git.example.net\n")
    (tmp_path / ".gitconfig").symlink_to(tmp_path / "dotfiles")
    (tmp_path / ".config" / "git").mkdir(parents=True)
    (tmp_path / ".config" / "git" / "config").write_text('[user]\nEmail="second@git.example.net"')
    assert {"maria@git.example.net", "second@git.example.net"} <= set(Private.of_owner([], [], []).needles)
