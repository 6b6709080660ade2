"""Names become checked bases and rows, or an error in two lines that says why not. Here the hub is tiny."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from qlora.errors import DataError
from qlora.events import Notice, Progress, Recorder
from qlora.model.hub import download_rows, resolve
from tests.families import make_base
from tests.model.conftest import TOKEN, at, change_config, load, refused


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


@dataclass
class Hub:
    """A hub of one repository: `files` of one commit, what was asked of it, and how it answers (`refusal`)."""

    files: dict[str, bytes]
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    refusal: tuple[int, str] | None = None
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    def downloaded(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self.asked if path.startswith("GET") and "/resolve/" in path}


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            if hub.refusal is not None:
                status, code = hub.refusal
                self.answer(status, b'{"error": "see ' + TOKEN.encode() + b'"}', X_Error_Code=code)
            elif path.startswith("/api/"):
                if path.rpartition("/")[2] not in ("main", "v1.0", hub.commit):
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                    return
                siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
                info = {"id": "owner/tiny", "sha": hub.commit, "siblings": siblings, "private": False, "tags": []}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            else:
                data = hub.files.get(re.sub(r".*/resolve/[^/]+/", "", path))
                if data is None:
                    self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=hub.commit)
                    return
                self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=hub.commit)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Hub], Callable[[], None]]]:
    """Puts a hub on this machine in the place of the real one; the returned function shuts it down."""
    import huggingface_hub
    from huggingface_hub import constants

    servers: list[ThreadingHTTPServer] = []

    def stop() -> None:
        while servers:
            server = servers.pop()
            server.shutdown()
            server.server_close()
        huggingface_hub.close_session()

    def start(hub: Hub) -> Callable[[], None]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        return stop

    yield start
    stop()


def repository(folder: Path, **more: bytes) -> Hub:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return Hub({**files, **{name.replace("__", "."): data for name, data in more.items()}})


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
    index = {
        "metadata": {"total_size": 93 << 30},
        "weight_map": {"model.layers.0.mlp.experts.0.w1.weight": "model-1.safetensors"},
    }
    hub.files |= {"model.safetensors.index.json": json.dumps(index).encode(), "model-1.safetensors": b"never fetched"}
    assert "93.0 GiB" in refused("owner/tiny").what
    assert "model-1.safetensors" not in hub.downloaded()
    del hub.files["config.json"]
    assert "no config.json" in refused("owner/tiny").what


def test_rows_of_a_data_set(tmp_path: Path, serve: Callable[[Hub], Any]) -> None:
    hub = Hub(
        {"README.md": b"", "data/train-0.parquet": b"one", "data/train-1.parquet": b"two", "data/test.parquet": b"x"}
    )
    stop = serve(hub)
    sink = Recorder()
    rows = download_rows("hub:owner/rows@v1.0", sink)
    assert rows.pinned == f"hub:owner/rows@{hub.commit}:train"
    pattern = rows.pattern
    assert sorted(path.read_bytes() for path in Path(pattern).parent.glob(Path(pattern).name)) == [b"one", b"two"]
    assert hub.downloaded() == {"train-0.parquet", "train-1.parquet"}
    assert [event.done for event in sink.events if isinstance(event, Progress)][-1] == 6
    for source, what in (
        ("hub:owner/rows:nothing", "no file of the split"),
        ("hub:owner/rows@v9", "no revision"),
        ("hub:../etc", "no name that the hub allows"),
        ("hub:a/b/c", "not of the form"),
    ):
        with pytest.raises(DataError, match=what):
            download_rows(source, Recorder())
    hub.files["other/train.csv"] = b"a,b"
    with pytest.raises(DataError, match="several places"):
        download_rows("hub:owner/rows", Recorder())
    stop()
    assert download_rows("hub:owner/rows@" + hub.commit, Recorder()) == rows
