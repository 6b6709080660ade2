"""Which rewards a run has, the files that they come from, and what the run keeps of them.

A recipe names built-in ones alone; functions in Python are given by whoever starts the run, each time. The bytes that
are run are those that were hashed, and a run goes on with the same ones or not at all: an answer's worth is part of
what is learned.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from qlora import disk, files, foreign_json, grpo_keys
from qlora.errors import RewardError
from qlora.recipe.sections import TrainSection
from qlora.run_record import relocated

MAX_FILE_BYTES = 1_000_000  # of a function's file, or a schema
MAX_FUNCTIONS = 32
RECORD_FILE = "rewards.json"
_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_FUNCTION_HINT = "for example `rewards` rewards.py:score, where rewards.py has def score(completions, rows): …"


@dataclass(frozen=True)
class RewardSource:
    """A reward by its name. `path`: the file that it comes from, whose bytes are `data`; `function`: which of a
    Python file's; None: a schema. A built-in reward without a file has neither."""

    name: str
    path: Path | None = None
    function: str | None = None
    data: bytes = b""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, Field(max_length=5_000)]


class Kept(foreign_json.ForeignModel):
    """A reward of a run that comes from a file; `path` is where that lay."""

    name: Line
    path: Line
    sha256: Sha256


class Record(foreign_json.ForeignModel):
    """`rewards.json` of a run: its functions in their order, and its schemas."""

    made_by: Literal["qlora"]
    functions: Annotated[list[Kept], Field(max_length=MAX_FUNCTIONS)]
    schemas: Annotated[list[Kept], Field(max_length=MAX_FUNCTIONS)]


def reward_sources(train: TrainSection, functions: Sequence[str]) -> tuple[RewardSource, ...]:
    """The rewards of a recipe, then `functions`, each FILE:FUNCTION. Reads the files; runs nothing.

    Raises RewardError where there is none, a file cannot be read, or `functions` are given to another objective.
    """
    if train.objective != "grpo":
        if functions:
            what = f'`rewards` {functions[0]}: train.objective = "{train.objective}" draws no answers to be judged'
            raise RewardError(what, 'leave it out, or set objective = "grpo" under [train]')
        return ()
    found = tuple(map(_built_in, train.rewards)) + tuple(map(_function, functions))
    if not found:
        what = 'train.objective = "grpo" has no reward, so no answer is better than another'
        hint = 'set rewards = ["exact_match"] under [train], or name a function: `rewards` rewards.py:score'
        raise RewardError(what, hint)
    if len(functions) > MAX_FUNCTIONS or len({one.name for one in found}) < len(found):
        what = f"`rewards`: more than {MAX_FUNCTIONS} functions, or one of them twice"
        raise RewardError(what, "give each function once")
    if train.reward_weights is not None and len(train.reward_weights) != len(found):
        what = f"train.reward_weights has {len(train.reward_weights)} numbers for {len(found)} rewards"
        raise RewardError(what, f"give one for each: {', '.join(one.name for one in found)}")
    return found


def of_run(train: TrainSection, functions: Sequence[str], goes_on: Path | None = None) -> tuple[RewardSource, ...]:
    """`reward_sources`; of the run in `goes_on`, those that it began with. Raises RewardError."""
    if goes_on is not None and train.objective == "grpo":
        check_given(goes_on, functions)
    found = reward_sources(train, functions)
    if goes_on is not None:
        check_record(goes_on, found)
    return found


def _built_in(name: str) -> RewardSource:
    file = grpo_keys.schema_file(name)
    if file is None:
        return RewardSource(name)
    path = files.user_path(file, "train.rewards")
    data = _bytes_of(path, f"train.rewards: {path}")
    try:
        schema = foreign_json.parse(data, str(path))
    except foreign_json.ForeignFileError as error:
        raise RewardError(f"train.rewards: {error}", "write a JSON schema into it") from error
    if not isinstance(schema, dict | bool):
        raise RewardError(f"train.rewards: {path}: is no JSON schema, which is an object", 'begin with {"type": …}')
    return RewardSource(f"{grpo_keys.SCHEMA}{path.name}", path, None, data)


