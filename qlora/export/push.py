"""A push: exports go to a repository of models on the hub, private unless asked otherwise, in one commit at the end.

The destination is opened before anything long is done: who asks, whether the repository is there, whose files it
holds, who may read it. What needs a person's yes is asked there, and never taken for granted. What a push has sent is
known by a manifest in the repository: what it lists, and has not changed since, is ours to replace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from qlora import foreign_json, manifest
from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.export.artifacts import Artifact, ExportedArtifact
from qlora.export.cards import EXPORT_FILE
from qlora.export.leaks import Private
from qlora.export.merge.parts import MergeBase
from qlora.export.parcel import CARD, PublishedFolder, pack
from qlora.hub import check_pushable
from qlora.hub_calls import GO_ON, Calls
from qlora.hub_upload import Account, Held, ModelRepository, account
from qlora.manifest import MADE_BY, MANIFEST, sha256_text
from qlora.outgoing import Outgoing
from qlora.version import __version__

KIND = "push"
MAX_MANIFEST_BYTES = 1 << 22
_GIVEN_BY_HUB = (".gitattributes",)  # which every repository has from its beginning
_SHOWN = 3


@dataclass(frozen=True)
class Push:
    """Where exports are pushed to: `name` is owner/name, or a name alone for a repository of the user's own.

    `public`: everybody may read it. `ask` says yes or no to a question; without it, what needs a yes is refused.
    """

    name: str
    public: bool = False
    ask: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Pushed:
    """What came of a push: the repository's name and address, its commit, how many files and bytes were sent.

    `there_already` counts the files that it held already; where that is all of them, there is no new commit.
    """

    repository: str
    url: str
    commit: str
    public: bool
    files: int
    there_already: int
    sent_bytes: int


@dataclass(frozen=True)
class Contents:
    """What is to be pushed: the keys of its formats, and names of the runs or adapters that it is of."""

    keys: tuple[str, ...]
    adapters: frozenset[str]

    @classmethod
    def of(cls, folders: Sequence[PublishedFolder]) -> Contents:
        """Raises ExportError for two of one format: they would be one model's files beside another's."""
        for key, count in Counter(one.key for one in folders).items():
            if count > 1:
                places = ", ".join(str(one.path) for one in folders if one.key == key)
                raise ExportError(f"{count} are {key}, and a repository holds one: {places}", "push each to its own")
        return cls(tuple(dict.fromkeys(one.key for one in folders)), frozenset(one.adapter for one in folders))

    def marks(self) -> list[str]:
        """Of the adapters, a hash of each name: enough to know another, and no name of anything."""
        return sorted(sha256_text(KIND, name)[:16] for name in self.adapters)


@dataclass(frozen=True)
class Destination:
    """A repository that may be pushed to, as `open_destination` found it; `agreed` are others' files in it."""

    push: Push
    owner: Account
    repository: ModelRepository
    agreed: frozenset[str]

    def deliver(self, folders: Sequence[Path], sink: Sink) -> Pushed:
        """Send verified folders, and make them visible in one commit. Raises ExportError."""
        opened = [PublishedFolder.open(folder) for folder in folders]
        mails = [self.owner.email] if self.owner.email else []
        spared = (self.repository.name, *(one.base for one in opened if one.is_hubs))
        private = Private.of_owner(_surroundings(folders), mails, spared, self.repository.calls.token)
        items = pack(opened, private, self.repository.name, sink)
        held = self._ready()
        earlier = _earlier(self.repository, held).files
        if not _others(held, earlier) <= self.agreed:
            raise ExportError(f"{self.repository.name}: was changed by somebody else meanwhile", GO_ON)
        self.repository.modes([*items, Outgoing.of_bytes(MANIFEST, b"{}")])
        items.append(self._manifest(items, opened))
        hashes = {item.name: self.repository.hash_of(item) for item in items}
        new = [item for item in items if held.files.get(item.name) != hashes[item.name]]
        gone = sorted(name for name, known in earlier.items() if held.files.get(name) == known and name not in hashes)
        commit = held.commit or ""
        if new or gone:
            self.repository.upload(new, sink)
            self._check_who_reads(self.repository.look())  # hours may have passed
            message = f"{', '.join(Contents.of(opened).keys)}, pushed by qlora {__version__}"
            commit = self.repository.commit(new, gone, held.commit, message)
            self._check_arrived(hashes)
        if gone:
            sink.emit(Notice("push", "files of an earlier push are no longer in it; its history keeps them", len(gone)))
        self._say_repeated(sink)
        pushed = Pushed(
            self.repository.name,
            self.repository.url,
            commit,
            self.push.public,
            len(items),
            len(items) - len(new),
            self.repository.sent_bytes,
        )
        sink.emit(Notice("push", _in_words(pushed)))
        return pushed

    def _ready(self) -> Held:
        """The repository as it is now, made where it was not there. Nothing is sent into one that others may read."""
        held = self.repository.look()
        if held is None:
            made = self.repository.create(private=not self.push.public)
            if (held := self.repository.look()) is None and not made:
                what = f"{self.repository.name}: is there, and your token may not see it"
                raise ExportError(what, "give the token the right to it, or name another repository")
        if held is None:
            raise ExportError(f"{self.repository.name}: was made, and is not there", GO_ON)
        self._check_who_reads(held)
        return held

    def _check_who_reads(self, held: Held | None) -> None:
        """Raises ExportError where the repository is not as private, or as public, as it was asked for."""
        if held is not None:
            _check_visibility(self.repository.name, held, self.push.public)

    def _manifest(self, items: Sequence[Outgoing], folders: Sequence[PublishedFolder]) -> Outgoing:
        """The list of what was pushed, by which the next push knows what is ours."""
        entries = {
            item.name: {"sha256": item.sha256, "bytes": item.size, "held": self.repository.hash_of(item)}
            for item in items
        }
        contents = Contents.of(folders)
        of = {"keys": list(contents.keys), "adapters": contents.marks()}
        about = {"made_by": MADE_BY, "version": __version__, "kind": KIND, "of": of}
        return Outgoing.of_bytes(MANIFEST, manifest.sealed({**about, "files": entries}).encode())

    def _check_arrived(self, hashes: Mapping[str, str]) -> None:
        held = self.repository.look()
        lost = [name for name, known in hashes.items() if held is None or held.files.get(name) != known]
        if lost:
            raise ExportError(f"{self.repository.name}: does not hold {lost[0]} as it was sent", GO_ON)
        self._check_who_reads(held)

    def _say_repeated(self, sink: Sink) -> None:
        repeated = self.repository.calls.repeated
        if repeated:
            reasons = ", ".join(f"{why}: {count}" for why, count in repeated.items())
            sink.emit(Notice("hub", f"requests were made again ({reasons})", sum(repeated.values())))


