"""Memory that runs out where nothing can be made smaller: exit 3 and what to change; and what a run leaves behind.

Its error is injected in the words of another library than torch, since a CPU has none of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef  # type: ignore[attr-defined]

from qlora import api, device, export_source, run_folder
from qlora.errors import DoesNotFit, ExportError, QloraError, StoppedBySignal, TrainingStopped
from qlora.events import Recorder, Sinks
from qlora.export import child, pipeline
from qlora.export.artifacts import Artifact, ExportOptions
from qlora.export.child import Outcome
from qlora.export.llama_cpp import runtime
from qlora.export.verify import weights
from qlora.memory.spilling import SpillWatch
from qlora.model import adapters, load, lora_functions
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.saving import Saving
from qlora.stop import StopRequest
from qlora.training import loop, memory_plan, selfcheck, setup
from qlora.training.memory_plan import MemorySettings
from qlora.training.phases import PhaseClock
from tests.card import GIB, MIB, Card, rehearsal
from tests.data.cases import split_trained
from tests.runs import StopAfter, write_recipe

CPU = torch.device("cpu")


def runs_out(*_: Any, **__: Any) -> Any:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def fails(*_: Any, **__: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@dataclass(frozen=True)
class _Base:
    """A base of which nobody reads anything."""

    cache: str = "auto"


def load_model(*overrides: str) -> Any:
    nothing: Any = SimpleNamespace(pad_id=0)
    prepared = setup.Prepared(nothing, nothing, MemorySettings(1, True), None)
    base: Any = _Base()
    return setup.load_model(recipe_of_base("a/b", overrides), base, prepared, PhaseClock(Recorder()))


@pytest.mark.parametrize(
    ("place", "name", "overrides", "doing", "cure"),
    [
        (load, "load_base", (), "loading the base", "use a smaller base"),
        (adapters, "attach", (), "attaching the adapters", r"lower lora\.r"),
        (setup, "_eva_batches", ('lora.init="eva"',), "attaching the adapters", 'lora.init = "default"'),
    ],
)
def test_before_a_run(
    place: Any, name: str, overrides: tuple[str, ...], doing: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_base", lambda *_, **__: None)
    monkeypatch.setattr(place, name, runs_out)
    with pytest.raises(DoesNotFit, match=f"out of memory while {doing}: CUDA error: CUBLAS") as caught:
        load_model(*overrides)
    assert cure.replace("\\", "") in caught.value.hint


class _Training:
    """A run as `loop.run` sees it, saved after step 4."""

    checkpointer = SimpleNamespace(saving=Saving(Path("run"), Recorder()))
    checkpointer.saving.saved_step = 4
    optimizer = SimpleNamespace(detach=lambda: None)
    ahead = nullcontext()
    saved = loop.Training.saved

    def __init__(self, begin: Callable[..., Any]) -> None:
        self.begin = begin


def test_within_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    job: Any = SimpleNamespace(stop=StopRequest(), sink=Recorder())
    monkeypatch.setattr(loop, "Training", runs_out)
    with pytest.raises(DoesNotFit, match="out of memory while setting up the optimizer"):
        loop.run(job, None)
    monkeypatch.setattr(loop, "Training", lambda _: _Training(runs_out))
    with pytest.raises(DoesNotFit, match="out of memory while training") as caught:
        loop.run(job, None)
    assert caught.value.hint.endswith("step 4 is saved, mode='resume' goes on from it")
    monkeypatch.setattr(loop, "Training", lambda _: _Training(fails))
    with pytest.raises(TrainingStopped, match="the GPU failed while training: an illegal memory") as stopped:
        loop.run(job, None)
    assert stopped.value.exit_code == 4 and "step 4 is saved" in stopped.value.hint


def test_in_every_call_of_the_api(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    for place, name in ((setup, "preflight"), (export_source, "_open_source"), (api, "question")):
        monkeypatch.setattr(place, name, runs_out)
    monkeypatch.setattr(run_folder, "adapter_of", lambda _: (tmp_path / "adapter", tmp_path / "export"))
    calls: list[Callable[[], Any]] = [lambda: api.train(recipe), lambda: api.check(recipe)]
    calls += [lambda: api.merge_and_export(tmp_path), lambda: api.estimate_memory(recipe)]
    for call in calls:
        with pytest.raises(DoesNotFit, match="out of memory while"):
            call()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (DoesNotFit("a", "b"), DoesNotFit),
        (TrainingStopped("a", "b"), TrainingStopped),
        (ExportError("a", "b"), ExportError),
    ],
)
def test_an_export_that_fails_undoes_no_training(
    error: Exception, raised: type[DoesNotFit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(api, "_export", fail)
    with pytest.raises(raised) as caught:
        api._export_trained(tmp_path, recipe_of_base("a/b").export, Recorder())
    assert caught.value.hint == f"b; the training itself is done, its adapter is {tmp_path / 'adapter'}"


def test_the_self_check_asks_about_shorter_rows_and_then_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    most = 20

    def compare(causal_lm: Any, parts: Any, rows: Any, device: Any) -> selfcheck.SelfCheck:
        asked.append(tuple(rows.lengths))
        return runs_out() if max(rows.lengths) > most else selfcheck.SelfCheck(0.01, 0.02)

    nothing: Any = None
    monkeypatch.setattr(selfcheck, "_compare", compare)
    check = selfcheck.run(nothing, nothing, split_trained((8192, 9), (2048, 9)), CPU)
    assert asked == [(256, 256), (64, 64), (16, 16)] and check == selfcheck.SelfCheck(0.01, 0.02)
    most = 2
    with pytest.raises(DoesNotFit, match=r"out of memory: CUDA error.*of a row of 16 tokens"):
        selfcheck.run(nothing, nothing, split_trained((8192, 9), (2048, 9)), CPU)


def test_a_child_that_had_no_memory() -> None:
    traceback = "torch.AcceleratorError: CUDA error: out of memory"
    for log, code in (((), -9), (("MemoryError",), 1), ((traceback, *["For debugging consider"] * 5), 1)):
        assert Outcome({}, code, log).ran_out_of_memory
    for log, code in (((), 1), (("ValueError: x",), 1), (("MemoryError", *["much later"] * 20), 1)):
        assert not Outcome({}, code, log).ran_out_of_memory


def test_an_export_whose_check_had_no_memory_is_exit_3_and_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are checked in one child for all artifacts, a GGUF file in one of its own."""
    monkeypatch.setattr(child, "run", lambda *_: Outcome({}, -9, ()))
    nothing: Any = SimpleNamespace(path="base", folder="adapter", tensors={}, model_dump=lambda mode: {})
    merge: Any = SimpleNamespace(base=nothing, adapter=nothing, merge_base="nf4", quantization=nothing, device=CPU)
    with pytest.raises(DoesNotFit, match="out of memory while verifying") as caught:
        weights.reopen(merge, {})
    assert "verify=False" in caught.value.hint
    with pytest.raises(DoesNotFit, match=r"a\.gguf: out of memory while llama.cpp read it"):
        runtime._answer_of_child(Path("a.gguf"), Outcome({}, 1, ("std::bad_alloc",)), 9.0)

    def inspect(reference: Any, planned: Any, file: Path, key: str, found: Any) -> Any:
        if key == "gguf-q8_0":
            raise DoesNotFit("a", "b")
        return SimpleNamespace(fidelity=None)

    keys = ("gguf-q8_0", "gguf-q4_k_m")
    job: Any = SimpleNamespace(
        artifacts=[Artifact(key, Path(key), key[5:]) for key in keys], failures={}, inspections={}
    )
    job.folder = job.file_name = job.merge = lambda *_: Path("x")
    job.reference = job.planned = nothing
    job.options, job.sink = ExportOptions(), Recorder()
    monkeypatch.setattr(pipeline, "_target", lambda *_: None)
    monkeypatch.setattr(pipeline.weights, "reopen", lambda *_: {key: [] for key in keys})
    monkeypatch.setattr(pipeline.checks, "inspect_gguf", inspect)
    pipeline._verify(job)
    assert list(job.failures) == ["gguf-q8_0"] and list(job.inspections) == ["gguf-q4_k_m"]


