"""Out of memory: the same rows again in smaller pieces, the same gradient, nothing kept, and remedies at the end.

The error is injected, since a CPU has none of its own: it is torch's own class, raised inside the forward or backward
pass of the run.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora import heap
from qlora.errors import DoesNotFit
from qlora.events import Recorder
from qlora.model import adapters, precision
from qlora.model.weight_receiving import Place
from qlora.step import forward
from qlora.training import loop, memory_plan, selfcheck
from qlora.training.evaluate import RunEvaluation
from qlora.training.memory_plan import MemorySettings
from qlora.training.recovery import OomRecovery, attempt
from qlora.training.selfcheck import SelfCheck
from tests.card import Card, rehearsal
from tests.runs import hashes, run_dir, train, values, write_recipe

RUN = (
    *("train.max_steps=3", "train.batch_size=4", "data.max_length=96", "data.packing=false", "train.optimizer=adamw"),
    *("eval.samples=0", "eval.every_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=9"),
)
ALL = ("train.gradient_checkpointing=true",)  # layers are recomputed: what is left to lower is the micro-batch
CPU = torch.device("cpu")


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")


def fail_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Memory runs out in these passes through a micro-batch, in the backward pass, with its gradient half done."""
    real, count = forward.forward_backward, iter(range(10_000))

    def forward_backward(*arguments: Any) -> Any:
        loss = real(*arguments)
        if next(count) in calls:
            raise out_of_memory()
        return loss

    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)


