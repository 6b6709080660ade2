"""Tokens and passwords are found by their value and by their form; ordinary words stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora import redaction
from tests.attacks.payloads import SECRETS


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("value", SECRETS.values())
def test_values_of_the_environment_are_hidden_wherever_they_stand(armed: None, value: str) -> None:
    hidden = redaction.redact(f"GET https://user:{value}@host/x?token={value}&a=1 failed for '{value}'")
    assert value not in hidden and redaction.HIDDEN in hidden and "failed for" in hidden


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef0123456789", "abcdef0123456789"),
        ("{'authorization: Basic dXNlcjpwYXNzd29yZA==' }", "dXNlcjpwYXNzd29yZA"),
        ("see hf_SomebodyElsesToken0123456789", "hf_Somebody"),
        ("clone https://me:s3cretpass@git.example/x", "s3cretpass"),
        ("/here/https:/me:s3cretpass@git.example/x: no such folder", "s3cretpass"),
        ("key AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123", "ghp_abc"),
    ],
)
def test_forms_of_secrets_are_hidden(text: str, secret: str) -> None:
    assert secret not in redaction.redact(text)


@pytest.mark.parametrize(
    "text", ["step 5/12 · loss 1.2345", "https://huggingface.co/a/b", "lora.r = 16", "a:b@c", "C:/a:b@c", ""]
)
def test_ordinary_words_stay(armed: None, text: str) -> None:
    assert redaction.redact(text) == text


def test_the_stored_token_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("a-token-without-any-known-form\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "without-any" not in redaction.redact("refused: a-token-without-any-known-form")
