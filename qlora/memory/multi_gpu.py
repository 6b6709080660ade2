"""The cards of one run: what each must hold, how the packs of a step are shared, and tokens a second of all.

Each process holds the whole base with its adapters (or, with `memory.shard_weights`, a part of every layer), so that a
card's estimate is that of a run on it alone, and what the exchange takes. Cards of one kind share a plan, by the one
that has least free. Where dropout or noise is drawn, all cards compute micro-batches of the size that the smallest can
hold: what is drawn follows from a micro-batch's number, and so does not depend on how many cards there are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from qlora import device, ranks
from qlora.dealing import Cut, Shares, dealt, relative
from qlora.errors import DoesNotFit
from qlora.memory import hardware, host, links, overheads
from qlora.memory.card_names import of_this_machine
from qlora.memory.changes import changed, value_of
from qlora.memory.estimate import TYPICAL_BATCH, DataFacts, Estimate, Estimator
from qlora.memory.hardware import Machine, RunCard
from qlora.memory.plan import Plan, Planner, decided, does_not_fit
from qlora.ranks import Rank
from qlora.recipe.reading import Recipe
from qlora.recipe.sections import parse_bytes
from qlora.units import MIB

# NCCL keeps 10 MiB a channel and connection: 10,485,760 bytes an allocation in its own log (NVIDIA/nccl#1685), which
# are the three protocols' buffers; a ring has two connections whatever the number of cards, a tree up to three
# (NVIDIA/nccl#986). Cards without NVLink get two channels. As much again is its margin: not measured by us.
NCCL_CONNECTION_BYTES, NCCL_CONNECTIONS, NCCL_CHANNELS = 10 * MIB, 2 + 3, 2
NCCL_BYTES = NCCL_CONNECTION_BYTES * NCCL_CONNECTIONS * NCCL_CHANNELS
EXCHANGE = "exchange"  # the component's name
ROWS, SHARD = "train.micro_batch_size", "memory.shard_weights"


def this_rank() -> Rank:
    """What this process tells the others, before a base is loaded."""
    machine = hardware.this_machine()
    card = device.card() if machine.device_type == "cuda" else None
    if card is None:
        return Rank(name="cpu", on_card=False, total_bytes=0, free_bytes=machine.limit_bytes + host.held_bytes())
    taken = device.context_taken(device.current(), overheads.context_bytes(machine.gpu)[0])
    sizes = {"total_bytes": card.total_bytes, "free_bytes": machine.limit_bytes + taken}
    capability = 10 * card.capability[0] + card.capability[1]
    return Rank(name=card.name, on_card=True, capability=capability, host_bytes=machine.host_bytes, **sizes)


def cards_of(told: Sequence[Rank], own: Machine, limit: str) -> tuple[RunCard, ...]:
    """Those of all processes, of which process 0 runs on `own`; `limit` is `memory.limit`, which holds for each."""
    given = None if limit == "auto" else parse_bytes(limit)

    def machine(rank: Rank) -> Machine:
        if not rank.on_card:
            return own if rank.kind == told[0].kind else Machine("cpu", given or rank.free_bytes, rank.name)
        gpu = of_this_machine(rank.name, rank.total_bytes, rank.capability)
        source = "memory.limit" if given else f"free on {rank.name}"
        return Machine("cuda", given or rank.free_bytes, source, gpu, rank.host_bytes)

    machines = (own, *map(machine, told[1:]))
    return tuple(RunCard(rank.name, one) for rank, one in zip(told, machines, strict=True))


@dataclass(frozen=True)
class RankPlan:
    """One card of a run: `share` is of a step's tokens, `packs` of a step's packs."""

    name: str
    plan: Plan
    share: float
    packs: int

    def as_dict(self) -> dict[str, Any]:
        estimate = self.plan.estimate
        speed = round(estimate.tokens_per_second, 1)
        return {
            "card": self.name,
            "needed_bytes": estimate.needed_bytes,
            "peak_bytes": estimate.peak_bytes,
            "limit_bytes": estimate.limit_bytes,
            "components": dict(estimate.components),
            "fits": estimate.fits,
            "share": round(self.share, 4),
            "packs_of_step": self.packs,
            "tokens_per_second_alone": speed,
            "settings": dict(estimate.settings),
        }


@dataclass(frozen=True)
class MultiGpuPlan:
    """The plan of several cards. `exchange_seconds` is what adding up the gradients takes, once a step.

    `tokens_per_second` is of all together, 0 where no speed is known.
    """

    members: tuple[RankPlan, ...]
    shares: Shares
    batch_size: int
    exchange_bytes: int
    exchange_seconds: float
    tokens_per_second: float

    @property
    def sharded(self) -> bool:
        """Whether each keeps a part of every layer."""
        return any(one.plan.estimate.settings.get(SHARD) is True for one in self.members)

    @property
    def notes(self) -> tuple[str, ...]:
        lanes = (
            f"each card is taken to have {links.LANES_BESIDE_OTHERS} PCIe lanes of generation 4, as two slots share 16"
        )
        buffers = "what NCCL's buffers take is by its documentation, not measured"
        return (buffers, lanes) if self.exchange_bytes else ()

    @property
    def fits(self) -> bool:
        return all(one.plan.estimate.fits for one in self.members)

    def as_dict(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "batch_size": self.batch_size,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "gradient_bytes_exchanged": self.exchange_bytes,
            "exchange_seconds": round(self.exchange_seconds, 6),
            "sharded": self.sharded,
            "cards": [one.as_dict() for one in self.members],
            "reasons": [
                [number, key, why]
                for number, one in enumerate(self.members)
                if one.name not in {other.name for other in self.members[:number]}
                for key, why in one.plan.reasons.items()
            ],
            "notes": list(self.notes),
        }


class Estimators:
    """Of the cards of a run, by their processes' numbers: one for each kind, which `make` gives of the card that has
    least free of its kind. `exchanging`: what NCCL takes is still to come off their limits."""

    def __init__(self, cards: Sequence[RunCard], make: Callable[[Machine], Estimator], exchanging: bool = True) -> None:
        self.cards = tuple(cards)
        kinds = list(dict.fromkeys((card.name, card.machine.gpu) for card in cards))
        self.kinds = [
            tuple(number for number, card in enumerate(cards) if (card.name, card.machine.gpu) == kind)
            for kind in kinds
        ]
        of_kinds = [[cards[number].machine for number in kind] for kind in self.kinds]
        least = [min(machines, key=lambda one: one.limit_bytes) for machines in of_kinds]
        several = len(cards) > 1 and all(card.machine.gpu is not None for card in cards)
        self.exchange = NCCL_BYTES if several else 0
        self.margin = NCCL_BYTES if several and exchanging else 0
        taken = self.exchange + self.margin if exchanging else 0
        self._given_back = 0 if exchanging else self.exchange
        self.each = [make(replace(one, limit_bytes=max(0, one.limit_bytes - taken))) for one in least]

    def decided(self, recipe: Recipe, facts: DataFacts | None) -> list[Plan]:
        """Of each kind, with "auto" decided as a run does."""
        planned = recipe if facts else as_shared(recipe, len(self.cards))
        return self.alike([decided(one, planned, facts) for one in self.each], planned, facts)

    def alike(self, plans: list[Plan], recipe: Recipe, facts: DataFacts | None) -> list[Plan]:
        """What must be the same on all cards: whether they share layers, and the size of micro-batches where something
        is drawn for each."""
        if SHARD.partition(".")[2] in type(recipe.memory).model_fields:
            plans = self._with(plans, SHARD, any(value_of(plan.recipe, SHARD) is True for plan in plans), facts)
        if draws(recipe):
            plans = self._with(plans, ROWS, min(int(plan.estimate.settings[ROWS]) for plan in plans), facts)
        return plans

    def _with(self, plans: list[Plan], key: str, value: Any, facts: DataFacts | None) -> list[Plan]:
        """The same value of a key in all plans: where it is another, all that was open is decided anew around it."""
        found = []
        for one, plan in zip(self.each, plans, strict=True):
            if value_of(plan.recipe, key) != value and (value or value_of(plan.recipe, key) != "auto"):
                open_ = {name: "auto" for name in plan.reasons if name != key}
                again = decided(one, changed(plan.recipe, {**open_, key: value}), facts)
                changes = {**plan.changes, **again.changes, key: value}
                plan = replace(again, changes=changes, reasons={**again.reasons, key: "as another card needs it"})
            found.append(plan)
        return found

    def refuse(self, plans: Sequence[Plan], facts: DataFacts | None) -> None:
        """Raises DoesNotFit, with remedies, for a kind of card that cannot hold its part."""
        for kind, one, plan in zip(self.kinds, self.each, plans, strict=True):
            if not plan.estimate.fits:
                error = does_not_fit(Planner(one, facts), plan.recipe)
                raise error if len(self.kinds) == 1 else of_card(error, self.cards, kind)

    def whole(self, plans: Sequence[Plan], recipe: Recipe, batch: int, shares: Shares | None = None) -> MultiGpuPlan:
        """The plans put together for steps of `batch` packs: `plans` are of each kind, `shares` are others than follow
        from them."""
        shown = [self._shown(plan, card) for plan, card in zip(self.by_card(plans), self.cards, strict=True)]
        shares = shares or shares_of(shown, [card.name for card in self.cards])
        length = int(shown[0].estimate.settings.get("data.max_length", recipe.data.max_length))
        cut = dealt([length] * batch, shares)
        work = cut.work_of([length] * batch, len(shown))
        packs = [
            sum(len(part) for part, owner in zip(cut.parts, cut.owners, strict=True) if owner == number)
            for number in range(len(shown))
        ]
        gradient = 4 * self.each[0].values(recipe).adapter
        exchange = exchange_seconds(gradient, [card.machine for card in self.cards])
        members = tuple(
            RankPlan(card.name, plan, done / max(1, sum(work)), count)
            for card, plan, done, count in zip(self.cards, shown, work, packs, strict=True)
        )
        speeds = [plan.estimate.tokens_per_second for plan in shown]
        rounds = _rounds(cut, [length] * batch, speeds) if all(speeds) else []
        sharded = any(plan.estimate.settings.get(SHARD) is True for plan in shown)
        # Who shares layers waits at each for all that still compute; else everybody goes on alone.
        computing = (
            sum(map(max, zip_longest(*rounds, fillvalue=0.0))) if sharded else max(map(sum, rounds), default=0.0)
        )
        whole = sum(work) / (computing + exchange) if rounds else 0.0
        return MultiGpuPlan(members, shares, batch, gradient if self.exchange else 0, exchange, whole)

    def by_card(self, plans: Sequence[Plan]) -> list[Plan]:
        """Of each card, by the plans of the kinds."""
        found: dict[int, Plan] = {}
        for kind, plan in zip(self.kinds, plans, strict=True):
            found |= dict.fromkeys(kind, plan)
        return [found[number] for number in range(len(self.cards))]

    def _shown(self, plan: Plan, card: RunCard) -> Plan:
        """With what the exchange takes, and the whole limit of that card."""
        limit = card.machine.limit_bytes + self._given_back
        return replace(plan, estimate=with_exchange(plan.estimate, limit, self.exchange, self.margin))


def with_exchange(estimate: Estimate, limit: int, nbytes: int, margin: int) -> Estimate:
    """An estimate and what the exchange takes beside it, of a card's whole limit."""
    if not nbytes:
        return replace(estimate, limit_bytes=limit)
    return replace(
        estimate,
        limit_bytes=limit,
        peak_bytes=estimate.peak_bytes + nbytes,
        error_bytes=estimate.error_bytes + margin,
        components={**estimate.components, EXCHANGE: nbytes},
        phases={name: count + nbytes for name, count in estimate.phases.items()},
        terms={**estimate.terms, "nccl_buffers": nbytes},
    )