def open_destination(push: Push, contents: Contents) -> Destination:
    """Whether and where `contents` may be pushed; changes nothing there. Raises ExportError."""
    check_pushable(push.name)
    calls = Calls.of_user()
    owner = account(calls)
    space, _, alone = push.name.rpartition("/")
    name = f"{owner.owners.get(space.lower(), space) if space else owner.name}/{alone}"
    check_pushable(name)
    if owner.may_write is False:
        hint = "make one that may write (https://huggingface.co/settings/tokens), then run: hf auth login"
        raise ExportError("your token for the hub may read only", hint)
    repository = ModelRepository(calls, name)
    held = repository.look()
    agreed: frozenset[str] = frozenset()
    if held is None:
        if owner.may_write and space and space.lower() not in owner.owners:
            what = f"{name}: {space} is neither you ({owner.name}) nor an organization of yours"
            raise ExportError(what, "name a repository of yours, or the name alone")
    else:
        _check_visibility(name, held, push.public)
        repository.modes([Outgoing.of_bytes(CARD, b"")])  # which is refused where the token may not write
        agreed = _agree_to_what_is_there(push, repository, held, contents)
    if push.public:
        _agree(push, f"{name} is public: everybody may read and copy the model", "Push it?", "leave out `public`")
    return Destination(push, owner, repository, agreed)


def _agree_to_what_is_there(push: Push, repository: ModelRepository, held: Held, contents: Contents) -> frozenset[str]:
    """Others' files that may be replaced, or stay. Raises ExportError where nobody agrees to what would go."""
    sent = _earlier(repository, held)
    earlier, name, new = sent.files, repository.name, ", ".join(contents.keys)
    agreed = frozenset(_others(held, earlier))
    if agreed:
        names = ", ".join(sorted(agreed)[:_SHOWN]) + (", …" if len(agreed) > _SHOWN else "")
        what = f"{name} holds {len(agreed)} files that no push of qlora made, or that were changed since ({names})"
        again = "Those of the same name will be replaced, and its history keeps them. Push into it?"
        _agree(push, what, again, "name another repository")
    lost = [key for key in sent.of.keys if key not in contents.keys]
    if earlier and not set(sent.of.adapters) & set(contents.marks()):
        what = f"{name} holds {', '.join(sent.of.keys)} of another run or adapter, pushed earlier"
        _agree(push, what, f"Replace it by {new}?", "name another repository")
    elif earlier and lost:
        what = f"{name} holds {', '.join(lost)} of an earlier push, which a push of {new} alone takes out"
        _agree(push, what, "Push it?", "export and push them together, or name another repository")
    return agreed


