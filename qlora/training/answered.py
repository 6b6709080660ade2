"""Steps over answers that the model draws: which questions each step asks, and its answers as micro-batches.

A step asks `batch_size` rows, and each is answered `num_generations` times; with `num_iterations` over 1, so many steps
go over the same answers. Answers stand in rows of tensors of their own, one each: a micro-batch is so many answers.
What a step asks follows from its number alone, what is answered is put here before it (`rollouts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from qlora.batch import Batch
from qlora.data.chat import TokenRow
from qlora.data.layout import Layout
from qlora.data.loader import TrainOrder, collate
from qlora.data.prepare import PreparedSplit
from qlora.dealing import Cut
from qlora.events import Plan
from qlora.recipe.sections import DataSection, TrainSection
from qlora.step.group_relative import Known, token_weight
from qlora.training.memory_plan import MemorySettings
from qlora.training.step_batches import Pack, StepBatches


@dataclass(frozen=True)
class Answer:
    """One answer to a row, and what is known of it. T tokens, its end token among them where it `ended` by itself.

    `logprobs` are of its drawing, `reference` and `old` of the model as it was and as it drew, by the way of the step;
    empty where the objective reads none.
    """

    row: int
    number: int  # in its group
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ended: bool
    logprobs: tuple[float, ...]
    rewards: tuple[float, ...] = ()  # by each function
    reward: float = 0.0
    advantage: float = 0.0
    reference: tuple[float, ...] = ()
    old: tuple[float, ...] = ()


@dataclass(frozen=True)
class Order:
    """`TrainOrder`, whose steps are taken `times` times each."""

    once: TrainOrder
    times: int

    def epoch_packs(self, epoch: int) -> list[Pack]:
        return self.once.epoch_packs(epoch)

    def packs_of_step(self, step: int) -> list[Pack]:
        return self.once.packs_of_step(step // self.times)

    def epoch_of_step(self, step: int) -> float:
        part = step % self.times / self.times
        before, after = (self.once.epoch_of_step(step // self.times + more) for more in (0, 1))
        return before + part * (after - before)


@dataclass(frozen=True)
class AnsweredBatches:
    """As `StepBatches`, of answers: `answers_of` gives those that were drawn to the packs of a step."""

    questions: StepBatches  # a row each
    data: DataSection
    train: TrainSection
    prompt_of: Callable[[int], tuple[int, ...]]
    answers_of: Callable[[Sequence[Pack]], Sequence[Answer]]
    layout: Layout = field(default_factory=Layout)

    @classmethod
    def of(
        cls,
        split: PreparedSplit,
        data: DataSection,
        train: TrainSection,
        pad_id: int,
        layout: Layout,
        of_rows: tuple[Callable[[int], tuple[int, ...]], Callable[[Sequence[Pack]], Sequence[Answer]]],
    ) -> AnsweredBatches:
        alone = data.model_copy(update={"packing": False})
        made = cls(StepBatches.of(split, alone, train, pad_id), data, train, *of_rows)
        # Rows of the one width that layers are compiled for; else each micro-batch is as wide as it must be.
        return replace(made, layout=layout.steady([made.most_tokens]) if layout.fixed else layout)

    @property
    def order(self) -> Order:
        return Order(self.questions.order, self.train.num_iterations)

    @property
    def steps(self) -> int:
        return self.questions.steps * (1 if self.train.max_steps else self.train.num_iterations)

    @property
    def batch_size(self) -> int:
        """Answers of a step."""
        return self.questions.batch_size * self.train.num_generations

    @cached_property
    def _longest_row(self) -> int:
        """The row whose prompt is the longest: rows end with their own answer."""
        split = self.questions.split
        lengths = [length - trained for length, trained in zip(split.lengths, split.trained, strict=True)]
        return max(range(len(lengths)), key=lengths.__getitem__)

    @property
    def longest_prompt(self) -> int:
        """Its tokens."""
        return len(self.prompt_of(self._longest_row))

    @property
    def most_tokens(self) -> int:
        """Of a prompt and its answer."""
        return self.longest_prompt + self.room_beside(self.longest_prompt)

    def room_beside(self, prompt_tokens: int) -> int:
        """Tokens that an answer may have: prompt and answer share `data.max_length`."""
        return max(1, min(self.train.max_completion_length, self.data.max_length - prompt_tokens))

    def plan(self, now: MemorySettings, eval_rows: int, trainable_parameters: int, total_parameters: int) -> Plan:
        """What will happen, with the arithmetic."""
        made = self.questions.plan(now, eval_rows, trainable_parameters, total_parameters)
        asked, group, answers, micro = (
            self.questions.batch_size,
            self.train.num_generations,
            self.batch_size,
            now.micro_batch_size,
        )
        again = self.train.num_iterations
        times = f", {again} steps on each drawing" if again > 1 else ""
        arithmetic = (
            f"{made.packs} rows an epoch ÷ {asked} a step{times} = {self.questions.order.steps(1.0) * again} steps an "
            f"epoch; {asked} rows × {group} answers = {answers} a step = {math.ceil(answers / micro)} micro-batches of "
            f"{micro}"
        )
        return replace(
            made,
            accumulation=math.ceil(answers / micro),
            steps=self.steps,
            epochs=self.order.epoch_of_step(self.steps),
            arithmetic=arithmetic,
        )

    def longest(self, micro_batch_size: int) -> Batch:
        """A micro-batch of answers as long as they may be to the longest prompt."""
        prompt = self.prompt_of(self._longest_row)
        count = self.room_beside(len(prompt))
        nothing = (0.0,) * count
        ids = (self.questions.pad_id,) * count
        sides = [
            Answer(
                self._longest_row, n, prompt, ids, True, nothing, advantage=(-1.0) ** n, reference=nothing, old=nothing
            )
            for n in range(micro_batch_size)
        ]
        return self.batch(sides, micro_batch_size)

    def tokens(self, packs: Sequence[Pack]) -> int:
        """Prompts with each of their answers."""
        return sum(len(answer.prompt_ids) + len(answer.token_ids) for answer in self.answers_of(packs))

    def lengths(self, packs: Sequence[Pack]) -> list[int]:
        """Of each answer with its prompt: a cut is of answers."""
        return [len(answer.prompt_ids) + len(answer.token_ids) for answer in self.answers_of(packs)]

    def in_micro_batches(self, packs: Sequence[Pack], cut: Cut) -> list[Sequence[Pack]]:
        """Of each micro-batch, the rows that it answers."""
        rows = [answer.row for answer in self.answers_of(packs)]
        return [[(row,) for row in dict.fromkeys(rows[place] for place in part)] for part in cut.parts]

    def micro_batches(self, packs: Sequence[Pack], cut: Cut) -> list[Batch]:
        answers = self.answers_of(packs)
        parts = zip(cut.parts, cut.rows, strict=True)
        return [self.batch([answers[place] for place in part], rows) for part, rows in parts]

    def batches_of(self, answers: Sequence[Answer], micro_batch_size: int) -> list[Batch]:
        starts = range(0, len(answers), micro_batch_size)
        return [self.batch(answers[start : start + micro_batch_size], micro_batch_size) for start in starts]

    def batch(self, answers: Sequence[Answer], rows: int) -> Batch:
        """One micro-batch of a step whose micro-batches have `rows`."""
        weights = [self.weight_of(answer) for answer in answers]
        made = [
            TokenRow([*one.prompt_ids, *one.token_ids], [0.0] * len(one.prompt_ids) + [weight] * len(one.token_ids))
            for one, weight in zip(answers, weights, strict=True)
        ]
        lengths = [len(row.input_ids) for row in made]
        split = PreparedSplit(made, lengths, lengths, [""] * len(made), [0] * len(made))
        packs, layout = [(at,) for at in range(len(made))], self.layout.of_rows(rows, self.batch_size)
        batch = collate(split, packs, self.questions.pad_id, max(self.data.max_length, *lengths), layout)
        learnt = [one for one, weight in zip(answers, weights, strict=True) if weight]
        known = zip(*map(_known, learnt), strict=True) if learnt else [()] * len(Known._fields)
        drawn_KT = torch.tensor([[value for values in row for value in values] for row in known])
        signs_R = torch.tensor([one.advantage for one in answers]).sign()
        return replace(batch, drawn_KT=drawn_KT, signs_R=signs_R)

    def weight_of(self, answer: Answer) -> float:
        """Of each of its tokens; 0: nothing is learned from it."""
        masked = self.train.mask_truncated_completions and not answer.ended
        return 0.0 if masked else token_weight(len(answer.token_ids), self.train)


def _known(answer: Answer) -> tuple[Sequence[float], ...]:
    """The rows of `group_relative.Known`, of this answer's tokens."""
    none = (0.0,) * len(answer.token_ids)
    return [answer.advantage] * len(none), answer.logprobs, answer.reference or none, answer.old or none