def draws(recipe: Recipe) -> bool:
    """Whether something is drawn for each micro-batch."""
    return recipe.lora.dropout > 0 or recipe.train.neftune_alpha > 0


def shares_of(plans: Sequence[Plan], names: Sequence[str]) -> Shares:
    """As predicted: what no step has measured yet. Cards of one kind share alike."""
    rows = tuple(int(plan.estimate.settings[ROWS]) for plan in plans)
    speeds = relative([plan.estimate.tokens_per_second for plan in plans])
    return Shares(rows=rows, speeds=speeds, cards=tuple(names))


def _rounds(cut: Cut, lengths: Sequence[int], speeds: Sequence[float]) -> list[list[float]]:
    """Of each card, the seconds of its micro-batches."""
    found: list[list[float]] = [[] for _ in speeds]
    for part, owner in zip(cut.parts, cut.owners, strict=True):
        found[owner].append(sum(lengths[place] for place in part) / speeds[owner])
    return found


def exchange_seconds(nbytes: int, machines: Sequence[Machine]) -> float:
    """To add up as many bytes of all cards: each sends and takes 2 (N - 1) / N of them in a ring (Patarasuk and Yuan
    2009), over the slowest link."""
    gpus = [machine.gpu for machine in machines if machine.gpu is not None]
    if len(gpus) < 2:
        return 0.0
    return 2 * (len(gpus) - 1) / len(gpus) * nbytes / links.between_bytes_per_second(gpus)


