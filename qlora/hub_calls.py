"""Requests to the hub by which something is changed there: each one bounded, repeated where that does no harm.

The session is huggingface_hub's, which knows proxies and certificates. What its own calls leave open is closed here:
they wait without an end, read answers of any size, and send the token wherever an answer points to. Here every wait
ends, an answer has a bound, the token goes to the hub alone, and no redirect is followed but one that stays there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from qlora import foreign_json
from qlora.errors import ExportError, foreign_failures
from qlora.version import __version__

MAX_ANSWER_BYTES = 64 << 20  # a repository of 100,000 files lists itself in 30 MB
MAX_URL = 16_000  # characters; signed addresses of a store have 1,500
WAIT_SECONDS = 60.0  # for a connection, for the next bytes, and for room to send some
ANSWER_SECONDS = 300.0  # for an answer as a whole: one that drips is none
WAITS = (1.0, 4.0, 15.0)  # seconds before the second try and those after it
LONGEST_WAIT = 60.0  # that the hub may ask for
_AGAIN = (408, 429, 500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 3
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")  # RFC 9110, 5.6.2: a token
# What is said of the message itself and of who sends it is ours to say.
_OF_MESSAGE = ("accept-encoding", "content-length", "cookie", "expect", "host", "proxy-authorization", "user-agent")
_OF_CONNECTION = ("connection", "te", "trailer", "transfer-encoding", "upgrade")
GO_ON = "run the same again: what has arrived is not sent twice"

Chunks = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Answer:
    """What the hub answered. Header names are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def read(self, what: str) -> dict[str, Any]:
        """The JSON object of an answer about `what`. Raises ExportError for what is none."""
        try:
            return foreign_json.parse_object(self.body, what)
        except foreign_json.ForeignFileError as error:
            raise ExportError(f"the hub's answer about {error}", GO_ON) from error


