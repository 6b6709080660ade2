"""The documents of a run as its base reads them: passages, the rows to expect, and the study that makes these."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora import disk, heap, processes, run_folder
from qlora.data.chat import ChatTokenizer
from qlora.data.documents.chunks import Passage, unique_passages
from qlora.data.prepare import PreparedData, PreparedSplit
from qlora.errors import DataError, TokenizerError
from qlora.events import Notice, Sink
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import SourceSection
from qlora.stop import StopRequest
from qlora.study import bm25, defaults, exam_questions, hold, plain_text, rows, thinking
from qlora.study.generation import MAX_THOUGHTS
from qlora.study.labels import Labels, labels_of
from qlora.study.material import FOLDER, STUDIED_FILE, Material, keeping
from qlora.study.prompts import FRAMES, WORDINGS, Frame, lead_ids, prompt_ids, prompts_for, served_ids
from qlora.study.records import Candidate, key_of
from qlora.study.room import Batches, Room, batches, room
from qlora.study.run_exam import RunExam
from qlora.study.study import Studied, StudySettings, study
from qlora.study.teacher import Teacher
from qlora.units import counted

if TYPE_CHECKING:
    from qlora.model.base_folder import BaseFolder

Phase = Callable[[str], AbstractContextManager[None]]  # time spent inside counts as the named phase's
QUESTION_TOKENS, ANSWER_TOKENS = 24, 16  # of a row, until rows are known: 195 tokens were 4 questions with answers
SPARE_BYTES = 512 << 20  # beside weights and keys: logits, workspace, the context of a GPU
HOLD_TOKENS = 64  # longest answer on other things
_LOOKED_AT = 100  # of the passages with most characters, one has most tokens


@dataclass(frozen=True)
class Learnt:
    """What a study of `passages` gave, the rows that are made of it, and the name of the base that gave it."""

    passages: tuple[Passage, ...]
    studied: Studied
    rows: list[rows.StudyRow]
    base: str

    def labels(self, key: str) -> Labels:
        """Those of a row, from the store. Raises DataError where they are gone."""
        found = self.studied.labels.get(key)
        if found is None:
            raise DataError(f"{self.studied.labels.path}: the labels of a row are gone", "go on with mode='fresh'")
        return found


@dataclass(frozen=True)
class Lesson:
    """What a base will be asked about, in which `frame` it answers when it is tuned, and with which settings."""

    recipe: Recipe
    chat: ChatTokenizer
    passages: tuple[Passage, ...]
    frame: Frame
    decides_length: bool
    documents: Mapping[str, str]  # sha256 of each, by its shown path

    @classmethod
    def of(cls, material: Material, recipe: Recipe, chat: ChatTokenizer, sink: Sink) -> Lesson:
        """Raises TokenizerError for hard labels without a chat template, DataError where nothing can be asked about."""
        has_template = chat.template is not None
        if not has_template and recipe.study.labels == "hard":
            what = 'the base has no chat template, and study.labels = "hard" makes rows of chats'
            hint = 'set model.chat_template = "chatml", or train on the text: [[data.train]] with format = "documents"'
            raise TokenizerError(what, hint)

        def count(text: str) -> int:
            return len(chat.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        limit = recipe.study.passage_tokens
        if material.passages is None:
            unlike, twice = unique_passages(material.documents.documents, count, limit)
        else:
            unlike, twice = list(material.passages), 0
        if not any(passage.sentences for passage in unlike):
            raise DataError("the documents hold no sentence to ask about", "add documents with text in them")
        sentences = sum(len(passage.sentences) for passage in unlike)
        message = f"{counted(len(unlike), 'passage')} of up to {limit} tokens, {counted(sentences, 'sentence')}"
        if twice:
            message += f"; {twice:,} passages stand twice and are asked about once"
        sink.emit(Notice("passages", message, len(unlike)))
        plain_text.tell(chat, (f"{one.about}\n{one.text}" for one in unlike), "the documents", sink)
        frame: Frame = "chat" if has_template else "lines"
        return cls(recipe, chat, tuple(unlike), frame, material.decides_length, material.hashes)

    @property
    def questions(self) -> int:
        """How many are going to be asked for training, at most."""
        return len(self.passages) * self.recipe.study.questions

    @property
    def batches(self) -> Batches:
        """What will be asked at once at most, in tokens of this base: see `room.batches`."""
        frames = FRAMES if self.frame == "chat" else ("lines",)
        empty = replace(max(self.passages, key=lambda passage: len(passage.text)), text="", about="")
        kinds = [
            prompts_for(language).ask(frame, empty, "", kind, wording)
            for language in {passage.language for passage in self.passages}
            for kind in self.recipe.study.kinds
            for wording in WORDINGS
            for frame in frames
        ]
        around = max(len(prompt_ids(self.chat, frame, text)) for frame in frames for text in kinds)
        longest = sorted((passage.text for passage in self.passages), key=len)[-_LOOKED_AT:]
        tokens = max(map(len, self.chat.tokenizer(longest, add_special_tokens=False, verbose=False)["input_ids"]))
        passage_tokens = min(tokens, self.recipe.study.passage_tokens)
        return batches(passage_tokens, around + QUESTION_TOKENS, thoughts=self._thoughts)

    @property
    def _thoughts(self) -> int:
        """How many tokens of thoughts may stand before an answer."""
        return MAX_THOUGHTS if self.frame == "chat" and thinking.may_think(self.chat) else 0

    def room(self, config: Any, free_bytes: int | None) -> Room:
        """What the study takes, with `free_bytes` beside the weights. `config`: of the base's text model."""
        return room(config, self.recipe.study.passage_tokens, self.questions, free_bytes, self._thoughts)

    def teacher(self, model: Any, device: Any, sink: Sink, stop: StopRequest, room_bytes: int | None) -> Teacher:
        """The base as the teacher, with as many prompts at once as fit into `room_bytes` (None: not known)."""
        free = None if room_bytes is None else room_bytes - SPARE_BYTES
        config = model.get_base_model().config.get_text_config()
        found = self.room(config, free)
        sink.emit(Notice("study", f"up to {self.questions:,} questions: {found.told()}", self.questions))
        return Teacher(model, self.chat, device, sink, stop, found.at_once)

    def foreseen(self, data: PreparedData) -> tuple[Recipe, PreparedData]:
        """The recipe and the data with the rows that are to be expected of the study: as many, and as long, as may be.

        No token of theirs is known: they are for counting alone.
        """
        study, source, limit = self.recipe.study, len(self.recipe.data.train), self.recipe.data.max_length
        around = len(self._prompt("a")) + len(self._lead) + QUESTION_TOKENS + ANSWER_TOKENS
        shown, held = rows.Shares(study.with_passage, study.hold).counts(self.questions)
        with_passage = around + (1 + rows.DISTRACTORS) * study.passage_tokens
        usual = [around] * self.questions + [with_passage] * shown + [around + HOLD_TOKENS] * held
        lengths = [limit, *(length for length in usual if length <= limit)]  # one as long as a row can be
        trained = [min(ANSWER_TOKENS, length) for length in lengths]
        before = data.train
        joined = PreparedSplit(
            rows=[],
            lengths=[*before.lengths, *lengths],
            trained=[*before.trained, *trained],
            wheres=[],
            sources=[*before.sources, *[source] * len(lengths)],
        )
        return self._with_source(Path(FOLDER)), replace(data, train=joined)

    def learn(
        self, teacher: Teacher, run_dir: Path, base: BaseFolder, data: PreparedData, phase: Phase
    ) -> tuple[Recipe, PreparedData, RunExam]:
        """Ask, answer, filter, and examine the untuned base; the recipe and the data to train with.

        What was done before is not done again. Raises StoppedBySignal and TrainingStopped, with what was asked kept.
        """
        folder = run_dir / FOLDER
        learnt = self.study(teacher, run_dir, phase)
        recipe = self._of_length(learnt.studied, run_dir, base.commit, teacher.sink)
        frames = (self.frame, learnt.studied.frame)
        exam = RunExam.of(folder, self.passages, recipe, (teacher, frames, learnt.base))
        if processes.of_run().size > 1:
            exam = replace(exam, learnt=learnt)
        with keeping(teacher.stop, folder), phase("exam"), heap.another_phase():
            exam.before()
        read = learnt.labels if recipe.study.labels == "soft" else None
        data = rows.with_rows_of(data, learnt.rows, len(recipe.data.train), read)
        return replace(self, recipe=recipe)._with_source(folder), data, exam

    def study(self, teacher: Teacher, run_dir: Path, phase: Phase) -> Learnt:
        """Ask, answer, filter, and write the rows. Raises as `learn` does."""
        folder, sink, stop = run_dir / FOLDER, teacher.sink, teacher.stop
        disk.make_folder(folder)
        weights = teacher.model.get_base_model().base_identity.model_dump()
        quantization = self.recipe.quantization.model_dump(mode="json")
        name = key_of(weights, quantization, *thinking.identity(self.chat, self.recipe))
        with keeping(stop, folder), phase("study"), heap.another_phase():
            studied = study(teacher, self.passages, self._settings(name), folder, sink, stop)
            made = self._rows(studied, teacher, name)
            rows.write(folder, made)
            exam_questions.save_passages(folder, self.passages)
            disk.write_atomic(
                folder / STUDIED_FILE, json.dumps(dict(self.documents), ensure_ascii=False, indent=1) + "\n"
            )
        teacher.tell_thoughts()
        message = f"{counted(len(made), 'row')} of the study: {folder / rows.ROWS_FILE}"
        sink.emit(Notice("rows", message, len(made)))
        return Learnt(self.passages, studied, made, name)

    def as_source(self, folder: Path) -> Recipe:
        """The recipe with the rows that were written into `folder` as one more source, none of them held out."""
        recipe = self._with_source(folder)
        if self.recipe.data.train:
            return recipe
        data = recipe.data.model_copy(update={"eval_fraction": 0.0})
        return recipe.model_copy(update={"data": data})

    def _with_source(self, folder: Path) -> Recipe:
        """The recipe with the study's rows as one more source of training."""
        source = SourceSection(path=str(folder / rows.ROWS_FILE), format="messages")
        data = self.recipe.data
        return self.recipe.model_copy(update={"data": data.model_copy(update={"train": (*data.train, source)})})

    def _of_length(self, studied: Studied, run_dir: Path, commit: str | None, sink: Sink) -> Recipe:
        """The recipe with its epochs by how often a sentence is asked about; once it trains, they stay."""
        if not self.decides_length or any((run_dir / "checkpoints").glob("step-*")):
            return self.recipe
        train = studied.split.train
        sentences = {(candidate.passage.key, candidate.question.sentence) for candidate in train}
        epochs = defaults.epochs(len(train), len(sentences))
        section = self.recipe.train.model_copy(update={"epochs": epochs, "max_steps": None})
        recipe = self.recipe.model_copy(update={"train": section})
        run_folder.write_recipe(run_dir, recipe, commit)
        message = (
            f"train.epochs = {epochs:g}: {len(sentences):,} sentences are met about {defaults.MEETINGS} times each"
        )
        sink.emit(Notice("documents", message))
        return recipe

    def _settings(self, base: str) -> StudySettings:
        section, exam = self.recipe.study, self.recipe.exam
        return StudySettings(
            questions=section.questions,
            kinds=section.kinds,
            sure=section.sure,
            probe=section.probe,
            max_minutes=section.max_minutes,
            exam_questions=exam.questions,
            left_out=exam.left_out,
            seed=self.recipe.train.seed,
            base=base,
        )

    def _rows(self, studied: Studied, teacher: Teacher, base: str) -> list[rows.StudyRow]:
        """All rows in their order; those over data.max_length are left out, with a notice."""
        section, seed = self.recipe.study, self.recipe.train.seed
        fresh, known = studied.split.train, studied.split.hold
        shown, held = rows.Shares(section.with_passage, section.hold).counts(len(fresh))
        made = [self._closed(candidate, studied) for candidate in fresh]
        order = rows.in_drawn_order([candidate.question.key for candidate in fresh], seed, "with_passage")
        search = bm25.Search(self.passages)
        made += [self._shown(fresh[at], studied, search) for at in sorted(order[:shown])]
        # What the base knows without a passage is as good to hold it by as anything else.
        order = rows.in_drawn_order([candidate.question.key for candidate in known], seed, "hold")
        made += [self._closed(known[at], studied) for at in sorted(order[:held])]
        wanted = held - min(held, len(known))
        others = list(self._held(wanted, studied, teacher, base))
        if len(others) < wanted:
            message = f"study.hold asks for {wanted:,} rows on other things: there are {len(others):,} prompts for them"
            teacher.sink.emit(Notice("rows", message, wanted - len(others)))
        made += others
        limit = self.recipe.data.max_length
        fitting = [row for row in made if row.length <= limit]
        if long := len(made) - len(fitting):
            teacher.sink.emit(Notice("rows", f"{long:,} rows of the study are over {limit} tokens: left out", long))
        if not fitting:
            raise DataError("no question of the study was good enough to be learnt", "see study/dropped.jsonl for why")
        return fitting

    def _closed(self, candidate: Candidate, studied: Studied) -> rows.StudyRow:
        asked = candidate.question.text
        return self._row(candidate, prompts_for(candidate.passage.language).closed(self.frame, asked), asked, studied)

    def _shown(self, candidate: Candidate, studied: Studied, search: bm25.Search) -> rows.StudyRow:
        """With the passage beside those that a search gives for the question."""
        own, asked = candidate.passage, candidate.question.text
        found = search.best(asked, own.language, 1 + rows.DISTRACTORS)
        shown = rows.among_others(own, found, self.recipe.train.seed, candidate.question.key)
        text = prompts_for(own.language).answer_from(self.frame, shown, asked)
        return self._row(candidate, text, text, studied)

    def _row(self, candidate: Candidate, prompt: str, asked: str, studied: Studied) -> rows.StudyRow:
        found = studied.labels.get(candidate.question.key)
        if found is None:
            raise DataError(f"the labels of {candidate.question.text!r} are gone", "go on with mode='fresh'")
        return self._made(asked, prompt, candidate.answer.text, (candidate.question.key, found))

    def _made(self, asked: str, prompt: str, answer: str, labelled: tuple[str, Labels]) -> rows.StudyRow:
        """A row of words that hold no special token; `labelled`: the answer's tokens, and the key of its labels."""
        key, found = labelled
        asked, answer = plain_text.plain(self.chat, asked), plain_text.plain(self.chat, answer)
        given = tuple(found.token_ids.tolist())
        return rows.StudyRow(asked, tuple(self._prompt(prompt)), answer, given, key, self._lead)

    def _prompt(self, text: str) -> list[int]:
        return served_ids(self.chat, self.frame, text)

    @property
    def _lead(self) -> tuple[int, ...]:
        return lead_ids(self.chat, self.frame)

    def _held(self, count: int, studied: Studied, teacher: Teacher, base: str) -> Iterator[rows.StudyRow]:
        """Prompts on other things as the base answers them."""
        language = exam_questions.language_of(self.passages)
        wanted = hold.prompts(language, count, self.recipe.train.seed)
        texts = [prompts_for(language).closed(self.frame, asked) for asked in wanted]
        keys = [key_of("hold", base, self.frame, text, HOLD_TOKENS) for text in texts]
        missing = [at for at, key in enumerate(keys) if key not in studied.labels]
        for start in range(0, len(missing), teacher.at_once):
            batch = missing[start : start + teacher.at_once]
            answers = teacher.greedy(self.frame, [texts[at] for at in batch], HOLD_TOKENS)
            given = [labels_of(written, teacher.chat.end_token_ids[0]) for written in answers]
            # What the limit ended does not end there.
            given = [one if written.ended else one.beginning() for one, written in zip(given, answers, strict=True)]
            studied.labels.append([(keys[at], one) for at, one in zip(batch, given, strict=True)])
        for asked, text, key in zip(wanted, texts, keys, strict=True):
            found = studied.labels.get(key)
            if found is not None and len(found.token_ids) > 1:
                answer = self.chat.tokenizer.decode(found.token_ids.tolist(), skip_special_tokens=True).strip()
                yield self._made(asked, text, answer, (key, found))