def in_fp32(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Adapters in float32, and the gradient of every step as the optimizer gets it."""
    attach = adapters.attach

    def attached(model: Any, lora: Any, seed: int, _: torch.dtype, *about: Any) -> Any:
        return attach(model, lora, seed, torch.float32, *about)

    monkeypatch.setattr(adapters, "attach", attached)
    seen: list[dict[str, torch.Tensor]] = []
    norm = loop.AdapterOptimizer.gradient_norm

    def gradient_norm(self: Any) -> torch.Tensor:
        seen.append({key: gradient.clone() for key, gradient in self.gradients.items()})
        return norm(self)

    monkeypatch.setattr(loop.AdapterOptimizer, "gradient_norm", gradient_norm)
    return seen


def fp32_base(folder: Path) -> Path:
    from tests.families import make_base

    return make_base("llama", folder)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of everything together."""
    flat = [torch.cat([tensors[key].flatten().double() for key in sorted(tensors)]) for tensors in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def test_at_every_micro_step_the_gradient_is_that_of_the_small_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of 2 that fail, redone as 1 and 1: against a run of 1 from the start, and the final weights too."""
    # The whole computation, base included: in bf16 a weight that is off by rounding is off by 0.002 in what follows.
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    monkeypatch.setitem(precision.DTYPES, precision.BF16, torch.float32)
    base = fp32_base(tmp_path / "base")
    with monkeypatch.context() as patch:
        wanted = in_fp32(patch)
        fail_at(patch)
        small = write_recipe(tmp_path / "small", base)
        train(small, *RUN, "train.micro_batch_size=1", 'quantization.type="none"')
    final = load_file(run_dir(small) / "checkpoints/step-000003/adapter.safetensors")
    for call in range(6):  # 3 steps of 2 micro-batches
        with monkeypatch.context() as patch:
            seen = in_fp32(patch)
            fail_at(patch, call)
            recipe = write_recipe(tmp_path / f"failing-{call}", base)
            recorder = train(recipe, *RUN, *ALL, "train.micro_batch_size=2", 'quantization.type="none"')
        (event,) = recorder.of("recovered")
        assert event.as_dict()["step"] == call // 2 + 1
        assert "micro-batches of 1 instead of 2" in event.as_dict()["message"]
        assert [distance(one, other) for one, other in zip(seen, wanted, strict=True)] == pytest.approx(
            [0] * 3, abs=1e-6
        )
        found = load_file(run_dir(recipe) / "checkpoints/step-000003/adapter.safetensors")
        assert distance(found, final) < 1e-5


def test_the_new_size_is_kept_and_a_resumed_run_goes_on_with_it(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    recipe = write_recipe(tmp_path, llama)
    with monkeypatch.context() as patch:
        fail_at(patch, 0)
        train(recipe, *RUN, *ALL, "train.micro_batch_size=4", stop_after=2)
    state = json.loads((run_dir(recipe) / "checkpoints/step-000002/state.json").read_text())["state"]
    assert (state["micro_batch_size"], state["gradient_checkpointing"]) == (2, True)
    recorder = train(recipe, *RUN, *ALL, "train.micro_batch_size=4", mode="resume")
    assert values(recorder, "plan", "micro_batch_size") == [2]


def test_a_resumed_run_that_may_not_pack_evaluates_with_the_new_size_too(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = (*RUN, *ALL, "train.micro_batch_size=4", "data.packing=true", "eval.every_steps=1")
    leaky = SelfCheck(head=0.01, leak=0.5)
    monkeypatch.setattr(selfcheck, "run", lambda *_: leaky)
    with monkeypatch.context() as patch:
        fail_at(patch, 0)
        train(recipe, *settings, stop_after=2)
    sizes = []
    rows = RunEvaluation.rows

    def counted(self: Any) -> Any:
        sizes.append(self.recovery.settings.micro_batch_size)
        return rows(self)

    monkeypatch.setattr(RunEvaluation, "rows", counted)
    recorder = train(recipe, *settings, mode="resume")
    assert "switched off" in str(values(recorder, "notice", "message"))
    assert values(recorder, "plan", "micro_batch_size") == [2] and set(sizes) == {2}


def test_twenty_in_a_row_keep_nothing() -> None:
    recovery = OomRecovery(MemorySettings(1 << 20, True), CPU, Recorder(), lambda settings: None)
    made: list[weakref.ref[torch.Tensor]] = []

    def work() -> str:
        assert [one for one in made if one() is not None] == []
        if len(made) < 20:
            weight = torch.ones(64, 64, requires_grad=True)
            big = (weight @ torch.ones(64, 64)).relu()
            made.append(weakref.ref(big))
            big.sum().backward()
            raise out_of_memory()
        return "done"

    assert recovery.run(1, work) == "done"
    assert recovery.settings.micro_batch_size == 1 and len(made) == 20


def test_twenty_in_a_row_within_a_run_keep_no_tensor(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole chain: model, autograd, optimizer. Sizes are halved by nothing here, so that it can fail so often."""
    monkeypatch.setattr(MemorySettings, "smaller", lambda self: self)
    fail_at(monkeypatch, *range(20))
    held: list[int] = []
    from qlora.training import recovery

    def release_memory(device: torch.device) -> None:
        gc.collect()
        looked_at = len(held) in (0, 19)  # looking at every object of the process takes a second
        tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)] if looked_at else []
        # A size that is a symbol is of a compiled model's tracing, by a test before this one: it holds no memory.
        held.append(sum(one.nbytes for one in tensors if not one._has_symbolic_sizes_strides))

    monkeypatch.setattr(recovery, "release_memory", release_memory)
    monkeypatch.setattr(recovery, "_describe", lambda before, after: "again")
    recorder = train(write_recipe(tmp_path, llama), *RUN, "train.micro_batch_size=2")
    assert len(recorder.of("recovered")) == len(held) == 20
    assert held[-1] == held[0] > 0
    assert values(recorder, "step", "step") == [1, 2, 3]


