"""What GRPO does before a step: ask the model its rows' questions, several times each, and judge what it answers.

Random numbers of an answer follow from the seed, the step, the row's place in the step and the answer's number, so that
a run which was killed between drawing and update draws the same again. How many are drawn at once is part of the run's
state like the size of its micro-batches: a row's numbers depend on its neighbours' to the last bit. With several steps
on a drawing, a run that goes on between them reads the answers back (`generations.py`): the model has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from qlora import files
from qlora.batch import Batch
from qlora.data.layout import Layout
from qlora.data.token_cache import Prompt
from qlora.errors import DataError, RunFolderError
from qlora.events import Notice, Sink
from qlora.memory import asking
from qlora.model import generate, sampled
from qlora.recipe.sections import DataSection
from qlora.reward_events import Rewarded
from qlora.rewards.scoring import Rewards, row_of
from qlora.saving import WRITE_ERRORS
from qlora.starting_adapter import START
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.group_relative import GroupObjective, Seen, advantages_of, at_temperature, without_signal
from qlora.step.loss import Objective
from qlora.training import measuring, preferences, reference
from qlora.training.answered import Answer, AnsweredBatches
from qlora.training.checkpoint import RunState
from qlora.training.dividing import Word
from qlora.training.generations import FOLDER, Kept
from qlora.training.processes import Partners
from qlora.training.recovery import OomRecovery
from qlora.training.setup import Job
from qlora.training.step_batches import Pack

JUDGED_QUESTIONS = (
    32  # of the evaluation rows at least: their mean reward is known to 9 points (p = 0.5, one deviation)
)
STEPS_WITHOUT_SIGNAL = 5  # in a row, after which that is said


def of_run(
    job: Job, parts: CausalParts, objective: Objective, recovery: OomRecovery, partners: Partners
) -> Rollouts | None:
    """Of an objective that draws answers; None of any other."""
    if not isinstance(objective, GroupObjective):
        return None
    parts = replace(parts, transform=at_temperature(parts.transform, job.recipe.train.temperature))
    return Rollouts(job, parts, objective, recovery, partners)


def emit(drawn: Rollouts | None, objective: Objective, step: int, sink: Sink) -> None:
    """What the objective has seen of the step that was done; nothing of a supervised one."""
    if drawn is not None:
        drawn.emit(step)
    else:
        preferences.emit(objective, step, sink)


def try_longest(drawn: Rollouts | None, step: int) -> None:
    """A batch of answers as long as they may be, to the longest prompt; fewer at once where memory runs out in it."""
    if drawn is not None:
        drawn.recovery.run_generation(step, drawn.answer_the_longest)


class Rollouts:
    """The answers that the step under way learns from; `parts` give log-probabilities at their temperature.

    Of several processes each draws a part of them and looks at a part; process 0 alone judges, and hands them out.
    """

    def __init__(
        self, job: Job, parts: CausalParts, objective: GroupObjective, recovery: OomRecovery, partners: Partners
    ) -> None:
        self.job, self.parts, self.objective = job, parts, objective
        self.recovery, self.partners, self.train = recovery, partners, job.recipe.train
        wheres = job.data.train.wheres
        again = self.train.num_iterations > 1
        names = job.rewards.names if job.rewards else ()
        self.kept = Kept(job.run_dir, names, self._text, wheres.__getitem__, again)
        self.prompt_of = lru_cache(maxsize=1024)(self._prompt_ids)
        self._held: tuple[int, Sequence[Answer]] | None = None  # the step that they were drawn for
        self._told: Rewarded | None = None
        self._same_in_a_row = 0
        self._writes = True

    def over(self, section: DataSection) -> AnsweredBatches:
        """What steps read; `section` is the recipe's, with packing of evaluation rows as it is really done."""
        job, of_rows = self.job, (self.prompt_of, lambda _: self.answers)
        layout = Layout.of_run(job.device)
        self.batches = AnsweredBatches.of(job.data.train, section, self.train, job.chat.pad_id, layout, of_rows)
        return self.batches

    @property
    def rewards(self) -> Rewards:
        assert self.job.rewards is not None, "process 0 judges"
        return self.job.rewards

    @property
    def answers(self) -> Sequence[Answer]:
        assert self._held is not None, "a step before its answers"
        return self._held[1]

    def answer_the_longest(self) -> None:
        """For what it takes in memory: of the prompts to learn from, and of those that evaluation asks."""
        prompt = max([self.batches.longest_prompt, *(len(ids) for _, ids in self._questions)])
        rows, room = self.recovery.settings.answers_at_once, self.train.max_completion_length
        with evaluating(self.job.model):
            asking.ask(self.job.model, asking.Asked(rows, 0, prompt, room, drawn=1))

    # --- before a step -------------------------------------------------------------------------------------------

    def before(self, state: RunState, packs: Sequence[Pack]) -> RunState:
        """Have the answers to a step's rows: drawn now, or those of the steps before where these go on with them."""
        first = state.step - state.step % self.train.num_iterations
        if self._held is not None and self._held[0] == first:
            return state
        with self.job.clock.phase("generation"):
            found = self.kept.read(first, state.answers) if first < state.step else None
            if found is None:
                if first < state.step:
                    path = self.kept.path(first)
                    message = f"{path}: gone or changed: its rows are answered anew, by the model as it is now"
                    self._say(f"{message}; the run is not bit for bit the uninterrupted one")
                found = self._judged(self._drawn(state.step + 1, first, [row for (row,) in packs]))
                found = self._remembered(state.step + 1, found)
                state = replace(state, answers=self._keep(first, found))
        self.hold(first, found)
        self.partners.hand(first, found)
        self._told = self._figures(found)
        return state

    def hold(self, first: int, answers: Sequence[Answer]) -> None:
        """These are the answers of the steps from `first` on, which is counted from 0."""
        self._held = first, answers

    def _drawn(self, step: int, first: int, rows: Sequence[int]) -> list[Answer]:
        def work() -> list[Answer]:
            with self.partners.called({"do": "draw", "first": first, "rows": list(rows)}, self.recovery.settings):
                return self.draw(first, rows)

        return self.recovery.run_generation(step, work)

    def draw(self, first: int, rows: Sequence[int]) -> list[Answer]:
        """Answers to these rows for the step `first`: each batch of them is drawn by one process, and known to all."""
        asked = [(row, number) for row in rows for number in range(self.train.num_generations)]
        prompts = [self.prompt_of(row) for row, _ in asked]

        def drawn(members: Sequence[int], how: generate.Asked) -> list[list[float]]:
            names = [f"{self.train.seed}/{first}/{place}/answer" for place in members]
            texts = [prompts[place] for place in members]
            how = replace(how, max_new_tokens=max(self.batches.room_beside(len(text)) for text in texts))
            found = sampled.draw(self.job.model, texts, names, self.train.temperature, how)
            return [[one.ended, *one.token_ids, *one.logprobs] for one in found]

        answers, how = [], self._asked("draw answers")
        said = measuring.in_batches(prompts, how, self.partners, drawn)
        for (row, number), prompt, (by_itself, *values) in zip(asked, prompts, said, strict=True):
            count, room = len(values) // 2, self.batches.room_beside(len(prompt))
            token_ids, logprobs = tuple(map(int, values[:count])), tuple(values[count:])
            ended = bool(by_itself) and count <= room
            answers.append(Answer(row, number, prompt, token_ids[:room], ended, logprobs[:room]))
        return answers

    def _judged(self, answers: Sequence[Answer]) -> list[Answer]:
        """With what each is worth, and its advantage."""
        prompts = [self._prompt(answer.row) for answer in answers]
        scores = self._scores([self._text(answer.token_ids) for answer in answers], prompts)
        totals = self.rewards.total(scores)
        advantages = advantages_of(totals, self.train)
        of_answers = zip(answers, zip(*scores, strict=True), totals, advantages, strict=True)
        return [replace(one, rewards=each, reward=total, advantage=gain) for one, each, total, gain in of_answers]

    def _remembered(self, step: int, answers: Sequence[Answer]) -> list[Answer]:
        """With the log-probabilities that the objective compares with."""
        answers = list(answers)
        if self.train.num_iterations > 1:
            found = self.recovery.run_forward(step, partial(self._asked_again, answers, {"as_it_is": True}))
            answers = [replace(one, old=values) for one, values in zip(answers, found, strict=True)]
        if self.train.needs_reference:
            with reference.as_it_began(self.job) as known:
                if not known:
                    what = f"{self.job.run_dir / START}: the adapter that the run compares with is gone or changed"
                    raise RunFolderError(what, "put it back to go on, or start anew with mode='fresh'")
                own_start = self.job.recipe.lora.from_adapter is not None  # it lies in process 0's folder
                word = {"as_it_is": own_start, "weights": own_start}
                found = self.recovery.run_forward(step, partial(self._asked_again, answers, word))
            answers = [replace(one, reference=values) for one, values in zip(answers, found, strict=True)]
        return answers

    def _asked_again(self, answers: Sequence[Answer], word: Word) -> list[tuple[float, ...]]:
        """With the model as it is here; `word` says how the others have it so."""
        with self.partners.called({"do": "recall", **word}, self.recovery.settings):
            return self.logprobs(answers)

    def logprobs(self, answers: Sequence[Answer]) -> list[tuple[float, ...]]:
        """Of each answer's tokens, as the step computes them; empty for answers that are not learned from. Each
        micro-batch is looked at by one process."""

        def said(batch: Batch) -> Tensor:
            self.job.stop.check()
            return batch_logprobs(self.parts, batch.to(self.job.device)) if batch.trained_T.numel() else torch.empty(0)

        with evaluating(self.job.model):
            batches = self.batches.batches_of(answers, self.recovery.settings.micro_batch_size)
            values = [value for one in self.partners.shared(batches, said) for value in one.tolist()]
        found: list[tuple[float, ...]] = []
        start = 0
        for answer in answers:
            count = len(answer.token_ids) if self.batches.weight_of(answer) else 0
            found.append(tuple(values[start : start + count]))
            start += count
        return found

    def _keep(self, first: int, answers: Sequence[Answer]) -> str | None:
        try:
            return self.kept.write(first, answers)
        except (*WRITE_ERRORS, files.UnsafePathError) as error:
            reason = getattr(error, "strerror", None) or error
            if self._writes:
                self._say(f"{self.job.run_dir / FOLDER} cannot be written ({reason}): answers are not kept")
            self._writes = False
            return None

    # --- what is told of it --------------------------------------------------------------------------------------

    def emit(self, step: int) -> None:
        """Of the step that was done."""
        assert self._told is not None
        seen = Seen.of(self.objective.seen) if self.objective.seen else Seen(0.0, 0.0, 0.0, 0.0)
        count = max(seen.tokens, 1.0)
        kl = seen.kl / count if self.train.needs_reference else None
        told = replace(self._told, step=step, kl=kl, clipped=seen.clipped / count, mismatch=seen.mismatch / count)
        self.job.sink.emit(told)
        self._same_in_a_row = self._same_in_a_row + 1 if told.without_signal == 1 else 0
        if self._same_in_a_row == STEPS_WITHOUT_SIGNAL:
            message = (
                f"in the last {STEPS_WITHOUT_SIGNAL} steps all answers to a row were worth the same, and nothing was "
                "learned of them: rewards must tell answers apart (more num_generations, a higher temperature, another "
                'reward, or objective = "sft" first)'
            )
            self._say(message)

    def _figures(self, answers: Sequence[Answer]) -> Rewarded:
        rewards = [answer.reward for answer in answers]
        silent = without_signal(rewards, self.train.num_generations)
        told = self._told_of([one.rewards for one in answers], rewards, [len(one.token_ids) for one in answers])
        cut = sum(not answer.ended for answer in answers) / len(answers)
        return replace(told, cut=cut, without_signal=silent * self.train.num_generations / len(answers))

    def _told_of(self, each: Sequence[Sequence[float]], rewards: Sequence[float], tokens: Sequence[int]) -> Rewarded:
        count = len(rewards)
        by_name = {
            name: sum(values) / count for name, values in zip(self.rewards.names, zip(*each, strict=True), strict=True)
        }
        return Rewarded(0, False, count, sum(rewards) / count, by_name, sum(tokens) / count, 0.0)

    def judged(self, step: int) -> Rewarded | None:
        """What greedy answers to the first questions of the evaluation rows are worth; None where none is asked."""
        if not self._questions:
            return None

        def work() -> list[list[int]]:
            with self.partners.called({"do": "judge"}, self.recovery.settings):
                return self.answer_questions()

        answers = self.recovery.run_generation(step, work)
        scores = self._scores([self._text(answer) for answer in answers], [prompt for prompt, _ in self._questions])
        cut = [len(answer) == self.train.max_completion_length for answer in answers]
        tokens = [len(answer) + (not short) for answer, short in zip(answers, cut, strict=True)]
        told = self._told_of(list(zip(*scores, strict=True)), self.rewards.total(scores), tokens)
        return replace(told, step=step, evaluated=True, cut=sum(cut) / len(cut))

    def answer_questions(self) -> list[list[int]]:
        """Greedy answers to them, of all processes."""
        ids = [ids for _, ids in self._questions]
        return measuring.greedy(self.job.model, ids, self._asked("answer"), self.partners)

    @cached_property
    def _questions(self) -> list[tuple[Prompt, tuple[int, ...]]]:
        """Of the evaluation rows, the first that ask something; and their tokens."""
        split, chat = self.job.data.eval, self.job.chat
        most = max(JUDGED_QUESTIONS, self.job.recipe.eval.exact_match_rows)
        found: list[tuple[Prompt, tuple[int, ...]]] = []
        for row in range(len(split.lengths)):
            if len(found) < most and (prompt := split.prompt(row)) is not None:
                found.append((prompt, tuple(chat.prompt_ids(prompt.messages, prompt.tools))))
        return found

    # --- words and tokens ----------------------------------------------------------------------------------------

    def _asked(self, task: str) -> generate.Asked:
        told = measuring.Told(self.job.stop.check, self.job.sink)
        at_once = self.recovery.settings.answers_at_once
        return measuring.asked_of(self.job.chat, self.train.max_completion_length, at_once, told, task)

    def _scores(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[list[float]]:
        texts, rows = zip(*(row_of(one.messages, one.expected, one.columns) for one in prompts), strict=True)
        return self.rewards.score(texts, completions, rows)

    def _prompt(self, row: int) -> Prompt:
        split = self.job.data.train
        if (prompt := split.prompt(row)) is None:
            what = f'{split.wheres[row]}: asks nothing that could be answered, which train.objective = "grpo" needs'
            raise DataError(what, "give it a question and its right answer, or leave it out")
        return prompt

    def _prompt_ids(self, row: int) -> tuple[int, ...]:
        prompt = self._prompt(row)
        return tuple(self.job.chat.prompt_ids(prompt.messages, prompt.tools))

    def _text(self, token_ids: Sequence[int]) -> str:
        return str(self.job.chat.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _say(self, message: str) -> None:
        self.job.sink.emit(Notice("rewards", message))