@dataclass
class Calls:
    """A hub at `endpoint`, asked with `token`. `repeated` counts the requests that were made again, by reason."""

    endpoint: str
    token: str
    repeated: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_user(cls) -> Calls:
        """The hub and token that huggingface_hub has for this user. Raises ExportError where there is none."""
        import huggingface_hub
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            raise ExportError("nothing can be pushed: HF_HUB_OFFLINE is set", "unset it, then run the same again")
        token = huggingface_hub.get_token() or ""
        if not token:
            hint = "run: hf auth login, with a token that may write (https://huggingface.co/settings/tokens)"
            raise ExportError("nothing can be pushed: there is no token for the hub", hint)
        if not (token.isascii() and token.isprintable()):
            raise ExportError(
                "the hub's token has characters that no token has", "set HF_TOKEN anew, or: hf auth login"
            )
        return cls(constants.ENDPOINT.rstrip("/"), token)

    def ask(
        self, method: str, path: str, value: Any = None, *, body: bytes | None = None, once: bool = False
    ) -> Answer:
        """One request to the hub, with the token; `value` is sent as JSON, or `body` as lines of it.

        Tried again where the hub is busy or breaks off, unless it may be done `once` only. Raises ExportError where no
        answer comes; a refusal is an answer.
        """
        headers = {"authorization": f"Bearer {self.token}"}
        if value is not None:
            body = json.dumps(value).encode()
        if body is not None:
            headers["content-type"] = "application/json" if value is not None else "application/x-ndjson"
        url = f"{self.endpoint}{path}"
        for _ in range(_MOST_REDIRECTS):
            answer = self._tried(method, url, headers, body or b"", once)
            if answer.status not in _REDIRECTS:
                return answer
            target = _joined(url, answer.headers.get("location", ""))
            if method != "GET" or not self.is_own(target):
                break
            url = target
        raise ExportError(
            f"the hub sends {path.partition('?')[0]} on to another place",
            "the repository may have been renamed: give the name that its page shows",
        )

    def follow(self, method: str, url: str, value: Any, given: Mapping[str, Any] | None = None) -> Answer:
        """A request to an address that the hub gave, with `value` as JSON and the headers that it gave with it.

        The token goes along only to the hub, and not where it gave another authorization.
        """
        url = self.address(url)
        headers = {"content-type": "application/vnd.git-lfs+json", "accept": "application/vnd.git-lfs+json"}
        if self.is_own(url):
            headers["authorization"] = f"Bearer {self.token}"
        body = json.dumps(value).encode()
        return self._tried(method, url, {**headers, **given_headers(given or {})}, body, False)

    def put(self, url: str, chunks: Chunks, size: int, given: Mapping[str, Any] | None = None) -> Answer:
        """`size` bytes to an address that the hub gave, with the headers that it gave with it and without the token.

        `chunks` begins anew at each try.
        """
        headers = {**given_headers(given or {}), "content-length": str(size)}
        return self._tried("PUT", self.address(url), headers, chunks, False)

    def address(self, url: Any) -> str:
        """An address that the hub gave, where it is one that bytes may go to. Raises ExportError."""
        if isinstance(url, str) and len(url) <= MAX_URL and url.isascii() and url.isprintable():
            if url.startswith("https://huggingface.co/"):  # a mirror passes on what it was told
                url = self.endpoint + url.removeprefix("https://huggingface.co")
            parts = _split(url) if not set(url) & set(' \\"<>^`{|}') else _split("")
            schemes = ("https", urlsplit(self.endpoint).scheme)
            if parts.scheme in schemes and parts.hostname and "@" not in parts.netloc:
                return str(url)
        raise ExportError("the hub names an address that nothing can be sent to", GO_ON)

    def is_own(self, url: str) -> bool:
        """Whether an address is the hub's: the token goes nowhere else."""
        return _origin(url) == _origin(self.endpoint)

    def _tried(self, method: str, url: str, headers: Mapping[str, str], content: bytes | Chunks, once: bool) -> Answer:
        for wait in (*(() if once else WAITS), None):
            answer, why = self._one(method, url, headers, content)
            if answer is not None and answer.status not in _AGAIN:
                return answer
            asked = answer.headers.get("retry-after", "") if answer is not None else ""
            seconds = float(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 0.0
            if seconds > LONGEST_WAIT:
                minutes = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
                raise ExportError(f"the hub asks to wait ({why})", f"wait {minutes}, then {GO_ON}")
            if wait is None and answer is not None:
                raise ExportError(f"the hub cannot do it now ({why})", f"wait a little, then {GO_ON}")
            if wait is None:
                raise ExportError(f"the hub cannot be reached ({why})", f"check the network, then {GO_ON}")
            self.repeated[why] = self.repeated.get(why, 0) + 1
            time.sleep(max(wait, seconds))
        raise AssertionError("the last try has no wait behind it")

    def _one(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | Chunks
    ) -> tuple[Answer | None, str]:
        """The answer, or None, and why another try is due where one is."""
        from huggingface_hub.utils import get_session

        head = {"user-agent": f"qlora/{__version__}", "accept-encoding": "identity", **headers}
        # Any class: what a proxy's or a store's address is made of is judged by libraries below huggingface_hub.
        with (
            foreign_failures() as failure,
            get_session().stream(
                method,
                url,
                headers=head,
                content=content if isinstance(content, bytes) else content(),
                timeout=WAIT_SECONDS,
                follow_redirects=False,
            ) as got,
        ):
            body, began = bytearray(), time.monotonic()
            for part in got.iter_raw():
                body += part
                if len(body) > MAX_ANSWER_BYTES:
                    raise ExportError("the hub's answer is larger than any of its own", GO_ON)
                if time.monotonic() - began > ANSWER_SECONDS:
                    raise ExportError("the hub's answer takes too long", GO_ON)
            names = {str(name).lower(): str(value) for name, value in got.headers.items()}
            return Answer(int(got.status_code), names, bytes(body)), f"it answers {got.status_code}"
        # The error's text may quote a proxy's address with the password in it: of that one word is looked for.
        word = ", certificate" if "certificate" in str(failure.error).lower() else ""
        return None, f"{type(failure.error).__name__}{word}"


def given_headers(given: Mapping[str, Any]) -> dict[str, str]:
    """Headers that the hub gives for a request to a store, in small letters. Raises ExportError for what is none.

    Left out is what describes the message and who sends it: that is said by who sends it.
    """
    found: dict[str, str] = {}
    for name, value in given.items():
        if not (_HEADER.fullmatch(name) and isinstance(value, str) and len(value) <= MAX_URL):
            raise ExportError("the hub asks for a header that no request can have", GO_ON)
        if not (value.isascii() and value.isprintable()):
            raise ExportError("the hub asks for a header that no request can have", GO_ON)
        if name.lower() not in (*_OF_MESSAGE, *_OF_CONNECTION):
            found[name.lower()] = value.strip()
    return found


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:  # no address
        return ""


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # is looked at, and may be no number
        return parts
    except ValueError:
        return urlsplit("")


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = _split(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
