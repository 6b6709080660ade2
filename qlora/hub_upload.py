"""A repository of models on the hub, from this side: who asks, what it holds, and one commit of new files.

Files go up first, each known by its sha256, and become visible in one commit at the end: half a model never is. What
the hub holds already, from a push that was interrupted too, is not sent again. The calls are those of the hub's HTTP
interface (https://huggingface.co/docs/hub/api) and of git LFS's batch interface with "basic" and "multipart" transfers
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import Field

from qlora import foreign_json, shown
from qlora.errors import ExportError
from qlora.events import Progress, Sink
from qlora.hub_calls import GO_ON, Answer, Calls
from qlora.outgoing import Outgoing, git_hash

SAMPLE_BYTES = 512  # of a file's beginning: by it the hub decides whether it is text
BATCH = 256  # files in one question
MAX_TEXT_BYTES = 10 << 20  # the hub takes no larger file into the commit itself
MAX_PARTS = 10_000  # of a multipart upload, as S3 has it
_TOKENS = "https://huggingface.co/settings/tokens"


class _Lfs(foreign_json.ForeignModel):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Sibling(foreign_json.ForeignModel):
    rfilename: Annotated[str, Field(min_length=1, max_length=4096)]
    blobId: str | None = None
    lfs: _Lfs | None = None


class _Info(foreign_json.ForeignModel):
    private: bool
    id: Annotated[str, Field(max_length=300)]
    sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None = None
    siblings: list[_Sibling] = Field(default_factory=list)


class _Token(foreign_json.ForeignModel):
    role: str | None = None


class _Auth(foreign_json.ForeignModel):
    accessToken: _Token | None = None


class _Organization(foreign_json.ForeignModel):
    name: str


class _Who(foreign_json.ForeignModel):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    email: str | None = None
    orgs: list[_Organization] = Field(default_factory=list)
    auth: _Auth | None = None


class _Mode(foreign_json.ForeignModel):
    path: str
    uploadMode: Literal["lfs", "regular"]
    shouldIgnore: bool = False


class _Modes(foreign_json.ForeignModel):
    files: list[_Mode]


class _Action(foreign_json.ForeignModel):
    href: str
    header: dict[str, Any] | None = None


class _Actions(foreign_json.ForeignModel):
    upload: _Action | None = None
    verify: _Action | None = None


class _Object(foreign_json.ForeignModel):
    oid: str
    actions: _Actions | None = None
    error: dict[str, Any] | None = None


class _Batch(foreign_json.ForeignModel):
    objects: list[_Object]


class _Committed(foreign_json.ForeignModel):
    commitOid: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")]


@dataclass(frozen=True)
class Account:
    """Whose the token is. `may_write` is None where the token does not say: its rights are given one by one.

    `owners` are the user and their organizations: names in small letters, and as they are spelled.
    """

    name: str
    email: str | None
    owners: Mapping[str, str]
    may_write: bool | None


@dataclass(frozen=True)
class Held:
    """What a repository holds at its newest commit: of each file its sha256, or for text the hash that git gives it."""

    private: bool
    commit: str | None
    files: Mapping[str, str]


@dataclass
class ModelRepository:
    """The repository `name` (owner/name) of the hub that `calls` reach."""

    calls: Calls
    name: str
    sent_bytes: int = 0
    _modes: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"{self.calls.endpoint}/{self.name}"

    def look(self) -> Held | None:
        """What it holds, None where there is none (or none that may be seen). Raises ExportError for a refusal."""
        answer = self.calls.ask("GET", f"/api/models/{self.name}?blobs=true")
        if answer.status == 404 or (answer.status == 401 and answer.headers.get("x-error-code") == "RepoNotFound"):
            return None
        self._accept(answer, "looked at")
        found = self._checked(_Info, answer)
        if found.id != self.name:  # an older name of it, or another spelling
            what = f"{self.name}: the hub calls it {found.id[:100]}"
            raise ExportError(what, "give the name that its page shows")
        held = {one.rfilename: one.lfs.sha256 if one.lfs else str(one.blobId) for one in found.siblings}
        return Held(found.private, found.sha, held)

    def create(self, private: bool) -> bool:
        """Make it; False where it is there already. Raises ExportError where the token may not."""
        owner, _, name = self.name.partition("/")
        value = {"name": name, "organization": owner, "type": "model", "private": private}
        answer = self.calls.ask("POST", "/api/repos/create", value)
        if answer.status == 409:
            return False
        self._accept(answer, "made")
        return True

    def text_of(self, file: str, commit: str, limit: int) -> bytes | None:
        """A file of text at a commit; None where it cannot be had or is larger than `limit`."""
        answer = self.calls.ask("GET", f"/{self.name}/raw/{commit}/{quote(file)}")
        return answer.body if answer.ok and len(answer.body) <= limit else None

    def modes(self, items: Sequence[Outgoing]) -> None:
        """Learn which files go up by themselves, and that they may: raises ExportError where they must not."""
        for some in _batches(items):
            asked = [
                {"path": one.name, "size": one.size, "sample": base64.b64encode(one.beginning(SAMPLE_BYTES)).decode()}
                for one in some
            ]
            answer = self.calls.ask("POST", f"/api/models/{self.name}/preupload/main", {"files": asked})
            self._accept(answer, "written to")
            found = {one.path: one for one in self._checked(_Modes, answer).files}
            for item in some:
                if (mode := found.get(item.name)) is None:
                    raise ExportError(f"the hub's answer about {self.name} leaves out {item.name}", GO_ON)
                if mode.shouldIgnore:
                    what = f"{self.name}: its .gitignore leaves out {item.name}"
                    raise ExportError(what, "take the line out of it, on the repository's page")
                # An empty file is no object of a store; text beyond the bound could not be in the commit.
                is_object = item.size > MAX_TEXT_BYTES or (mode.uploadMode == "lfs" and item.size > 0)
                self._modes[item.name] = "lfs" if is_object else "regular"

    def hash_of(self, item: Outgoing) -> str:
        """What `Held.files` has of a file like this one, once `modes` knows it."""
        return item.sha256 if self._modes[item.name] == "lfs" else git_hash(item.whole())

    def upload(self, items: Sequence[Outgoing], sink: Sink) -> None:
        """Send what goes up by itself and is not there: file by file, checked by the hub against its sha256."""
        large = [item for item in items if self._modes[item.name] == "lfs"]
        total, done = sum(item.size for item in large), 0
        sent: set[str] = set()  # of two files of one content the first is enough
        for some in _batches(large):
            actions = self._batch(some)
            for item in some:
                needed = actions[item.sha256]
                if needed is not None and needed.upload is not None and item.sha256 not in sent:
                    self._send(item, needed, needed.upload, partial(_say, sink, total, done))
                sent.add(item.sha256)
                done += item.size
                _say(sink, total, done, 0)

    def commit(self, items: Sequence[Outgoing], gone: Sequence[str], parent: str | None, message: str) -> str:
        """One commit of `items`, uploaded already, without the files `gone`, upon `parent`. Returns its id.

        Raises ExportError where somebody else has committed meanwhile, and for every refusal.
        """
        head = {"summary": message, "description": "", **({"parentCommit": parent} if parent else {})}
        lines: list[dict[str, Any]] = [{"key": "header", "value": head}]
        for item in items:
            if self._modes[item.name] == "lfs":
                value = {"path": item.name, "algo": "sha256", "oid": item.sha256, "size": item.size}
                lines.append({"key": "lfsFile", "value": value})
            else:
                content = base64.b64encode(item.whole()).decode()
                lines.append({"key": "file", "value": {"path": item.name, "encoding": "base64", "content": content}})
                self.sent_bytes += item.size
        lines += [{"key": "deletedFile", "value": {"path": name}} for name in gone]
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        # Once: whether a commit without an answer was made is seen when the repository is looked at again.
        answer = self.calls.ask("POST", f"/api/models/{self.name}/commit/main", body=body, once=True)
        if answer.status in (409, 412):
            raise ExportError(f"{self.name}: was changed by somebody else at this moment", GO_ON)
        self._accept(answer, "written to")
        return self._checked(_Committed, answer).commitOid

    def _batch(self, items: Sequence[Outgoing]) -> dict[str, _Actions | None]:
        """What the store wants of each file, by its sha256."""
        path = f"/{self.name}.git/info/lfs/objects/batch"
        sizes = {item.sha256: item.size for item in items}
        objects = [{"oid": oid, "size": size} for oid, size in sizes.items()]
        value = {"operation": "upload", "transfers": ["basic", "multipart"], "hash_algo": "sha256", "objects": objects}
        answer = self.calls.follow("POST", f"{self.calls.endpoint}{path}", value)
        self._accept(answer, "written to")
        found = {one.oid: one for one in self._checked(_Batch, answer).objects}
        for item in items:
            one = found.get(item.sha256)
            if one is None or one.error is not None:
                code = "" if one is None or one.error is None else f" ({str(one.error.get('code'))[:20]})"
                what = f"{self.name}: the hub takes no file of {item.size:,} bytes: {item.name}{code}"
                raise ExportError(what, "look at the space that your account has left, then run the same again")
        return {oid: one.actions for oid, one in found.items()}

    def _send(self, item: Outgoing, needed: _Actions, upload: _Action, say: Callable[[int], None]) -> None:
        parts, size = _parts(upload, item)
        in_parts = "chunk_size" in (upload.header or {})
        given = (
            None if in_parts else upload.header
        )  # the headers of a "basic" upload; of several parts, their addresses
        etags = []
        for number, url in enumerate(parts):
            start = number * size
            length = min(size, item.size - start)
            answer = self.calls.put(url, partial(self._counted, item, start, length, say), length, given)
            if not answer.ok:
                raise ExportError(f"{item.name}: the hub's store refuses it ({answer.status})", GO_ON)
            etags.append({"partNumber": number + 1, "etag": answer.headers.get("etag", "")})
        if in_parts:
            done = self.calls.follow("POST", upload.href, {"oid": item.sha256, "parts": etags})
            if not done.ok:
                raise ExportError(f"{item.name}: the hub's store refuses it ({done.status})", GO_ON)
        if needed.verify is not None:
            value, given = {"oid": item.sha256, "size": item.size}, needed.verify.header
            told = self.calls.follow("POST", needed.verify.href, value, given)
            if not told.ok:
                raise ExportError(f"{item.name}: has not arrived as it was sent ({told.status})", GO_ON)

    def _counted(self, item: Outgoing, start: int, length: int, say: Callable[[int], None]) -> Iterator[bytes]:
        read = start
        for block in item.blocks(start, length):
            yield block
            self.sent_bytes += len(block)
            read += len(block)
            say(read)

    def _checked(self, model: type[foreign_json.Model], answer: Answer) -> foreign_json.Model:
        value = answer.read(self.name)
        try:
            return foreign_json.checked(model, value, self.name)
        except foreign_json.ForeignFileError as error:
            raise ExportError(f"the hub's answer about {error}", GO_ON) from error

    def _accept(self, answer: Answer, done: str) -> None:
        """Raises ExportError for a refusal, in our words: the hub's own may carry addresses and headers."""
        if answer.ok:
            return
        if answer.status == 401:
            raise refused_token()
        if answer.status == 403:
            hint = f"use a token that may write there ({_TOKENS}), or name a repository of yours"
            raise ExportError(f"{self.name}: cannot be {done} with your token (403)", hint)
        if answer.status == 404:
            raise ExportError(f"{self.name}: is not there, or may not be {done} (404)", "check the name and your token")
        if answer.status == 402 or answer.status == 413:
            hint = "look at the space that your account has left, then run the same again"
            raise ExportError(f"{self.name}: the hub has no room for it ({answer.status})", hint)
        raise ExportError(
            f"{self.name}: the hub refuses it ({answer.status})", "check the name, then run the same again"
        )


