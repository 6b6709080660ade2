"""What the model thought of each answer before the run: log-probabilities that objectives of preference compare with.

There is no second model. The reference is the base with its adapters off, or the adapter that the run began with
(`lora.from`), and each answer is asked about once, before the first step. What it says lies in `reference/` in the
run's folder, known by the base, the rows' tokens (and so by template and truncation), where the run began, and what its
numbers depend on; a run that goes on reads it there, and computes it again where any of these is another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from qlora import disk, heap, numerics, run_folder
from qlora.data import judged_splits
from qlora.data.layout import Layout
from qlora.data.loader import collate, eval_packs
from qlora.data.prepare import PreparedData, PreparedSplit
from qlora.errors import DataError, ModelError, RunFolderError
from qlora.events import Notice, Progress
from qlora.model import adapters
from qlora.model.tensors import read_file
from qlora.recipe.sections import DataSection
from qlora.saving import WRITE_ERRORS
from qlora.starting_adapter import START, started_from
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.objectives import answers_of
from qlora.training.dividing import Division
from qlora.training.memory_plan import MemorySettings
from qlora.training.setup import Job

FOLDER, FILE = "reference", "logprobs.safetensors"
PLAIN = ("sft", "grpo")  # whose rows show an answer; of answers that are drawn, the reference is asked then
CODE_VERSION = 1  # raise it whenever the numbers come out otherwise

Logprobs = dict[str, torch.Tensor]  # by the name of a split


class AskedOf(NamedTuple):
    """A split, and whether the model answers as it is, or with its adapters off."""

    name: str
    split: PreparedSplit
    as_it_is: bool


def prepared(
    job: Job, parts: CausalParts, section: DataSection, shares: Division, settings: MemorySettings
) -> PreparedData:
    """The rows as the objective needs them; `section` has packing as it is really done. Called before any weight of
    the run has changed, so that the model is where the run began. `shares`: other processes answer some of them.

    Raises DataError for rows of another objective, RunFolderError where the start of the run is gone.
    """
    data, keys = job.data, job.recipe.train
    for split in (data.train, data.eval):
        if split.lengths and (split.preference is None) != (keys.objective in PLAIN):
            what = f'train.objective = "{keys.objective}" does not learn from rows of this format'
            raise DataError(what, 'name the format: "preference" for pairs, "kto" for marked answers; others for "sft"')
    if keys.objective in PLAIN:
        return data
    data = judged(data, section, keys.objective)
    if not keys.needs_reference:
        return data
    with job.clock.phase("checks"), heap.another_phase():
        return given(data, _Asked(job, parts, section, splits_of(data), shares, settings).logprobs())


def judged(data: PreparedData, section: DataSection, objective: str) -> PreparedData:
    """The rows as an objective of preference needs them, without what a reference says."""
    train, evaluation = (_of_objective(split, section, objective) for split in (data.train, data.eval))
    return replace(data, train=train, eval=evaluation)


def given(data: PreparedData, found: Logprobs) -> PreparedData:
    """These rows, with what the reference said."""
    return replace(data, train=_with(data.train, "train", found), eval=_with(data.eval, "eval", found))


def splits_of(data: PreparedData) -> dict[str, PreparedSplit]:
    """The splits that a reference is asked about, by name, in one order."""
    return {**_named("train", data.train), **_named("eval", data.eval)}


def told(data: PreparedData) -> Logprobs:
    """What the reference said of each split; nothing where there is none."""
    said = {name: split.preference and split.preference.reference for name, split in splits_of(data).items()}
    return {name: torch.tensor(one) for name, one in said.items() if one}


def answers(job: Job, parts: CausalParts, section: DataSection, asked: AskedOf, shares: Division) -> list[float]:
    """Log-probability of each answer of a split. A pack at a time: whatever fits later, these numbers stay the same;
    each is done by one process."""
    name, split, as_it_is = asked
    done = 0
    packs, layout = eval_packs(split, section), Layout.on(job.device)

    def answered(pack: tuple[int, ...]) -> torch.Tensor:
        nonlocal done
        job.stop.check()
        batch = collate(split, [pack], job.chat.pad_id, section.max_length, layout).to(job.device)
        said = answers_of(batch_logprobs(parts, batch), batch).logprobs_R
        done += 1
        job.sink.emit(Progress(f"reference: {name}", done, len(packs)))
        return said

    found = [0.0] * len(split.lengths)
    with evaluating(job.model), nullcontext() if as_it_is else job.model.disable_adapter():
        for pack, said in zip(packs, shares.shared(packs, answered), strict=True):
            for row, value in zip(pack, said.tolist(), strict=True):
                found[row] = value
    return found


@contextmanager
def as_it_began(job: Job) -> Iterator[bool]:
    """Inside the block the model is what the run began with, behind it what it was; False where that is not known."""
    start = job.run_dir / START
    if job.recipe.lora.from_adapter is None:
        with job.model.disable_adapter():
            yield True
    elif disk.verify_folder(start) is not None:
        yield False
    else:
        with afterwards_as_now(job.model):
            adapters.load_into(job.model, start)
            yield True


@contextmanager
def afterwards_as_now(model: Any) -> Iterator[None]:
    """Behind the block the adapters are what they were before it."""
    trained = adapters.trainable(model)
    now = {key: parameter.detach().clone() for key, parameter in trained.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(now[key])


def _of_objective(split: PreparedSplit, section: DataSection, objective: str) -> PreparedSplit:
    split = judged_splits.with_packing(split, section.packing)
    if objective != "kto" or len(split.lengths) < 2 or split.preference is None:
        return split
    return replace(split, preference=split.preference._replace(others=judged_splits.mismatched(split)))


def _named(name: str, split: PreparedSplit) -> dict[str, PreparedSplit]:
    """The splits to ask about: that of the rows, and KTO's other one."""
    others = None if split.preference is None else split.preference.others
    return {f"{name}{end}": one for end, one in (("", split), ("_others", others)) if one is not None and one.lengths}


