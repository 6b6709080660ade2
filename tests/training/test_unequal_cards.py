"""Processes whose cards differ: they end where one process does, by shares that are measured, kept and told.

Their speeds and their memory are given to them: a process's clock goes on by what it has computed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.dealing import Cut, Shares, dealt
from qlora.memory import multi_gpu
from qlora.memory.changes import changed
from qlora.memory.multi_gpu import ROWS, Estimators
from qlora.report.files import read_events
from qlora.training import sharing
from qlora.training.loop import Training
from qlora.training.processes import Partners
from tests.runs import hashes, run_dir, write_recipe
from tests.sampling import sampled
from tests.together import Hook, apart, masters, runs_out_at, stops_after, train

STEPS = 7
SETTINGS = (
    f"train.max_steps={STEPS}",
    "train.batch_size=8",
    "train.learning_rate=1e-3",
    'train.optimizer="adamw"',
    "data.max_length=96",
    "data.packing=false",
    "data.eval_fraction=0",
    "eval.samples=0",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    'report.sinks=["jsonl"]',
)


def card(name: str, tokens_per_second: float, free_bytes: int | None = None, rows: int = 0) -> Hook:
    """A process that calls its card so and computes at that speed; where it is process 0, cards of the second kind hold
    `rows` at once."""

    def hook() -> None:
        this_rank, micro_steps, done = multi_gpu.this_rank, Training._micro_steps, [0.0]

        def named() -> Any:
            own = this_rank()
            return own.model_copy(update={"name": name, "free_bytes": free_bytes or own.free_bytes})

        def counted(training: Training, state: Any, batches: Any, *rest: Any) -> Any:
            mine = [batch for number, batch in enumerate(batches) if training.partners.mine(number)]
            done[0] += sum(batch.input_ids_BS.numel() for batch in mine) / tokens_per_second
            return micro_steps(training, state, batches, *rest)

        multi_gpu.this_rank, Training._micro_steps = named, counted  # type: ignore[method-assign]
        sharing.clock = lambda: done[0]  # type: ignore[assignment]
        if rows:
            decided = Estimators.decided

            def smaller(of: Estimators, recipe: Any, facts: Any) -> Any:
                plans = decided(of, recipe, facts)
                assert len(plans) == 2
                return [plans[0], multi_gpu.decided(of.each[1], changed(recipe, {ROWS: rows}), facts)]

            Estimators.decided = smaller  # type: ignore[method-assign]

    return hook


FAST, SLOW = card("fast", 9e4), card("slow", 2e4)


def kept(recipe: Path, step: int) -> dict[str, Any]:
    return dict(json.loads(masters(recipe, step).with_name("state.json").read_text())["state"]["shares"])


def notices(recipe: Path, topic: str) -> list[str]:
    events = read_events(run_dir(recipe) / "events.jsonl")
    return [event["message"] for event in events if event["event"] == "notice" and event["topic"] == topic]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Two unequal processes, never stopped."""
    recipe = write_recipe(tmp_path_factory.mktemp("straight"), llama)
    ended = train(recipe, 2, *SETTINGS, hooks={0: FAST, 1: SLOW})
    assert ended.codes == [0, 0] and ended.said[1] == "", ended.said
    return recipe


@pytest.mark.slow
def test_they_share_by_what_was_measured_and_end_where_one_does(tmp_path: Path, llama: Path, straight: Path) -> None:
    one = write_recipe(tmp_path, llama)
    assert train(one, 1, *SETTINGS).codes == [0]
    assert apart(one, straight, STEPS) <= 1e-6
    before, after = kept(straight, 3), kept(straight, STEPS)
    assert before["speeds"] == [1000, 1000] and not before["settled"]
    assert after["speeds"] == [1000, 222]
    assert after["settled"] and after["cards"] == ["fast", "slow"]
    (said,) = notices(straight, "shares")
    assert "process 1 (slow) 18%, predicted 50%" in said
    plan = next(event for event in read_events(run_dir(straight) / "events.jsonl") if event["event"] == "plan")
    assert [one["card"] for one in plan["cards"]] == ["fast", "slow"] and len(plan["cards"]) == 2
    assert sum(one["packs_of_step"] for one in plan["cards"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("step", sampled([2, 5], 2))
def test_stopped_while_it_measures_or_later_it_goes_on_bit_for_bit(
    tmp_path: Path, llama: Path, straight: Path, step: int
) -> None:
    recipe = write_recipe(tmp_path, llama)

    def stopping() -> None:
        FAST()
        stops_after(step)()

    first = train(recipe, 2, *SETTINGS, hooks={0: stopping, 1: SLOW})
    assert first.codes == [143, 0], first.said
    assert train(recipe, 2, *SETTINGS, flag="--resume", hooks={0: FAST, 1: SLOW}).codes == [0, 0]
    assert kept(recipe, STEPS)["speeds"] == kept(straight, STEPS)["speeds"]
    assert hashes(recipe, STEPS) == hashes(straight, STEPS)


@pytest.mark.slow
def test_a_card_with_less_memory_computes_smaller_micro_batches(tmp_path: Path, llama: Path) -> None:
    """And where it runs out, it alone takes smaller ones; the weights are those of one process with such micro-batches
    (which products of bf16 depend on)."""
    settings = (*SETTINGS, "train.micro_batch_size=4", "train.max_steps=3", "train.gradient_checkpointing=true")

    def short() -> None:
        SLOW()
        runs_out_at(1)

    def as_shared() -> None:
        def cut(_: Partners, state: Any, lengths: Any, _settings: Any) -> Cut:
            rows = (4, 2) if state.step == 0 else (4, 1)
            return dealt(lengths, Shares(rows=rows, speeds=(1000, 1000), cards=("fast", "slow")))

        Partners.cut = cut  # type: ignore[method-assign]

    one, two = write_recipe(tmp_path / "one", llama), write_recipe(tmp_path / "two", llama)
    assert train(one, 1, *settings, hooks={0: as_shared}).codes == [0]
    ended = train(two, 2, *settings, hooks={0: card("fast", 9e4, rows=2), 1: short})
    assert ended.codes == [0, 0], ended.said
    assert kept(two, 1)["rows"] == [4, 2] and kept(two, 3)["rows"] == [4, 1]
    said = [event["message"] for event in read_events(run_dir(two) / "events.jsonl") if event["event"] == "recovered"]
    assert len(said) == 1 and "process 1 of 2" in said[0] and "micro-batches of 1 there" in said[0]
    assert apart(one, two, 3) <= 1e-6


@pytest.mark.slow
def test_a_card_that_cannot_hold_its_part_is_named_before_a_weight_is_read(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    ended = train(recipe, 2, *SETTINGS, hooks={0: FAST, 1: card("tiny card", 1e4, free_bytes=64 << 20)})
    assert ended.codes == [3, 0] and ended.said[1] == "", ended.said
    assert "process 1 of 2, tiny card, cannot hold its part: needs" in ended.said[0]
    assert "leave that card out" in ended.said[0] and not (run_dir(recipe) / "checkpoints").exists()