def test_an_evaluation_begins_and_ends_without_a_steps_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a phase, not for each step: what a step leaves is there for the next."""
    recovery = OomRecovery(MemorySettings(1, True), CPU, Recorder(), lambda settings: None)
    done: list[str] = []
    monkeypatch.setattr(heap, "give_back_holes", lambda: done.append("holes"))
    for run in (recovery.run, recovery.run_forward, recovery.run_generation):
        run(1, lambda: done.append("work"))
    assert done == ["work", *["holes", "work", "holes"] * 2]


def test_what_changes_no_number_is_taken_before_rows_are_split() -> None:
    now: MemorySettings | None = MemorySettings(4, False, layers=8, may_offload=True)
    taken = []
    while now is not None:
        taken.append((now.gradient_checkpointing, now.offload_activations, now.micro_batch_size))
        now = now.smaller()
    assert taken[:5] == [(False, False, 4), (2, False, 4), (4, False, 4), (True, False, 4), (True, True, 4)]
    assert taken[5:] == [(True, True, 2), (True, True, 1)]
    closed = MemorySettings(4, True, layers=8).smaller()
    assert closed is not None and not closed.offload_activations and closed.micro_batch_size == 2


def test_inputs_that_go_to_the_host_change_no_bit(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out with all layers recomputed: the inputs go, the micro-batch stays, and the run is the same run."""
    from qlora.step import offload

    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    straight, failing = write_recipe(tmp_path / "straight", llama), write_recipe(tmp_path / "failing", llama)
    dropout = (*RUN, *ALL, "train.micro_batch_size=2", "lora.dropout=0.2", "data.packing=true")
    train(straight, *dropout)
    plan_run = memory_plan.plan_run

    def on_a_card(*about: Any) -> MemorySettings:
        return replace(plan_run(*about), may_offload=True)

    monkeypatch.setattr(memory_plan, "plan_run", on_a_card)
    fail_at(monkeypatch, 1)
    recorder = train(failing, *dropout)
    assert hashes(failing, 3) == hashes(straight, 3)
    (event,) = recorder.of("recovered")
    assert "inputs of recomputed layers wait on the host" in event.as_dict()["message"]