def test_the_limit_is_the_cards_before_a_weight_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MiB of the stand-in are the driver's: they count against `memory.limit`, and are not free without one."""
    limits: list[int] = []
    with rehearsal(monkeypatch, Card(total=GIB)) as card:
        monkeypatch.setattr(load, "load_base", lambda *_, **__: limits.append(card.limit))
        monkeypatch.setattr(adapters, "attach", lambda *_, **__: torch.nn.Module())
        monkeypatch.setattr(lora_functions, "say_what_stays", lambda *_: None)
        for overrides in (('memory.limit="512MiB"',), ()):
            load_model(*overrides)
    assert [round(limit / MIB) for limit in limits] == [508, 1020]
    assert card.calls["reset_peak_memory_stats"] == 2


@pytest.mark.parametrize("end", ["exported", "refused", "lost"])
def test_a_limit_ends_with_the_run_and_its_export(
    end: str, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that called `api.train` has the whole card again."""
    limits: list[int] = []

    def run(*_: Any) -> Any:
        device.limit_memory(CPU, 100 * MIB, 0)
        if end == "refused":
            raise ExportError("the run's", "own")

    def export(*_: Any) -> tuple[()]:
        limits.append(card.limit)
        if end == "lost":  # each call of CUDA fails from here on
            monkeypatch.setattr(card, "set_per_process_memory_fraction", fails)
            fails()
        return ()

    monkeypatch.setattr(api, "_run", run)
    monkeypatch.setattr(api, "_export_trained", export)
    recipe = write_recipe(tmp_path, llama)
    ends = nullcontext() if end == "exported" else pytest.raises(QloraError)
    with rehearsal(monkeypatch, Card(total=GIB)) as card, ends as error:
        api.train(recipe)
    if end == "exported":
        assert limits == [100 * MIB]
    assert (card.limit == GIB) is (end != "lost")
    if error is not None:
        assert ("illegal memory access" if end == "lost" else "the run's") in str(error.value)


def test_no_tensor_of_a_run_is_alive_when_another_model_is_loaded(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the export that follows a training, in the next run, and after a run whose error somebody keeps.

    And each step of a run is looked at: does its driver spill?
    """
    looked_at: list[int] = []
    monkeypatch.setattr(SpillWatch, "after_step", lambda self, done: looked_at.append(done.step))
    known: list[list[StorageWeakRef]] = []
    alive: list[list[int]] = []
    load_base, train = load.load_base, loop.run

    def loading(*arguments: Any, **named: Any) -> Any:
        alive.append([sum(not one.expired() for one in of_run) for of_run in known])
        if len(alive) == 2:  # the export's
            raise ExportError("enough is known", "go on")
        return load_base(*arguments, **named)

    def running(job: Any, resume_from: Any) -> Any:
        model = job.model
        states = [getattr(one, "quant_state", None) for one in model.parameters()]
        constants = [state.absmax for state in states if state is not None]
        tensors = [*model.parameters(), *model.buffers(), *constants]
        known.append([StorageWeakRef(tensor.untyped_storage()) for tensor in tensors])
        return train(job, resume_from)

    monkeypatch.setattr(load, "load_base", loading)
    monkeypatch.setattr(loop, "run", running)
    monkeypatch.setattr(memory_plan, "plan_run", lambda *_: MemorySettings(1, False))
    settings = ("train.max_steps=2", "train.batch_size=1", "data.max_length=96", "eval.samples=0")
    recipe = load_recipe(write_recipe(tmp_path, llama), (*settings, 'export.formats=["hf"]'))
    with pytest.raises(ExportError, match="enough is known"):
        api.train(recipe)
    stop = StopRequest()
    with pytest.raises(StoppedBySignal) as kept:
        api.train(recipe, mode="fresh", sink=Sinks(Recorder(), StopAfter(1, stop)), stop=stop)
    api.train(recipe.model_copy(update={"export": recipe_of_base("a/b").export}), mode="fresh")
    assert kept.value.exit_code == 130 and [len(of_run) > 30 for of_run in known] == [True] * 3
    assert alive == [[], [0], [0], [0, 0]]
    assert looked_at == [1, 2, 1, 1, 2]
