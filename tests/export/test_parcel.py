"""What a push sends of published folders: verified and unchanged files, each under a name of its own, and one card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora import disk
from qlora.errors import ExportError
from qlora.events import Notice, Recorder
from qlora.export.leaks import Private
from qlora.export.parcel import PublishedFolder, pack
from tests.push_hub import an_adapter, an_export

NOTHING = Private({}, ())


def packed(*folders: Path, private: Private = NOTHING, sink: Recorder | None = None) -> dict[str, bytes]:
    items = pack([PublishedFolder.open(folder) for folder in folders], private, "me/support", sink or Recorder())
    return {item.name: b"".join(item.blocks(0, item.size)) for item in items}


def header(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


def test_one_folder_is_sent_as_it_lies_but_for_its_card(tmp_path: Path) -> None:
    folder = an_export(tmp_path / "hf")
    sent = packed(folder)
    assert sent.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert all(data == (folder / name).read_bytes() for name, data in sent.items() if name != "README.md")
    assert header(sent["README.md"]) == {
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["qlora"],
    }


def test_a_base_that_the_hub_has_not_is_not_in_the_cards_metadata(tmp_path: Path) -> None:
    card = b"---\nbase_model: my-llama\ntags: [qlora]\n---\n# On my-llama"
    sink = Recorder()
    sent = packed(an_export(tmp_path / "hf", revision=None, README__md=card), sink=sink)
    assert "base_model" not in header(sent["README.md"]) and b"# On my-llama" in sent["README.md"]
    assert any(isinstance(one, Notice) and "no licence of the base is known" in one.message for one in sink.events)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_what_was_changed_since_is_refused(tmp_path: Path) -> None:
    for name in ("hf-1.safetensors", "config.json", "README.md", "export.json"):
        folder = an_export(tmp_path / f"of-{name}")
        opened = PublishedFolder.open(folder)
        flip(folder / name)
        with pytest.raises(ExportError, match=rf"{name}: was changed since it was made .its sha256 differs") as error:
            pack([opened], NOTHING, "me/x", Recorder())
        assert error.value.hint == "export it again"
    folder = an_export(tmp_path / "more")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(ExportError, match=r"was changed since it was made \(notes.txt was added\)"):
        PublishedFolder.open(folder)
    folder = an_export(tmp_path / "less")
    (folder / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config.json is missing"):
        PublishedFolder.open(folder)
    folder = an_export(tmp_path / "link")
    shutil.move(folder / "config.json", tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ExportError, match="changed since"):
        PublishedFolder.open(folder)


@pytest.mark.parametrize(
    "said",
    [
        {"checks": []},
        {},
        {"checks": [{"name": "weights", "ok": False}]},
        {"checks": [{"name": "weights", "ok": "yes"}]},
    ],
)
def test_what_was_not_verified_is_refused(tmp_path: Path, said: dict[str, Any]) -> None:
    folder = an_export(tmp_path / "hf", export__json=json.dumps({"format": "hf", **said}).encode())
    with pytest.raises(ExportError, match="was exported without being verified") as error:
        PublishedFolder.open(folder)
    assert "verify=False" in error.value.hint


@pytest.mark.parametrize("data", [b"", b"[]", b'{"format": 5}', b'{"checks": 1, "format": "hf"}'])
def test_an_export_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ExportError, match="cannot be read as an export"):
        PublishedFolder.open(an_export(tmp_path / "hf", export__json=data))


def test_folders_that_are_no_exports(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    disk.publish_folder(tmp_path / "step", lambda place: None, {"kind": "checkpoint"})
    (tmp_path / "link").symlink_to(an_export(tmp_path / "hf"))
    for name in ("empty", "own", "step", "link", "none"):
        with pytest.raises(ExportError, match="is no export that could be pushed"):
            PublishedFolder.open(tmp_path / name)


def test_a_runs_adapter_names_its_base_without_its_folders(tmp_path: Path) -> None:
    folder = an_adapter(tmp_path / "runs" / "x" / "adapter", "/data/bases/my-llama", "main")
    sent = packed(folder, private=Private.of_owner([folder], [], []))
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "my-llama"
    assert json.loads(sent["adapter_config.json"])["target_modules"] == "model/layers/[01]/(q|v)_proj"
    assert json.loads(sent["qlora.json"])["base"] == "my-llama" and b"/data" not in b"".join(sent.values())
    folder = an_adapter(tmp_path / "hub", "owner/base", "c" * 40)
    sent = packed(folder)
    assert sent["adapter_config.json"] == (folder / "adapter_config.json").read_bytes()
    told = header(sent["README.md"])
    assert (told["base_model"], told["base_model_relation"], told["library_name"]) == ("owner/base", "adapter", "peft")


def test_several_share_the_root_and_an_adapter_has_its_own_folder(tmp_path: Path) -> None:
    ggufs = {
        key: an_export(
            tmp_path / key, key, Modelfile=f"# ollama create x -f Modelfile\nFROM {key}".encode(), imatrix__gguf=b"same"
        )
        for key in ("gguf-q8_0", "gguf-q4_k_m")
    }
    hf = an_export(tmp_path / "hf", generation_config__json=b"{}")
    other = an_export(tmp_path / "other", "gguf-f16", imatrix__gguf=b"another")
    adapter = an_adapter(tmp_path / "adapter", "owner/base", "c" * 40)
    sent = packed(hf, *ggufs.values(), other, adapter)
    assert {f"export-{key}.json" for key in ("hf", "gguf-q8_0", "gguf-q4_k_m", "gguf-f16")} <= sent.keys()
    assert (
        sent["Modelfile-gguf-q8_0"] == b"# ollama create x -f Modelfile-gguf-q8_0\nFROM gguf-q8_0"
        and "Modelfile" not in sent
        and "export.json" not in sent
    )
    assert (sent["imatrix.gguf"], sent["imatrix-gguf-f16.gguf"]) == (b"same", b"another")
    assert {f"adapter/{path.name}" for path in adapter.iterdir()} - {"adapter/manifest.json"} <= sent.keys()
    assert "adapter_config.json" not in sent  # transformers would open it in the model's place
    card = sent["README.md"].decode()
    assert card.count("# A model") == 1 and "# support\n\nHolds hf, gguf-q8_0, gguf-q4_k_m, gguf-f16.\n" in card
    assert header(sent["README.md"])["base_model_relation"] == "finetune"


def test_what_two_cards_share_is_said_once_and_a_name_that_is_alone_stays(tmp_path: Path) -> None:
    shared = "\n\n## How near\n\ntable\n\n# Adapter\n\nfacts\n"
    hf = an_export(tmp_path / "hf", README__md=f"---\na: b\n---\n\n# One{shared}".encode())
    text = f"---\na: b\n---\n\n# Two\n\nollama create x -f Modelfile && y{shared}"
    gguf = an_export(tmp_path / "gguf", "gguf-f16", Modelfile=b"FROM x", README__md=text.encode())
    sent = packed(hf, gguf)
    body = sent["README.md"].decode().split("---\n", 2)[2]
    assert body.strip() == (
        "# support\n\nHolds hf, gguf-f16.\n\n# One\n\n## How near\n\ntable\n\n# Adapter\n\nfacts\n\n"
        "# Two\n\nollama create x -f Modelfile && y"
    )
    assert sent["Modelfile"] == b"FROM x" and "export-hf.json" in sent


def test_a_card_of_anybody_breaks_nothing(tmp_path: Path) -> None:
    for number, text in enumerate(
        (b"---\n- a\n---\n# T", b"---\na: [\n---\n# T", b"---\n" + b"a: &a [*a]\n---\n# T", b"\xff# T")
    ):
        sent = packed(an_export(tmp_path / str(number), README__md=text))
        assert header(sent["README.md"])["base_model"] == "owner/base" and b"# T" in sent["README.md"]


def test_another_spelling_in_a_text_of_ours_is_refused(tmp_path: Path) -> None:
    private = Private({"/home/maria-owner": "a folder of this machine"}, ())
    for name in ("README__md", "Modelfile"):
        folder = an_export(tmp_path / name, **{name: b"# See file:%2F%2F%2Fhome%2Fmaria-owner%2Fx"})
        with pytest.raises(ExportError, match="holds a folder of this machine at byte"):
            packed(folder, private=private)


def test_a_name_that_says_who_you_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="its name holds a mail address"):
        packed(an_export(tmp_path / "hf", **{"maria@example__org-Q8_0__gguf": b"x"}))