def of_card(error: DoesNotFit, cards: Sequence[RunCard], numbers: Sequence[int]) -> DoesNotFit:
    """The error of a kind of card, by name and by the numbers of its processes."""
    who = f"process {numbers[0]}" if len(numbers) == 1 else f"processes {', '.join(map(str, numbers))}"
    leave = "or leave that card out (CUDA_VISIBLE_DEVICES, and fewer processes)"
    what = f"{who} of {len(cards)}, {cards[numbers[0]].name}, cannot hold its part: {error.what}"
    return DoesNotFit(what, f"{error.hint}; {leave}")


def batch_of(recipe: Recipe) -> int:
    """Packs of a step, where no rows are known."""
    return TYPICAL_BATCH if recipe.train.batch_size == "auto" else recipe.train.batch_size


def as_shared(recipe: Recipe, count: int) -> Recipe:
    """Of one process: no micro-batch has more rows than its part of a step."""
    return changed(recipe, {"train.batch_size": -(-batch_of(recipe) // count)})


@dataclass(frozen=True)
class CardPlans:
    """The plans of a run's cards, of each kind one; `recipe` is the run's."""

    estimators: Estimators
    plans: tuple[Plan, ...]
    recipe: Recipe

    @property
    def differ(self) -> bool:
        """Whether there are cards of more than one kind."""
        return len(self.plans) > 1

    def as_event(self, batch: int) -> tuple[dict[str, Any], ...]:
        """What a plan says of each card: plain values."""
        return tuple(one.as_dict() for one in self.whole(batch).members)

    def whole(self, batch: int, shares: Shares | None = None) -> MultiGpuPlan:
        return self.estimators.whole(self.plans, self.recipe, batch, shares)


def planned(estimators: Estimators, recipe: Recipe, facts: DataFacts | None) -> CardPlans:
    """Of a run. Raises DoesNotFit, with remedies and the card's name."""
    plans = estimators.decided(recipe, facts)
    estimators.refuse(plans, facts)
    return CardPlans(estimators, tuple(plans), recipe)


def plans_of_run(estimator: Estimator, recipe: Recipe, facts: DataFacts | None) -> CardPlans | None:
    """Of the run under way, whose process 0 asks `estimator`; None where this process decides for itself alone. Raises
    as `planned` does."""
    if not (told := ranks.of_run()):
        return None

    def make(machine: Machine) -> Estimator:
        if machine.gpu != estimator.machine.gpu:
            return Estimator(estimator.text, estimator.name, machine)
        same = copy.copy(estimator)
        same.machine = machine
        return same

    cards = cards_of(told, estimator.machine, recipe.memory.limit)
    return planned(Estimators(cards, make, exchanging=False), recipe, facts)
