"""The loss that a run delivers is measured again, on the same rows in the same micro-batches, or on some of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.verify import evaluation
from qlora.export.verify.evaluation import EvalRows, compare, mean, summed_loss
from qlora.model.delivered_loss import DeliveredLoss
from qlora.step.forward import CausalParts, evaluating
from qlora.step.loss import SupervisedObjective
from tests.data.cases import data_of, split_of
from tests.export.cases import KINDS, trained

CPU = torch.device("cpu")


def loss_of(value: float, weight: float = 1.0) -> tuple[torch.Tensor, float]:
    return torch.tensor(value, dtype=torch.float64), weight


def rows_of(lengths: list[int], packs_at_once: int = 2, packing: bool = False) -> EvalRows:
    return EvalRows(split_of(lengths), data_of(packing), 0, packs_at_once)


def test_a_mean_is_over_all_that_is_counted() -> None:
    first = loss_of(6.0, 2.0)
    assert mean([first, loss_of(3.0, 4.0)]) == 1.5 and float(first[0]) == 6.0
    assert math.isnan(mean([loss_of(0.0, 0.0)])) and math.isnan(mean([]))


def test_few_rows_are_their_own_sample() -> None:
    rows = rows_of([4, 9, 3])
    record = rows.record(7, [loss_of(12.0, 6.0), loss_of(6.0, 3.0)])
    assert record is not None and (record.step, record.loss, record.sample_loss, record.every) == (7, 2.0, 2.0, 1)
    assert (record.sample_rows, record.sample_tokens, record.packs_at_once) == (3, 13, 2)


def test_a_sample_of_many_rows_is_bounded_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_TOKENS", 30)
    rows = rows_of([5] * 20)  # 10 micro-batches of 10 tokens
    losses = [loss_of(8.0 * number, 8.0) for number in range(10)]
    record = rows.record(1, losses)
    assert record is not None and (record.every, record.sample_rows, record.sample_tokens) == (4, 6, 24)
    assert record.loss == 4.5 and record.sample_loss == (0 + 4 + 8) / 3
    assert [len(batch.input_ids_BS) for batch in rows.sample(record.every)] == [1] * 6
    monkeypatch.setattr(evaluation, "MOST_TOKENS", 1)  # one micro-batch at least
    assert rows.record(1, losses).every == 10  # type: ignore[union-attr]


def test_nothing_is_recorded_of_what_is_not_a_number() -> None:
    assert rows_of([4]).record(1, [loss_of(math.nan, 3.0)]) is None
    assert rows_of([1]).record(1, [loss_of(0.0, 0.0)]) is None


def test_rows_are_known_by_tokens_and_weights_of_the_sample() -> None:
    rows, same, other = rows_of([4, 9, 3]), rows_of([4, 9, 3]), rows_of([4, 9, 3])
    other.split.rows[1].loss_weights[4] = 0.5
    assert rows.content_sha256(1) == same.content_sha256(1) != other.content_sha256(1)
    assert rows.content_sha256(2) != rows.content_sha256(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Any:
    return trained(llama, tmp_path_factory.mktemp("adapter"), KINDS["plain"])


def recorded(model: Any, rows: EvalRows) -> DeliveredLoss:
    parts = CausalParts.of(model.get_base_model())
    with evaluating(model):
        losses = [summed_loss(parts, SupervisedObjective(), batch, CPU) for batch in rows]
    record = rows.record(3, losses)
    assert record is not None
    return record


def test_the_same_model_gives_the_same_loss_and_says_so(model: Any) -> None:
    rows, sink = rows_of([12, 9, 7]), Recorder()
    record = recorded(model, rows)
    found = compare(model, rows, record, sink)
    assert found is not None and found.delivered == record.loss and found.rows == 3
    assert found.here == pytest.approx(found.delivered, rel=1e-4)
    assert f"is {record.loss:.4f} nats a token, the run delivered" in sink.of("notice")[0].as_dict()["message"]


@pytest.mark.parametrize(("off", "refused"), [(0.0, False), (0.009, False), (0.02, True), (-0.02, True)])
def test_another_loss_is_another_model(model: Any, off: float, refused: bool) -> None:
    rows = rows_of([12, 9, 7])
    record = recorded(model, rows)
    record = record.model_copy(update={"sample_loss": record.loss * (1 + off) + math.copysign(0.01, off) * bool(off)})
    if refused:
        with pytest.raises(ExportError, match="is not the one that was trained") as error:
            compare(model, rows, record, Recorder())
        assert error.value.exit_code == 2
    else:
        assert compare(model, rows, record, Recorder()) is not None


def test_a_model_that_computes_no_numbers_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([12])
    record = recorded(model, rows)
    monkeypatch.setattr(evaluation, "mean", lambda losses: math.nan)
    with pytest.raises(ExportError, match="is nan nats"):
        compare(model, rows, record, Recorder())


def test_other_rows_and_an_older_run_s_many_rows_are_not_compared(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, record = Recorder(), recorded(model, rows_of([12, 9, 7]))
    assert compare(model, rows_of([12, 9, 6]), record, sink) is None
    assert "have changed since" in sink.of("notice")[-1].as_dict()["message"]
    monkeypatch.setattr(evaluation, "MOST_TOKENS", 20)
    older = record.model_copy(update={"content": None})
    assert compare(model, rows_of([12, 9, 7]), older, sink) is None
    assert "older version" in sink.of("notice")[-1].as_dict()["message"]
