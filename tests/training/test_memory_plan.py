"""A run is planned before a weight is read: "auto" becomes what fits; what cannot fit ends with remedies that do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qlora import api
from qlora.errors import DoesNotFit
from qlora.events import Recorder
from qlora.memory import calibration, hardware, host
from qlora.memory.hardware import Machine
from qlora.memory.measured import Measured
from qlora.memory.plan import as_event
from qlora.model import load
from qlora.recipe.reading import load_recipe, recipe_of_base
from qlora.training import memory_plan
from qlora.units import GIB
from tests.runs import train, values, write_recipe

SHORT = ("train.max_steps=2", "eval.samples=0", "data.eval_fraction=0")
# A micro-batch of 128 long rows with everything kept: over a GiB on a base of 100 kB.
HUGE = (
    *(
        "train.micro_batch_size=128",
        "train.batch_size=128",
        "data.max_length=4096",
        "train.gradient_checkpointing=false",
    ),
    *('memory.limit="1GiB"', "eval.samples=0", "data.eval_fraction=0", "data.packing=false"),
)


@pytest.fixture
def long_rows(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "held_bytes", lambda: 500 << 20)  # the tests' own process may hold 2 GiB
    recipe = write_recipe(tmp_path, llama)
    row = '{"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "%s"}]}\n'
    (recipe.parent / "rows.jsonl").write_text((row % ("lamp " * 900)) * 160)
    return recipe


def test_what_cannot_fit_ends_with_remedies_before_a_weight_is_read(
    long_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(load, "load_base", lambda *args, **_: read.append(args))
    with pytest.raises(DoesNotFit, match=r"the limit is 1\.00 GiB \(memory\.limit\)") as caught:
        api.train(load_recipe(long_rows, HUGE), name="huge", sink=Recorder())
    assert not read and caught.value.exit_code == 3
    hint = caught.value.hint
    assert hint.startswith(("any one of these fits: ", "this fits: "))
    remedies = hint.partition(": ")[2].split("; ")
    assert 1 <= len(remedies) <= 3
    for remedy in remedies:
        changes = re.findall(r"([a-z_.]+) = (\S+)", remedy)
        assert changes and re.search(r"\(saves \d+\.\d\d GiB\)", remedy)
        taken = [f"{key}={value}" for key, value in changes]
        checked = api.check(load_recipe(long_rows, (*HUGE, *taken)))
        assert checked.memory is not None and checked.memory.fits


def test_auto_is_the_fastest_that_fits_and_the_plan_says_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan keeps 5 % of the limit in reserve for what it decides itself."""
    from qlora.model.resolve import resolve

    auto = ("train.micro_batch_size=auto", "train.gradient_checkpointing=auto", "train.batch_size=16")
    recipe = recipe_of_base(str(llama), (*auto, "data.max_length=4096"))
    base, card = resolve(str(llama), "main", Recorder()), hardware.find("RTX 3060 12GB")
    facts = memory_plan.DataFacts(longest=1816, batch_size=16, prompt_tokens=8, has_eval=False)
    made = []
    for limit in (500 << 20, 40 * GIB):
        monkeypatch.setattr(hardware, "this_machine", lambda _, limit=limit: Machine("cuda", limit, "test", card))
        limited = recipe.model_copy(update={"memory": recipe.memory.model_copy(update={"limit": f"{limit}B"})})
        settings = memory_plan.plan_run(limited, base, facts, Recorder())
        assert settings.plan is not None
        memory = as_event(settings.plan)
        assert memory["limit_bytes"] == pytest.approx(0.95 * limit, rel=1e-6)
        assert memory["peak_bytes"] + memory["error_bytes"] <= memory["limit_bytes"]
        assert memory["changes"]["train.micro_batch_size"] == settings.micro_batch_size
        made.append(settings)
    tight, roomy = made
    assert tight.micro_batch_size < roomy.micro_batch_size == 16 and not roomy.gradient_checkpointing