def account(calls: Calls) -> Account:
    """Whose the token is. Raises ExportError for a token that the hub does not know."""
    answer = calls.ask("GET", "/api/whoami-v2")
    if answer.status in (401, 403):
        raise refused_token()
    if not answer.ok:
        raise ExportError(f"the hub does not say whose the token is ({answer.status})", "run the same again later")
    try:
        found = foreign_json.checked(_Who, answer.read("your account"), "your account")
    except foreign_json.ForeignFileError as error:
        raise ExportError(f"the hub's answer about {error}", GO_ON) from error
    role = found.auth.accessToken.role if found.auth and found.auth.accessToken else None
    owners = {name.lower(): name for name in (*(one.name for one in found.orgs), found.name)}
    return Account(found.name, found.email, owners, {"write": True, "read": False}.get(role or ""))


def refused_token() -> ExportError:
    hint = f"make one that may write ({_TOKENS}), then run: hf auth login (HF_TOKEN goes before it)"
    return ExportError("the hub does not accept your token", hint)


def _parts(upload: _Action, item: Outgoing) -> tuple[list[Any], int]:
    """Where each part of a file goes, and their size. Raises ExportError for an answer that cannot be followed."""
    header = upload.header or {}
    if "chunk_size" not in header:
        return [upload.href], item.size
    try:
        size = int(header["chunk_size"])
        numbered = {int(key): url for key, url in header.items() if key.isdecimal() and len(key) < 9}
    except (TypeError, ValueError, OverflowError):  # Python reads JSON's Infinity
        size, numbered = 0, {}
    count = math.ceil(item.size / size) if size > 0 else 0
    if not 0 < count <= MAX_PARTS or set(numbered) != set(range(1, count + 1)):
        raise ExportError(f"{shown.one_line(item.name)}: the hub asks for parts that do not make it up", GO_ON)
    return [numbered[number] for number in sorted(numbered)], size


def _batches(items: Sequence[Outgoing]) -> Iterator[Sequence[Outgoing]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _say(sink: Sink, total: int, done: int, more: int) -> None:
    sink.emit(Progress("push", done + more, total, "B"))