def _with(split: PreparedSplit, name: str, found: Logprobs) -> PreparedSplit:
    if split.preference is None or name not in found:
        return split
    others = split.preference.others
    if others is not None and others.preference is not None:
        told = others.preference._replace(reference=found[f"{name}_others"].tolist())
        others = replace(others, preference=told)
    return replace(split, preference=split.preference._replace(reference=found[name].tolist(), others=others))


@dataclass(frozen=True)
class _Asked:
    job: Job
    parts: CausalParts
    section: DataSection
    splits: dict[str, PreparedSplit]
    shares: Division
    settings: MemorySettings

    def logprobs(self) -> Logprobs:
        """From the run's folder where they are of this very question; else asked for, and put there."""
        folder, key = self.job.run_dir / FOLDER, self._key()
        if (kept := self._kept(folder, key)) is not None:
            return kept
        if self.job.recipe.lora.from_adapter is not None and disk.verify_folder(self.job.run_dir / START) is not None:
            what = f"{self.job.run_dir / START}: the adapter that the run compares with is gone or changed"
            raise RunFolderError(what, "put it back to go on, or start anew with mode='fresh'")
        found = {name: torch.tensor(self._asked(name)) for name in self.splits}
        try:
            about = {"kind": FOLDER, "key": key}
            made = disk.publish_folder(folder, lambda place: save_file(found, place / FILE), about)
            if made.aside is not None:
                self._say(f"what was in its place had been changed; {run_folder.kept(made.aside)}")
        except WRITE_ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            self._say(f"{folder} cannot be written ({reason}): a resumed run asks the reference again")
        return found

    def _say(self, message: str) -> None:
        self.job.sink.emit(Notice("reference", message))

    def _key(self) -> str:
        """Of all that the numbers follow from."""
        run, began = numerics.of_run(), started_from(self.job.recipe, self.job.run_dir)
        made_by = {
            "code": CODE_VERSION,
            "base": self._identity(),
            "quantization": self.job.recipe.quantization.model_dump(mode="json"),
            "start": began and began.sha256,
            "rows": self.job.data.content_fingerprint,
            "splits": {name: len(split.lengths) for name, split in self.splits.items()},
            "layout": [self.section.max_length, self.section.packing],
            "numerics": run and run.model_dump(exclude={"head_block"}),
            "head_block": self.parts.head_block,  # known where the head is; a run that begins leaves it to that
        }
        return disk.sha256_text(json.dumps(made_by, sort_keys=True))

    def _identity(self) -> str:
        identity = self.job.model.get_base_model().base_identity
        return str(identity.content or identity.sampled)

    def _kept(self, folder: Path, key: str) -> Logprobs | None:
        if not folder.exists():
            return None
        try:
            damage = disk.verify_folder(folder)
            if damage is None and disk.read_manifest(folder).get("key") != key:
                damage = "it is of another base, of other rows, or computed otherwise"
            found = {} if damage is not None else read_file(folder / FILE)
        except (ModelError, OSError) as error:
            damage, found = str(error), {}
        fits = {name: (len(split.lengths),) for name, split in self.splits.items()}
        if damage is None and {name: tuple(one.shape) for name, one in found.items()} == fits:
            self._say(f"log-probabilities of {sum(shape[0] for shape in fits.values())} answers read from {folder}")
            return found
        self._say(f"{folder} is not read ({damage or 'it has other rows'}): the reference is asked again")
        return None

    def _asked(self, name: str) -> list[float]:
        as_it_is = self.job.recipe.lora.from_adapter is not None
        word = {"do": "reference", "split": name, "as_it_is": as_it_is}
        with self.shares.called(word, self.settings):
            asked = AskedOf(name, self.splits[name], as_it_is)
            return answers(self.job, self.parts, self.section, asked, self.shares)
