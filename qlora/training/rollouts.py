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

from qlora import files
from qlora.data.layout import Layout
from qlora.data.token_cache import Prompt
from qlora.errors import DataError, RunFolderError
from qlora.events import Notice, Progress, Sink
from qlora.model import generate, sampled
from qlora.recipe.sections import DataSection
from qlora.reward_events import Rewarded
from qlora.rewards.scoring import row_of
from qlora.saving import WRITE_ERRORS
from qlora.starting_adapter import START
from qlora.step.forward import CausalParts, batch_logprobs, evaluating
from qlora.step.group_relative import GroupObjective, Seen, advantages_of, at_temperature, without_signal
from qlora.step.loss import Objective
from qlora.training import preferences, reference
from qlora.training.answered import Answer, AnsweredBatches
from qlora.training.checkpoint import RunState
from qlora.training.generations import FOLDER, Kept
from qlora.training.recovery import OomRecovery
from qlora.training.setup import Job
from qlora.training.step_batches import Pack

JUDGED_QUESTIONS = (
    32  # of the evaluation rows at least: their mean reward is known to 9 points (p = 0.5, one deviation)
)
STEPS_WITHOUT_SIGNAL = 5  # in a row, after which that is said


def of_run(job: Job, parts: CausalParts, objective: Objective, recovery: OomRecovery) -> Rollouts | None:
    """Of an objective that draws answers; None of any other."""
    if not isinstance(objective, GroupObjective):
        return None
    parts = replace(parts, transform=at_temperature(parts.transform, job.recipe.train.temperature))
    return Rollouts(job, parts, objective, recovery)


def emit(drawn: Rollouts | None, objective: Objective, step: int, sink: Sink) -> None:
    """What the objective has seen of the step that was done; nothing of a supervised one."""
    if drawn is not None:
        drawn.emit(step)
    else:
        preferences.emit(objective, step, sink)


class Rollouts:
    """The answers that the step under way learns from; `parts` give log-probabilities at their temperature."""

    def __init__(self, job: Job, parts: CausalParts, objective: GroupObjective, recovery: OomRecovery) -> None:
        assert job.rewards is not None
        self.job, self.parts, self.objective, self.recovery = job, parts, objective, recovery
        self.train, self.rewards = job.recipe.train, job.rewards
        wheres = job.data.train.wheres
        again = self.train.num_iterations > 1
        self.kept = Kept(job.run_dir, self.rewards.names, self._text, wheres.__getitem__, again)
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
    def answers(self) -> Sequence[Answer]:
        assert self._held is not None, "a step before its answers"
        return self._held[1]

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
        self._held = first, found
        self._told = self._figures(found)
        return state

    def _drawn(self, step: int, first: int, rows: Sequence[int]) -> list[Answer]:
        asked = [(row, number) for row in rows for number in range(self.train.num_generations)]
        prompts = [self.prompt_of(row) for row, _ in asked]
        names = [f"{self.train.seed}/{first}/{place}/answer" for place in range(len(asked))]

        def work() -> list[sampled.Drawn]:
            how = self._asked("draw answers")
            return sampled.draw(self.job.model, prompts, names, self.train.temperature, how)

        drawn, answers = self.recovery.run_generation(step, work), []
        for (row, number), prompt, one in zip(asked, prompts, drawn, strict=True):
            room = self.batches.room_beside(len(prompt))
            ended = one.ended and len(one.token_ids) <= room
            answers.append(Answer(row, number, prompt, one.token_ids[:room], ended, one.logprobs[:room]))
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
            found = self.recovery.run_forward(step, partial(self._logprobs, answers))
            answers = [replace(one, old=values) for one, values in zip(answers, found, strict=True)]
        if self.train.needs_reference:
            with reference.as_it_began(self.job) as known:
                if not known:
                    what = f"{self.job.run_dir / START}: the adapter that the run compares with is gone or changed"
                    raise RunFolderError(what, "put it back to go on, or start anew with mode='fresh'")
                found = self.recovery.run_forward(step, partial(self._logprobs, answers))
            answers = [replace(one, reference=values) for one, values in zip(answers, found, strict=True)]
        return answers

    def _logprobs(self, answers: Sequence[Answer]) -> list[tuple[float, ...]]:
        """Of each answer's tokens, as the step computes them; empty for answers that are not learned from."""
        values: list[float] = []
        with evaluating(self.job.model):
            for batch in self.batches.batches_of(answers, self.recovery.settings.micro_batch_size):
                self.job.stop.check()
                if batch.trained_T.numel():
                    values += batch_logprobs(self.parts, batch.to(self.job.device)).tolist()
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
        prompts, ids = zip(*self._questions, strict=True)
        limit = self.train.max_completion_length

        def work() -> list[list[int]]:
            how = self._asked("answer")
            rest = (how.ends, limit, how.pad_id, how.batch_size, how.watch)
            return generate.greedy(self.job.model, ids, *rest)

        answers = self.recovery.run_generation(step, work)
        scores = self._scores([self._text(answer) for answer in answers], prompts)
        cut = [len(answer) == limit for answer in answers]
        tokens = [len(answer) + (not short) for answer, short in zip(answers, cut, strict=True)]
        told = self._told_of(list(zip(*scores, strict=True)), self.rewards.total(scores), tokens)
        return replace(told, step=step, evaluated=True, cut=sum(cut) / len(cut))

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
        chat = self.job.chat

        def watch(done: int, total: int) -> None:
            self.job.stop.check()
            self.job.sink.emit(Progress(task, done, total, "tokens"))

        at_once = self.recovery.settings.answers_at_once
        return generate.Asked(chat.end_token_ids, self.train.max_completion_length, chat.pad_id, at_once, watch)

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
