"""What a GGUF file says about itself: hub names whole, folders by their last part, and no "phi-3" by accident."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qlora.events import Recorder
from qlora.export.gguf.metadata import MAX_CARD_BYTES, About, general_keys, licence_of, read_card
from qlora.model.resolve import resolve


def test_only_a_base_of_the_hub_has_an_address(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's home is no hub name, though it is not written as an absolute path."""
    shutil.copytree(llama, tmp_path / "models" / "tiny")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    local = resolve("~/models/tiny", "main", Recorder())
    keys = dict(general_keys(About.of(local, "lamps", ["rows.jsonl"]), "model"))
    assert keys["general.name"] == "tiny lamps" and keys["general.base_model.0.name"] == "tiny"
    assert not {"general.base_model.0.organization", "general.base_model.0.repo_url"} & keys.keys()
    keys = dict(general_keys(About.of(replace(local, name="models/tiny", commit="ab12"), "lamps", []), "model"))
    assert keys["general.base_model.0.repo_url"] == "https://huggingface.co/models/tiny"
    assert keys["general.base_model.0.version"] == "ab12" and "general.dataset.count" not in keys


def test_the_name_switches_llama_cpps_phi_3_rules_on_only_for_its_tokenizer() -> None:
    about = About("Phi-3-mini", "", {}, "run", ())
    assert dict(general_keys(about, "model"))["general.name"] == "Phi 3-mini run"
    assert dict(general_keys(about, "model", strips_after_specials=True))["general.name"] == "Phi-3-mini run"
    other = replace(about, base="tiny")
    assert (
        dict(general_keys(other, "model", strips_after_specials=True))["general.name"] == "tiny run (Phi-3 tokenizer)"
    )


def test_the_licence_stands_in_the_cards_header(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == {} and read_card(tmp_path) == ("", "")
    card = tmp_path / "README.md"
    card.write_text('---\nlicense: other\nlicense_name: "lamp 1.0"\n---\nlicense: none\n')
    assert licence_of(tmp_path) == {"": "other", "_name": "lamp 1.0"}
    card.write_text("license: mit\n")
    assert licence_of(tmp_path) == {} and read_card(tmp_path) == ("", "license: mit\n")
    card.write_text("---\nlicense: mit\n---\n" + " " * MAX_CARD_BYTES)
    assert licence_of(tmp_path) == {}


def test_a_card_that_is_a_link_or_a_trap_is_none(tmp_path: Path) -> None:
    base, secret = tmp_path / "base", tmp_path / "secret"
    base.mkdir()
    secret.write_text("---\nlicense: a secret of this machine\n---\n")
    (base / "README.md").symlink_to(secret)
    assert licence_of(base) == {} and read_card(base) == ("", "")
    (base / "README.md").unlink()
    os.mkfifo(base / "README.md")
    assert read_card(base) == ("", "")


@pytest.mark.parametrize(
    "line", ["license: " + "x" * 2_000, "license: a\x1b]0;title\x07", "license:" + " " * 100_000 + '"', "license: \x00"]
)
def test_a_licence_is_one_short_printable_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{line}\nlicense_name: lamp\n---\n")
    assert licence_of(tmp_path) == {"_name": "lamp"}
