"""Runs of preference: each objective tells answers apart, goes on bit for bit, and takes no rows but its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import api
from qlora.errors import QloraError
from qlora.events import Recorder
from qlora.objective_keys import ObjectiveKeys
from qlora.step.objectives import objective_of
from qlora.training import loop, preferences, reference
from tests.runs import hashes, run_dir, train, values
from tests.sampling import sampled
from tests.training.preference_cases import ALL, notices, write_recipe

OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto")


@pytest.mark.parametrize("objective", sampled(OBJECTIVES, "dpo", "orpo", "kto"))
def test_a_run_tells_answers_apart_and_goes_on_bit_for_bit(tmp_path: Path, llama: Path, objective: str) -> None:
    """Packed, accumulated, with dropout, NEFTune, evaluations and samples."""
    straight, halves = (write_recipe(tmp_path / name, llama, objective) for name in ("one", "two"))
    whole = train(straight, *ALL)
    first = train(halves, *ALL, stop_after=5)
    second = train(halves, *ALL, mode="resume")
    assert hashes(halves, 8) == hashes(straight, 8)
    told = [event.as_dict() for event in whole.of("preference")]
    steps = {event["step"]: event for event in told if not event["evaluated"]}
    evaluated = {event["step"]: event for event in told if event["evaluated"]}
    assert list(steps) == [*range(1, 9)] and list(evaluated) == [0, 3, 6, 8]
    assert [event.as_dict() for event in (*first.of("preference"), *second.of("preference"))] == told
    assert evaluated[8]["margin"] > evaluated[0]["margin"] and evaluated[8]["accuracy"] >= 0.9
    assert evaluated[0]["kl"] == pytest.approx(0, abs=1e-6) and evaluated[8]["kl"] > 1e-3
    assert values(whole, "eval", "perplexity") == [None] * len(values(whole, "eval", "perplexity"))
    kept = run_dir(straight) / reference.FOLDER
    assert kept.is_dir() == (objective in ("dpo", "ipo", "kto"))
    assert [bool(notices(second, "reference")), bool(notices(whole, "reference"))] == [kept.is_dir(), False]


def test_the_size_of_a_micro_batch_changes_no_gradient(tmp_path: Path, llama: Path) -> None:
    """A mean over the pairs of a step, whatever micro-batches they are in, unpacked as well."""
    norms = {}
    for micro in (1, 4):
        recipe = write_recipe(tmp_path / str(micro), llama, "dpo")
        some = ("train.batch_size=4", f"train.micro_batch_size={micro}", "train.max_steps=1", "data.packing=false")
        norms[micro] = values(train(recipe, *some, "eval.samples=0"), "step", "grad_norm")[0]
    assert norms[1] == pytest.approx(norms[4], rel=2e-2)  # in bf16


def test_what_ran_out_of_memory_is_compared_again(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs in smaller micro-batches, each counted once."""
    real, calls = loop.forward_backward, iter(range(10_000))

    def failing(*arguments: Any) -> Any:
        if next(calls) == 2:  # of the first step, behind those of the dry run
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB.")
        return real(*arguments)

    recipe = write_recipe(tmp_path, llama, "dpo")
    some = ("train.batch_size=4", "train.micro_batch_size=4", "train.max_steps=2", "eval.samples=0")
    monkeypatch.setattr(loop, "forward_backward", failing)
    recorder = train(recipe, *some, "train.gradient_checkpointing=true", "data.packing=false")
    assert len(recorder.of("recovered")) == 1
    told = [event.as_dict() for event in recorder.of("preference") if not event.as_dict()["evaluated"]]
    assert [(event["step"], event["compared"]) for event in told] == [(1, 4), (2, 4)]


def test_what_was_learned_from_pairs_is_exported_as_any_adapter(tmp_path: Path, llama: Path) -> None:
    """The rows' own loss is delivered, whatever the objective was: an export measures it again and compares."""
    recipe, recorder = write_recipe(tmp_path, llama, "dpo"), Recorder()
    train(recipe, *ALL)
    exported = api.merge_and_export(run_dir(recipe), to="hf", sink=recorder)
    assert exported.fidelity and all(line.kl < 0.05 for line in exported.fidelity)
    assert any("is the one that was trained" in said for said in notices(recorder, "verify"))


@pytest.mark.parametrize(
    ("objective", "format", "words"),
    [
        ("dpo", "kto", "learns from pairs of a better and a worse answer"),
        ("dpo", "messages", "learns from pairs of a better and a worse answer"),
        ("kto", "text", "learns from answers marked good or bad"),
        ("sft", "preference", "learns from answers alone"),
        ("sft", "kto", "learns from answers alone"),
    ],
)
def test_rows_of_another_objective_are_refused(
    tmp_path: Path, llama: Path, objective: str, format: str, words: str
) -> None:
    recipe = write_recipe(tmp_path, llama, objective)
    recipe.write_text(recipe.read_text().replace('"rows.jsonl"\n', f'"rows.jsonl"\nformat = "{format}"\n'))
    with pytest.raises(QloraError, match=words) as error:
        train(recipe, *ALL)
    assert str(recipe) in str(error.value) and not (tmp_path / "runs").exists()


def test_pairs_are_answers_for_kto(tmp_path: Path, llama: Path) -> None:
    """Each is learned by itself, and told apart from the other one to its question."""
    recipe = write_recipe(tmp_path, llama, "dpo")
    recipe.write_text(recipe.read_text().replace('"rows.jsonl"\n', '"rows.jsonl"\nformat = "preference"\n'))
    told = train(recipe, *ALL, 'train.objective="kto"').of("preference")
    first, last = told[0].as_dict(), told[-1].as_dict()
    assert first["compared"] == 6 and first["divergence"] is not None and first["accuracy"] == 0.5
    assert last["evaluated"] and last["accuracy"] >= 0.9 and last["likelier"] is not None


def test_the_divergence_of_a_step_is_asked_of_all_who_share_it() -> None:
    """KTO's z is a mean over the answers of the whole step: each process asks about its own part and gets the rest."""

    class Model(torch.nn.Linear):
        def get_base_model(self) -> torch.nn.Module:
            return self

        def get_output_embeddings(self) -> torch.nn.Module:
            return self

    asked: list[int] = []

    def share(items: Any, _ask: Any) -> list[torch.Tensor]:
        asked.append(len(items))
        return [torch.tensor([1.5, 0.5]), torch.zeros(0), torch.tensor([4.0]), torch.zeros(0)]

    objective: Any = objective_of(ObjectiveKeys(objective="kto"))
    unused: Any = None
    preferences.begin(objective, [unused] * 4, Model(1, 1), unused, share)
    assert asked == [4] and float(objective.divergence) == 2.0
