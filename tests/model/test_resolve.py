"""Names become checked bases, or an error in two lines that says why not. Here the hub is tiny."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.errors import ModelError
from qlora.events import Notice, Progress, Recorder
from qlora.model.resolve import resolve, resolve_config
from tests.all_families import make_config as make_mixture
from tests.families import make_base
from tests.hub_server import TOKEN, Hub, repository, serve
from tests.model.conftest import at, change_config, load, refused

__all__ = ["serve"]


@pytest.mark.parametrize(
    ("base", "what"),
    [
        ("/no/such/folder", "there is no folder"),
        ("../models/llama", "neither a folder nor a hub name"),
        ("a/b/c", "neither a folder nor a hub name"),
        ("https://huggingface.co/a/b", "neither a folder nor a hub name"),
        ("a/../b", "neither a folder nor a hub name"),
        ("a b/c", "neither a folder nor a hub name"),
    ],
)
def test_what_is_no_name_is_refused(base: str, what: str) -> None:
    assert what in refused(base).what


def test_a_hub_name_becomes_a_folder_at_a_commit(tmp_path: Path, serve: Callable[[Hub], Any]) -> None:
    hub = repository(
        make_base("llama", tmp_path / "base", shards=2), evil__py=b"1/0", pytorch_model__bin=b"x", README__md=b""
    )
    serve(hub)
    sink = Recorder()
    base = resolve("owner/tiny", "main", sink)
    assert (base.name, base.commit) == ("owner/tiny", hub.commit) and base.path.name == hub.commit
    assert hub.downloaded() == set(hub.files) - {"evil.py", "pytorch_model.bin", "README.md"}
    assert f"Bearer {TOKEN}" in hub.tokens, "a token that the user has set is used"
    assert load(base).is_loaded_in_4bit
    weights = sum(len(data) for name, data in hub.files.items() if name.endswith(".safetensors"))
    steps = [event for event in sink.events if isinstance(event, Progress)]
    assert steps[-1].task == "download" and steps[-1].done == steps[-1].total == weights
    assert base.fingerprint == at(tmp_path / "base").fingerprint

    hub.asked.clear()
    assert resolve("owner/tiny", "v1.0", Recorder()).path == base.path
    assert hub.downloaded() == set(), "what has arrived is not fetched again"


def test_offline_serves_from_the_cache(
    folder: Path, serve: Callable[[Hub], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = repository(folder)
    stop = serve(hub)
    first = resolve("owner/tiny", "main", Recorder())
    hub.refusal = (503, "")
    sink = Recorder()
    assert resolve("owner/tiny", "main", sink) == first
    assert "the hub answers 503" in str(sink.events[-1])
    stop()
    sink = Recorder()
    assert resolve("owner/tiny", hub.commit, sink) == first
    assert isinstance(sink.events[-1], Notice) and "taken from the cache" in sink.events[-1].message
    assert "not in the cache" in refused("owner/other").what
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("owner/tiny", "main", Recorder()).commit == hub.commit


@pytest.mark.parametrize(
    ("refusal", "what", "hint"),
    [
        ((403, "GatedRepo"), "accept a licence", "https://huggingface.co/owner/tiny"),
        ((401, "GatedRepo"), "accept a licence", "hf auth login"),
        ((401, "RepoNotFound"), "no such model, or it is private", "hf auth login"),
        ((404, "RepoNotFound"), "no such model", "spelling"),
        ((401, ""), "", "hf auth"),
        ((403, ""), "refuses it (403)", "hf auth whoami"),
    ],
)
def test_the_hub_refuses(
    folder: Path, serve: Callable[[Hub], Any], refusal: tuple[int, str], what: str, hint: str
) -> None:
    serve(Hub({}, refusal=refusal))
    error = refused("owner/tiny")
    assert what in error.what and hint in error.hint


def test_revisions_that_are_not_there(folder: Path, serve: Callable[[Hub], Any]) -> None:
    serve(repository(folder))
    assert "no revision 'v9'" in refused("owner/tiny", "v9").what


def test_refusals_cost_no_weights(folder: Path, serve: Callable[[Hub], Any]) -> None:
    hub = repository(change_config(folder, quantization_config={"quant_method": "gptq"}))
    serve(hub)
    assert "gptq" in refused("owner/tiny").what
    assert hub.downloaded() == {"config.json"}


def test_repositories_without_weights_to_train(tmp_path: Path, folder: Path, serve: Callable[[Hub], Any]) -> None:
    hub = repository(folder)
    hub.files["pytorch_model.bin"] = hub.files.pop("model.safetensors")
    serve(hub)
    assert "pickle only (pytorch_model.bin)" in refused("owner/tiny").what
    del hub.files["config.json"]
    assert "no config.json" in refused("owner/tiny").what


def test_experts_that_cannot_be_held_are_known_before_the_weights(folder: Path, serve: Callable[[Hub], Any]) -> None:
    hub = repository(folder)
    hub.files["config.json"] = json.dumps(make_mixture("llama4_text").to_dict()).encode()
    serve(hub)
    assert "llama4_text is a mixture of 16 experts" in refused("owner/tiny").what
    assert "model.safetensors" not in hub.downloaded()


def test_a_configuration_alone(folder: Path, serve: Callable[[Hub], Any]) -> None:
    hub = repository(folder)
    stop = serve(hub)
    config = resolve_config("owner/tiny", "main", Recorder())
    assert config == resolve_config(str(folder), "main", Recorder()) and config["model_type"] == "llama"
    assert hub.downloaded() == {"config.json"}
    stop()
    assert resolve_config("owner/tiny", "main", Recorder()) == config, "from the cache"
    with pytest.raises(ModelError, match="neither a folder nor a hub name"):
        resolve_config("a/b/c", "main", Recorder())
