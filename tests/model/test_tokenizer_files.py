"""A tokenizer's files are read once, through no link, and what goes out of them names no place of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qlora import disk
from qlora.errors import RunFolderError, TokenizerError
from qlora.events import Recorder
from qlora.model.tokenizer import open_tokenizer
from qlora.model.tokenizer_files import TOKENIZER_FILES, TokenizerFiles, of_export, of_run, read_files, take
from tests.families import make_base, make_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base("llama", tmp_path / "base")


def notices(sink: Recorder) -> list[str]:
    return [event.as_dict()["message"] for event in sink.of("notice")]


def test_a_private_copy_is_byte_for_byte_and_opens(base: Path) -> None:
    found = read_files(base)
    with found.placed() as folder:
        assert {path.name for path in folder.iterdir()} == set(found.content)
        assert all((folder / name).read_bytes() == (base / name).read_bytes() for name in found.content)
        assert open_tokenizer(folder, "base").get_vocab() == make_tokenizer().get_vocab()
    assert not folder.exists() and "config.json" in found.content and "model.safetensors" not in found.content


def test_its_fingerprint_is_of_names_and_contents_as_older_versions_computed_it(base: Path) -> None:
    present = [name for name in TOKENIZER_FILES if (base / name).is_file()]
    parts = [part for name in present for part in (name, disk.sha256_file(base / name))]
    assert read_files(base).fingerprint == disk.sha256_text(*parts)


def test_named_templates_and_vocabularies_of_other_names_are_read_too(base: Path) -> None:
    (base / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/tools.jinja", "vocab.txt", "cl100k.tiktoken", "tekken.json"):
        (base / name).write_text("x")
    (base / "trainer_state.json").write_text("{}")
    with read_files(base).placed() as folder:
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"additional_chat_templates/tools.jinja", "vocab.txt", "cl100k.tiktoken", "tekken.json"} <= there
    assert "trainer_state.json" not in there


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "spiece.model"])
def test_a_link_out_of_the_folder_is_refused_and_a_link_inside_it_read(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "diary.txt").write_text("secret")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(tmp_path / "diary.txt")
    with pytest.raises(TokenizerError, match=rf"{name}.*link out of the folder"):
        read_files(base)
    (base / name).unlink()
    (base / "aside.txt").write_text("own")
    (base / name).symlink_to("aside.txt")
    assert read_files(base).content[name] == b"own"


def test_too_many_templates_and_a_folder_of_them_elsewhere_are_refused(base: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (base / "additional_chat_templates").symlink_to(elsewhere)
    with pytest.raises(TokenizerError, match="link out of the folder"):
        read_files(base)
    (base / "additional_chat_templates").unlink()
    (base / "additional_chat_templates").mkdir()
    for number in range(65):
        (base / "additional_chat_templates" / f"{number}.jinja").write_text("x")
    with pytest.raises(TokenizerError, match="65 chat templates are too many"):
        read_files(base)


def test_what_is_delivered_names_no_place_of_this_machine(base: Path, tmp_path: Path) -> None:
    file, out = base / "tokenizer_config.json", tmp_path / "out"
    out.mkdir()
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "name_or_path": "/home/me/secret-client/model", "model_max_length": 10**30}))
    read_files(base).deliver(out)
    delivered = json.loads((out / "tokenizer_config.json").read_text())
    assert "name_or_path" not in delivered and delivered["model_max_length"] == 10**30
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (out / "config.json").exists()
    for place in ("./acme/model", "../acme", "runs/acme/model", "C:/acme", "acme\\\\model", "~/acme"):
        file.write_text(json.dumps({**config, "text_config": {"_name_or_path": place, "hidden_size": 8}}))
        read_files(base).deliver(out)
        assert json.loads((out / "tokenizer_config.json").read_text())["text_config"] == {"hidden_size": 8}, place
    file.write_text(json.dumps({**config, "name_or_path": "meta-llama/Llama-3.1-8B"}))
    read_files(base).deliver(out)
    assert (out / "tokenizer_config.json").read_bytes() == file.read_bytes()


def test_the_tokenizer_of_an_adapter_goes_first_with_the_base_s_configuration(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert of_export(base, adapter) == read_files(base), "it has no tokenizer"
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(adapter)
    found = of_export(base, adapter)
    assert found.content["config.json"] == (base / "config.json").read_bytes()
    with found.placed() as folder:
        assert "<new>" in open_tokenizer(folder, "base").get_vocab()


def as_it_is(found: TokenizerFiles) -> TokenizerFiles:
    return found


def test_a_resumed_run_goes_on_with_what_it_took(base: Path, tmp_path: Path) -> None:
    run, sink = tmp_path / "run", Recorder()
    first = take(run, base, False, sink, as_it_is)
    assert take(run, base, True, sink, as_it_is) == first == of_run(run, sink) and not sink.events
    (base / "chat_template.jinja").write_text("another")
    assert take(run, base, True, sink, as_it_is) == first
    said = f"the chat template in {base} has changed since this run began; the run goes on with its own copy"
    assert notices(sink) == [said]

    def gone(_: TokenizerFiles) -> TokenizerFiles:
        raise TokenizerError("mine.jinja: no chat template (No such file or directory)", "")

    assert take(run, base, True, sink, gone) == first
    assert notices(sink)[1].startswith("mine.jinja: no chat template")
    assert take(run, base, False, sink, as_it_is).content["chat_template.jinja"] == b"another", (
        "a new run takes it anew"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "config.json"])
def test_a_damaged_copy_is_said_and_made_anew(base: Path, tmp_path: Path, name: str) -> None:
    run, sink = tmp_path / "run", Recorder()
    first = take(run, base, False, sink, as_it_is)
    data = bytearray((run / "tokenizer" / name).read_bytes())
    data[len(data) // 2] ^= 4
    (run / "tokenizer" / name).write_bytes(bytes(data))
    assert of_run(run, sink) is None and "is damaged" in notices(sink)[0]
    assert take(run, base, True, sink, as_it_is) == first == of_run(run, Recorder())


def test_a_run_of_an_older_version_gets_its_copy(base: Path, tmp_path: Path) -> None:
    run, sink = tmp_path / "run", Recorder()
    assert of_run(run, sink) is None
    assert take(run, base, True, sink, as_it_is) == of_run(run, sink) == read_files(base) and not sink.events


def test_what_cannot_be_written_or_read_is_said(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "publish_folder", full)
    with pytest.raises(RunFolderError, match=r"tokenizer: cannot be written \(No space"):
        take(tmp_path / "run", base, False, Recorder(), as_it_is)
    shutil.rmtree(base)
    with pytest.raises(TokenizerError, match="No such file"):
        read_files(base)
