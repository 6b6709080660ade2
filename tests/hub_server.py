"""A hub on this machine: one repository, served over HTTP as huggingface.co serves it."""

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

# A user's own, which no message may carry.
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


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