def test_more_recomputed_layers_change_no_bit(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lowered first leaves the run as it was, also where it was stopped and went on with the new number."""
    import json

    straight, failing = write_recipe(tmp_path / "straight", llama), write_recipe(tmp_path / "failing", llama)
    dropout = (*RUN, "train.micro_batch_size=2", "lora.dropout=0.2", "data.packing=true")
    train(straight, *dropout)
    with monkeypatch.context() as patch:
        fail_at(patch, 1)
        recorder = train(failing, *dropout, stop_after=2)
    assert "the backward pass recomputes the first layer from now on" in str(values(recorder, "recovered", "message"))
    state = json.loads((run_dir(failing) / "checkpoints/step-000002/state.json").read_text())["state"]
    assert (state["micro_batch_size"], repr(state["gradient_checkpointing"])) == (2, "1")
    recorder = train(failing, *dropout, mode="resume")
    assert repr(values(recorder, "plan", "gradient_checkpointing")) == "[1]"
    assert hashes(failing, 3) == hashes(straight, 3)


def test_levers_are_pulled_in_order_and_then_the_run_ends_with_remedies(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, llama)
    fail_at(monkeypatch, *range(100))
    recorder = Recorder()
    from qlora import api
    from qlora.recipe.reading import load_recipe

    settings = (*RUN, "train.micro_batch_size=4", "train.gradient_checkpointing=false", "data.max_length=2048")
    with pytest.raises(DoesNotFit, match=r"Tried to allocate 2.*one row at a time and layers recomputed") as caught:
        api.train(load_recipe(recipe, settings), name=recipe.stem, sink=recorder)
    said = [event.as_dict()["message"].split(": ")[-1] for event in recorder.of("recovered")]
    assert [message.partition(";")[0] for message in said] == [
        "the backward pass recomputes the first layer from now on",
        "the backward pass recomputes layers from now on",
        "micro-batches of 2 instead of 4 rows",
        "micro-batches of 1 instead of 2 rows",
    ]
    assert caught.value.exit_code == 3 and "iB" in caught.value.hint


def test_evaluation_and_answers_recover_too(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    straight = train(recipe, *RUN, "train.micro_batch_size=2", "eval.samples=2", "data.eval_fraction=0.2")
    once = iter([True] + [False] * 1000)
    answers_once = iter([True] + [False] * 1000)
    from qlora.model import generate
    from qlora.training import measuring

    summed_loss, greedy = measuring.summed_loss, generate.greedy

    def failing(real: Callable[..., Any], when: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(when):
                raise out_of_memory()
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(loop.Training, "dry_run", lambda self, state: None)
    monkeypatch.setattr(measuring, "summed_loss", failing(summed_loss, once))
    monkeypatch.setattr(generate, "greedy", failing(greedy, answers_once))
    again = train(recipe, *RUN, "train.micro_batch_size=2", "eval.samples=2", "data.eval_fraction=0.2", mode="fresh")
    told = " ".join(values(again, "recovered", "message"))
    assert "8 instead of 16 answers at once" in told and "micro-batches of 1 instead of 2" in told
    assert values(again, "eval", "loss")[0] == pytest.approx(values(straight, "eval", "loss")[0], rel=1e-3)
    assert values(again, "sample", "base") == values(straight, "sample", "base")


def test_an_update_is_never_done_twice(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, llama)
    step = loop.AdapterOptimizer.step

    def update(self: Any, learning_rate: float) -> None:
        if learning_rate > 0 and not next(iter(self.masters.values())).is_meta:
            raise out_of_memory()
        step(self, learning_rate)

    monkeypatch.setattr(loop.AdapterOptimizer, "step", update)
    with pytest.raises(DoesNotFit, match="in the update; the last checkpoint is whole"):
        train(recipe, *RUN, "train.micro_batch_size=2")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("x")]
)
def test_any_other_error_ends_the_run(error: Exception) -> None:
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        raise error

    recovery = OomRecovery(MemorySettings(8, False), CPU, Recorder(), lambda settings: None)
    with pytest.raises(type(error)):
        recovery.run(1, work)
    assert len(tries) == 1


def test_the_reason_is_told_without_the_whole_message() -> None:
    def work() -> None:
        raise out_of_memory()

    assert attempt(work) == (None, "out of memory: Tried to allocate 2.00 GiB")


def test_weights_go_to_the_host_before_a_run_ends(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, which cost little, before rows are split; layers when nothing else is left. No number changes."""
    settings = (*RUN, *ALL, "train.micro_batch_size=1", "lora.dropout=0", "memory.offload_activations=false")
    plain, recipe = write_recipe(tmp_path / "plain", llama), write_recipe(tmp_path / "out", llama)
    with rehearsal(monkeypatch, Card()):
        train(plain, *settings)
    with monkeypatch.context() as patch, rehearsal(patch, Card()):
        fail_at(patch, 2, 4)
        recorder = train(recipe, *settings)
    said = [message.partition(": ")[2].partition(";")[0] for message in values(recorder, "recovered", "message")]
    assert [one.rpartition(": ")[2] for one in said] == [
        "embeddings are on the host from now on",
        "layers are on the host from now on",
    ]
    assert hashes(recipe, 3) == hashes(plain, 3)
    notices = values(recorder, "notice", "message")
    assert any("weights are streamed: 2 layers" in one for one in notices)
    with monkeypatch.context() as patch, rehearsal(patch, Card()):
        fail_at(patch, 0, 1, 2)
        with pytest.raises(DoesNotFit):
            train(write_recipe(tmp_path / "none", llama), *settings)


def test_rows_are_split_before_layers_are_streamed() -> None:
    now = MemorySettings(2, True, layers=4, may_move=Place(True, True))
    steps = []
    while (smaller := now.smaller()) is not None:
        now = smaller
        steps.append((now.micro_batch_size, now.place.host_embedding, now.place.streams))
    assert steps == [(2, True, False), (1, True, False), (1, True, True)]