def _agree(push: Push, what: str, question: str, otherwise: str) -> None:
    """Raises ExportError where nobody says yes."""
    if push.ask is None:
        raise ExportError(what, f"say yes to it with `yes`, or {otherwise}")
    if not push.ask(f"{what}. {question}"):
        raise ExportError(f"{what}, and you did not agree", otherwise)


def _check_visibility(name: str, held: Held, public: bool) -> None:
    if public and held.private:
        hint = "make it public on its page (Settings), or leave out `public`"
        raise ExportError(f"{name}: is there and private, and a public one is asked for", hint)
    if not public and not held.private:
        hint = "make it private on its page (Settings), name another, or ask for it with `public`"
        raise ExportError(f"{name}: is there and public, and a push is private unless asked otherwise", hint)


def _others(held: Held, earlier: Mapping[str, str]) -> set[str]:
    """Files of a repository that no push made, or that were changed since."""
    ours = {name for name, known in earlier.items() if held.files.get(name) == known}
    return set(held.files) - ours - set(_GIVEN_BY_HUB) - ({MANIFEST} if earlier else set())


def made_before(artifacts: Sequence[Artifact], asked: str, sink: Sink) -> tuple[ExportedArtifact, ...]:
    """The artifacts where all of them are there already, whole and verified, of just what is asked for now; else none.

    `asked` is the hash of that which `pipeline.produce` was given then.
    """
    found = []
    for artifact in artifacts:
        standing = manifest.standing(artifact.folder, hashes=True)
        if (standing.whose, standing.kind) != ("ours", "export"):
            return ()
        try:
            PublishedFolder.open(artifact.folder)
            made = foreign_json.checked(_Made, manifest.read(artifact.folder), MANIFEST).of
            said = foreign_json.checked(_Said, foreign_json.load_object(artifact.folder / EXPORT_FILE), EXPORT_FILE)
        except (ExportError, foreign_json.ForeignFileError):
            return ()
        if made.asked != asked:
            return ()
        size = sum(entry.bytes for entry in manifest.recorded(artifact.folder).values())
        found.append(ExportedArtifact(artifact.key, artifact.folder, size, said.tensors, said.merged, said.merge_base))
    if found:
        sink.emit(Notice("push", "the export is there already, of just this request: it is not made again", len(found)))
    return tuple(found)


class _Of(foreign_json.ForeignModel):
    asked: str = ""


class _Made(foreign_json.ForeignModel):
    of: _Of


class _Said(foreign_json.ForeignModel):
    """Of export.json, what a report of the export has."""

    tensors: int
    merged: int
    merge_base: MergeBase | None = None


class _Entry(foreign_json.ForeignModel):
    held: str


class _Pushed(foreign_json.ForeignModel):
    keys: list[str] = Field(default_factory=list)
    adapters: list[str] = Field(default_factory=list)


class _Manifest(foreign_json.ForeignModel):
    kind: str
    of: _Pushed
    files: dict[str, _Entry]


class _Sent(NamedTuple):
    """What an earlier push sent: its files by their hashes there, and what they were of."""

    files: Mapping[str, str]
    of: _Pushed


def _earlier(repository: ModelRepository, held: Held) -> _Sent:
    """What an earlier push sent, by its manifest there; nothing where that is none of a push."""
    nothing = _Sent({}, _Pushed())
    if MANIFEST not in held.files or held.commit is None:
        return nothing
    text = repository.text_of(MANIFEST, held.commit, MAX_MANIFEST_BYTES)
    try:
        found = foreign_json.checked(_Manifest, manifest.of_text(text or b"", MANIFEST), MANIFEST)
    except foreign_json.ForeignFileError:
        return nothing
    return _Sent({name: one.held for name, one in found.files.items()}, found.of) if found.kind == KIND else nothing


def _surroundings(folders: Sequence[Path]) -> list[Path]:
    """Folders that the work lies in: the exports' own, the run's, what holds that, and where the command runs."""
    return [Path.cwd(), *(place for folder in folders for place in (folder, *folder.parents))]


def _in_words(pushed: Pushed) -> str:
    who = "public" if pushed.public else "private"
    if pushed.there_already == pushed.files:
        return f"{pushed.url} ({who}) holds all {pushed.files} files already, commit {pushed.commit[:12]}"
    size = f"{pushed.sent_bytes / 2**20:,.1f} MiB"
    there = f", {pushed.there_already} were there already" if pushed.there_already else ""
    return f"{pushed.url} ({who}): {pushed.files} files, {size} sent{there}, commit {pushed.commit[:12]}"
