"""What is written and shown of another's values: valid TOML, one line, nothing secret."""

from __future__ import annotations

import tomllib

import pytest

from qlora.importers.draft import as_shown, off, toml
from tests.importers.cases import draft, left


@pytest.mark.parametrize("value", [True, 3, 0.5, 2e-4, 'a "b" \\ c', ["x", 1], {"a b": "c", "d": [True]}, "C:\\x\\u12"])
def test_values_read_back(value: object) -> None:
    assert tomllib.loads(f"x = {toml(value)}")["x"] == value


MORE = ("s3_access_key", "passwd", "ssh_private_key", "AWS-ACCESS-KEY", "key_passphrase", "accessKey")


def test_what_may_be_a_secret_is_not_shown() -> None:
    for key in ("hf_token", "logging.wandb_token", "api_key", "HUB_TOKEN", "client_secret", "password", *MORE):
        assert as_shown(key, "abcdef") == "…"
    assert as_shown("pad_token", "<eos>") == "<eos>" and as_shown("tokens", ["a"]) == "['a']"
    assert as_shown("kwargs", {"token": "abc"}) == "{token}" and as_shown("x", [{"a": 1}]) == "1 tables"
    assert "\n" not in as_shown("x", "a\nb\x1b[0m") and len(as_shown("x", "y" * 999)) < 70


def test_a_switch_that_is_off_is_as_here() -> None:
    made = draft()
    for value in (False, 0, "none", True, 2):
        off("why")(made, f"k{value}", value)
    assert set(left(made)) == {"kTrue", "k2"}
