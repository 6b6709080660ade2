"""A hub on this machine that takes models: the calls of a push, what was received, and a fault at any one of them."""

from __future__ import annotations

import base64
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

from qlora import disk, hub_calls
from qlora.events import Recorder
from qlora.export.parcel import PublishedFolder
from qlora.export.push import Contents, Push, open_destination
from qlora.outgoing import git_hash

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
USER, MAIL = "maria-of-the-hub", "maria.huber@example.org"
CHUNK = 30_000  # bytes of a part: what is larger goes up in several

Fault = Callable[[Any], bool]  # given the request's handler; True: it has answered, or broken off


@dataclass
class Repo:
    """Files of the newest commit: text as bytes, an object by its sha256."""

    private: bool = True
    files: dict[str, bytes | str] = field(default_factory=lambda: {".gitattributes": b"*.bin filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["a" * 40])

    @property
    def head(self) -> str:
        return self.commits[-1]


@dataclass
class PushHub:
    """`before` and `after` are called with the number of a request, from 1 on, and its handler: before anything is
    done, and when all is done but the answer. Who returns True has answered, or breaks off."""

    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    received: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    role: str = "write"
    orgs: tuple[str, ...] = ("our-lab",)
    ignored: tuple[str, ...] = ()
    before: Callable[[int, Any], bool] = lambda _number, _handler: False
    after: Callable[[int, Any], bool] = lambda _number, _handler: False
    endpoint: str = ""
    elsewhere: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def calls(self) -> list[str]:
        """What was asked, in order, without names of objects."""
        return [re.sub(r"[0-9a-f]{40,64}", "#", f"{method} {path}") for method, path, _, _ in self.received]

    def stored_bytes(self) -> int:
        """Bytes that arrived at the store, in all."""
        return sum(len(body) for method, _, _, body in self.received if method == "PUT")

    def everything(self) -> bytes:
        """All that was received but the Authorization headers."""
        heads = [json.dumps({k: v for k, v in head.items() if k != "authorization"}) for _, _, head, _ in self.received]
        lines = [f"{method} {path}" for method, path, _, _ in self.received]
        return b"\n".join([*(text.encode() for text in (*lines, *heads)), *map(_readable, self.received)])

    def answer(self, method: str, path: str, head: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path.startswith("/store/"):
            assert "authorization" not in head
            return self.keep(method, path, head, body)
        if head.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "no"}, {}
        if path == "/api/whoami-v2":
            orgs = [{"name": name, "type": "org"} for name in self.orgs]
            auth = {"accessToken": {"displayName": "t", "role": self.role}}
            return 200, {"type": "user", "name": USER, "email": MAIL, "orgs": orgs, "auth": auth}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit)/main)?", path)) is not None:
            name, what = found.groups()
            if name not in self.repos:
                return 404, {}, {"X_Error_Code": "RepoNotFound"}
            return {"preupload": self.preupload, "commit": self.commit}[what](name, body) if what else self.info(name)
        if (found := re.fullmatch(r"/([^/]+/[^/]+)/raw/(\w+)/(.+)", path)) is not None:
            name, at, file = found.groups()
            text = self.repos[name].files.get(file) if at == self.repos[name].head else None
            return (200, text, {}) if isinstance(text, bytes) else (404, {}, {})
        if (found := re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/(batch|verify)", path)) is not None:
            return self.batch(path, json.loads(body)) if found[1] == "batch" else self.verify(head, json.loads(body))
        return 404, {}, {}

    def keep(self, method: str, path: str, head: dict[str, str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        _, _, oid, *part = path.split("/")
        if method == "POST":
            told = json.loads(body)
            if any(one["etag"] != f"etag-{one['partNumber']}" for one in told["parts"]):
                return 400, {}, {}
            body = b"".join(self.parts.pop((oid, one["partNumber"])) for one in told["parts"])
        elif part:
            assert "x-ticket" not in head  # of a multipart answer, what stands in `header` are its parts
            self.parts[oid, int(part[0])] = body
            return 200, b"", {"ETag": f"etag-{part[0]}"}
        elif head.get("x-ticket") != f"for {oid}":
            return 403, {}, {}
        assert hashlib.sha256(body).hexdigest() == oid
        self.store[oid] = body
        return 200, b"", {}

    def create(self, told: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        owner, name = told["organization"], told["name"]
        assert told["type"] == "model"
        if owner not in (USER, *self.orgs):
            return 403, {}, {}
        if f"{owner}/{name}" in self.repos:
            return 409, {}, {}
        self.repos[f"{owner}/{name}"] = Repo(private=told["private"])
        return 200, {"url": "x"}, {}

    def info(self, name: str) -> tuple[int, Any, dict[str, str]]:
        repo = self.repos[name]
        siblings = [
            {"rfilename": file, "blobId": git_hash(text), "size": len(text)}
            if isinstance(text, bytes)
            else {"rfilename": file, "blobId": "p", "lfs": {"sha256": text, "size": 1, "pointerSize": 1}}
            for file, text in repo.files.items()
        ]
        return 200, {"id": name, "private": repo.private, "sha": repo.head, "siblings": siblings, "tags": []}, {}

    def preupload(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if name.split("/")[0] not in (USER, *self.orgs):
            return 403, {}, {}
        found = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".gguf")) else "regular",
                "shouldIgnore": one["path"] in self.ignored,
                "oid": None,
            }
            for one in json.loads(body)["files"]
        ]
        return 200, {"files": found}, {}

    def batch(self, path: str, told: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        found = []
        for one in told["objects"]:
            oid, size = one["oid"], one["size"]
            upload: dict[str, Any] = {"href": f"{self.elsewhere}/store/{oid}", "header": {"X-Ticket": f"for {oid}"}}
            if size > CHUNK:
                count = -(-size // CHUNK)
                header = {str(part): f"{self.elsewhere}/store/{oid}/{part}" for part in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(CHUNK), **header}
            verify = {"href": f"{self.endpoint}{path.replace('batch', 'verify')}", "header": {"X-Ticket": oid}}
            actions = {} if oid in self.store else {"actions": {"upload": upload, "verify": verify}}
            found.append({"oid": oid, "size": size, **actions})
        return 200, {"transfer": "multipart", "objects": found}, {}

    def verify(self, head: dict[str, str], told: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        arrived = head.get("x-ticket") == told["oid"] and len(self.store.get(told["oid"], b"")) == told["size"]
        return (200 if arrived else 422), {}, {}

    def commit(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        repo, (head, *lines) = self.repos[name], [json.loads(line) for line in body.splitlines()]
        if head["value"].get("parentCommit") != repo.head:
            return 412, {}, {}
        for line in lines:
            value = line["value"]
            if line["key"] == "deletedFile":
                del repo.files[value["path"]]
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert value["oid"] in self.store
                repo.files[value["path"]] = value["oid"]
        repo.commits.append(hashlib.sha1(body).hexdigest())
        return 200, {"success": True, "commitOid": repo.head, "commitUrl": "x"}, {}


def _readable(request: tuple[str, str, dict[str, str], bytes]) -> bytes:
    """A body, and what stands in it as base64."""
    body = request[3]
    found = re.findall(rb'"(?:content|sample)": "([A-Za-z0-9+/=]*)"', body)
    return b"\n".join([body, *map(base64.b64decode, found)])


class Handler(BaseHTTPRequestHandler):
    """A request to the hub of its server: kept, answered, and handed to who breaks it on purpose."""

    server: PushServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def reply(self, status: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def break_off(self) -> bool:
        self.close_connection = True
        return True

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        head = {name.lower(): text for name, text in self.headers.items()}
        path = unquote(urlsplit(self.path).path)
        hub = self.server.hub
        with hub.lock:
            hub.received.append((self.command, path, head, body))
            number = len(hub.received)
            if hub.before(number, self):
                return
            status, value, more = hub.answer(self.command, path, head, body)
            if not hub.after(number, self):
                self.reply(status, value, **more)

    do_GET = do_POST = do_PUT = handle_one

    def log_message(self, *_: Any) -> None:
        pass


class PushServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: PushHub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    def handle_error(self, *_: Any) -> None:
        """Who asked may have gone: that is what some tests are about."""


@pytest.fixture
def push_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    """A hub for one test in the place of the real one, whose store has another name than the hub itself."""
    import huggingface_hub
    from huggingface_hub import constants

    hub = PushHub()
    server = PushServer(hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.elsewhere = f"http://localhost:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_calls, "WAITS", (0.0, 0.0))
    huggingface_hub.close_session()
    yield hub
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def push(folder: Path, name: str = "support", sink: Recorder | None = None, **settings: Any) -> Any:
    """One published folder, sent to the repository `name`."""
    contents = Contents.of([PublishedFolder.open(folder)])
    return open_destination(Push(name, **settings), contents).deliver([folder], sink or Recorder())


def an_export(
    folder: Path, key: str = "hf", revision: str | None = "c" * 40, of: str = "support", **more: bytes
) -> Path:
    """A published export with weights that go up in one part, and in several; names have `__` for a dot."""
    card = "---\nbase_model: owner/base\nlicense: mit\nlibrary_name: transformers\ntags: [qlora]\n---\n\n# A model\n"
    said = {"format": key, "tensors": 2, "merged": 1, "merge_base": "nf4", "checks": [{"name": "weights", "ok": True}]}
    files = {
        "README__md": card.encode(),
        "export__json": json.dumps(said, indent=1).encode(),
        "config__json": b'{"model_type": "llama"}\n',
        f"{key}-1__safetensors": b"weights of " + key.encode() + bytes(range(256)) * 30,
        f"{key}-2__safetensors": bytes(range(256)) * 300 + key.encode(),
        **more,
    }

    folder.parent.mkdir(parents=True, exist_ok=True)

    def write(place: Path) -> None:
        for name, data in files.items():
            (place / name.replace("__", ".")).write_bytes(data)

    made = {"adapter": of, "base": "owner/base", "revision": revision, "asked": "x"}
    disk.publish_folder(folder, write, {"kind": "export", "of": made})
    return folder


def an_adapter(folder: Path, base: str, revision: str) -> Path:
    """The adapter of a run, as its folder is published."""
    config = {"base_model_name_or_path": base, "target_modules": "model/layers/[01]/(q|v)_proj", "peft_type": "LORA"}
    card = "---\nbase_model: x\nlibrary_name: peft\nlicense: mit\ntags: [lora]\n---\n\n# An adapter\n"
    files = {
        "adapter_config.json": json.dumps(config, indent=2).encode(),
        "qlora.json": json.dumps({"base": base, "revision": revision, "step": 4}).encode(),
        "adapter_model.safetensors": b"matrices" * 50,
        "README.md": card.encode(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)

    def write(place: Path) -> None:
        for name, data in files.items():
            (place / name).write_bytes(data)

    disk.publish_folder(folder, write, {"kind": "adapter", "of": {"run": "1"}})
    return folder