def _function(given: str) -> RewardSource:
    file, _, name = given.rpartition(":")
    if not file or not _IDENTIFIER.fullmatch(name) or not file.endswith(".py"):
        raise RewardError(f"`rewards` {given}: is not FILE.py:FUNCTION", _FUNCTION_HINT)
    path = files.user_path(file, "`rewards`")
    data = _bytes_of(path, f"`rewards` {file}")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise RewardError(f"`rewards` {file}: is not UTF-8 text", "save it as UTF-8") from error
    return RewardSource(f"{path.name}:{name}", path, name, data)


def _bytes_of(path: Path, named: str) -> bytes:
    try:
        return files.read_bytes(path, MAX_FILE_BYTES)
    except FileNotFoundError as error:
        raise RewardError(f"{named}: no such file", "check the path") from error
    except (OSError, files.UnsafePathError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise RewardError(f"{named}: cannot be read ({reason})", "name a file of its kind") from error


# --- what a run keeps -------------------------------------------------------------------------------------------------


def write_record(run_dir: Path, sources: Sequence[RewardSource]) -> None:
    """Of a run that has rewards of files or none: which they are, and the sha256 of each file."""
    if not sources:
        return
    kept = [
        (one, Kept(name=one.name, path=str(one.path), sha256=one.sha256)) for one in sources if one.path is not None
    ]
    record = Record(
        made_by="qlora",
        functions=[of for one, of in kept if one.function is not None],
        schemas=[of for one, of in kept if one.function is None],
    )
    disk.write_atomic(run_dir / RECORD_FILE, record.model_dump_json(indent=1) + "\n")


def check_given(run_dir: Path, functions: Sequence[str]) -> None:
    """Whether these functions are those that the run in `run_dir` began with, by their names. Raises RewardError."""
    record = _record(run_dir)
    began = [kept.name for kept in record.functions] if record else []
    given = [f"{Path(file).name}:{name}" for file, _, name in (one.rpartition(":") for one in functions)]
    if record is None or given == began:
        return
    places = [(relocated(kept.path, run_dir), kept.name.rpartition(":")[2]) for kept in record.functions]
    typed = " ".join(f"`rewards` {place}:{name}" for place, name in places)
    theirs, ours = ", ".join(began) or "no function", ", ".join(given) or "none"
    what = f"{run_dir}: its answers are judged by {theirs}, and {ours} is given"
    if not began:
        raise RewardError(what, "leave `rewards` out to go on with it, or start anew with mode='fresh'")
    raise RewardError(what, f"functions are named each time, so that no recipe runs code: mode='resume' {typed}")


def check_record(run_dir: Path, sources: Sequence[RewardSource]) -> None:
    """Whether the files are those that the run in `run_dir` began with. Raises RewardError."""
    record = _record(run_dir)
    if record is None or not sources:
        return
    functions = [one for one in sources if one.function is not None]
    schemas = [one for one in sources if one.path is not None and one.function is None]
    for kept, one in (*zip(record.functions, functions, strict=False), *zip(record.schemas, schemas, strict=False)):
        if one.sha256 != kept.sha256:
            what = f"{one.path}: has changed since the run began (sha256 {kept.sha256[:12]}…, now {one.sha256[:12]}…)"
            raise RewardError(what, "put it back as it was to go on, or start anew with mode='fresh'")


def _record(run_dir: Path) -> Record | None:
    """What the run kept; None of one that had not begun, or has no rewards. Raises RewardError."""
    file = run_dir / RECORD_FILE
    if not file.exists():
        return None
    try:
        return foreign_json.checked(Record, foreign_json.load(file), str(file))
    except foreign_json.ForeignFileError as error:
        what = f"{error}: which rewards the run began with is not known"
        raise RewardError(what, "start anew with mode='fresh'") from error