def test_more_layers_than_the_model_has_are_all_of_them(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    recorder = train(recipe, *SHORT, "train.gradient_checkpointing=9")
    (said,) = [one for one in recorder.of("notice") if "gradient_checkpointing" in one.message]
    assert "gradient_checkpointing = 9: the model has 2 layers; all of them are recomputed" in said.message
    assert said.count == 7 and values(recorder, "plan", "gradient_checkpointing") == [True]
    recorder = train(recipe, *SHORT, "train.gradient_checkpointing=2", mode="fresh")
    assert repr(values(recorder, "plan", "gradient_checkpointing")) == "[2]"
    assert not [one for one in recorder.of("notice") if "gradient_checkpointing" in one.message]


def test_predicted_stands_beside_measured(tmp_path: Path, llama: Path) -> None:
    recorder = train(write_recipe(tmp_path, llama), *SHORT)
    (memory,) = values(recorder, "end", "memory")
    assert set(memory) == {"peak", "weights", "adapters", "optimizer"}
    for part in ("weights", "adapters", "optimizer"):
        # Rounding to 512 bytes shows on so tiny a base.
        assert memory[part]["predicted"] == pytest.approx(memory[part]["measured"], rel=0.05, abs=40_000), part
    assert memory["peak"]["measured"] > 0


def test_rows_say_how_long_they_are(long_rows: Path, tmp_path: Path, llama: Path) -> None:
    """Short rows take what they take, whatever data.max_length allows."""
    short = api.check(load_recipe(write_recipe(tmp_path / "short", llama), ("data.packing=false",))).memory
    long = api.check(load_recipe(long_rows, ("data.packing=false",))).memory
    assert short is not None and long is not None
    assert short.settings["data.max_length"] < 100 < 300 < long.settings["data.max_length"]
    # Not the peaks: rows of more widths have more compiled kernels, and the process holds other things each time.
    taken = [one.components["activations"] for one in (short, long)]
    assert taken[0] < taken[1]


def test_a_model_that_meta_cannot_run_is_trained_without_a_plan(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(*_: Any) -> None:
        raise NotImplementedError("aten::odd has no meta kernel")

    monkeypatch.setattr(memory_plan, "choose", choose)
    recorder = train(write_recipe(tmp_path, llama), *SHORT, "train.micro_batch_size=auto")
    assert values(recorder, "plan", "memory") == [None] and values(recorder, "end", "memory") == [None]
    assert any("not checked" in message for message in values(recorder, "notice", "message"))


def test_a_run_on_a_gpu_is_remembered(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pair of a GPU goes into the file, and the next estimate for that card says that it was corrected."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    card = hardware.find("RTX 3060 12GB")
    monkeypatch.setattr(hardware, "this_machine", lambda limit: Machine("cuda", 8 * GIB, "test", card))
    from qlora.model.resolve import resolve

    recipe = load_recipe(write_recipe(tmp_path, llama))
    base = resolve(recipe.model.base, "main", Recorder())
    facts = memory_plan.DataFacts(longest=64, batch_size=4, prompt_tokens=8, has_eval=False)
    planned = memory_plan.plan_run(recipe, base, facts, Recorder())
    assert planned.plan is not None and planned.plan.estimate.calibrated_by == 0
    tensors = planned.plan.estimate.tensor_bytes
    measured = Measured(round(tensors * 1.1), 1, 1, 1, "2.13")
    pairs = memory_plan.compare(planned, measured)
    assert pairs is not None and pairs["peak"] == {"predicted": tensors, "measured": round(tensors * 1.1)}
    assert calibration.correction("RTX 3060 12GB").factor == pytest.approx(1.1, rel=1e-3)
    again = memory_plan.plan_run(recipe, base, facts, Recorder())
    assert again.plan is not None and again.plan.estimate.calibrated_by == 1
    assert again.plan.estimate.components["weights"] == pytest.approx(
        1.1 * planned.plan.estimate.components["weights"], rel=1e-3
    )
    assert any("calibrated by 1 run" in note for note in again.plan.estimate.notes)
