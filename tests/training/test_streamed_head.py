"""A run whose head comes in blocks of rows is the run that has the same blocks on its device, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.model.head_streaming import StreamedHead
from qlora.step import head_blocks
from tests.card import MIB, Card, rehearsal
from tests.families import make_base
from tests.runs import EVERYTHING, hashes, run_dir, train, values, write_recipe
from tests.sampling import sampled
from tests.training.cases import poison_slots

STEPS = 20
ALL = (*EVERYTHING, f"train.max_steps={STEPS}", "checkpoint.every_steps=5")
PLACES = (
    ("memory.stream_weights=false", 'memory.embedding="device"'),
    (
        "memory.stream_weights=true",
        'memory.embedding="host"',
    ),
)
RESIDENT, ON = ((*ALL, *place) for place in PLACES)


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of 128 rows, of which nothing is left where they were."""
    monkeypatch.setattr(head_blocks, "MOST_ROWS", 128)
    poison_slots(monkeypatch)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    if not request.param:
        return llama
    folder: Path = tmp_path_factory.mktemp("tied") / "base"
    return make_base("llama", folder, overrides={"tie_word_embeddings": True})


def test_twenty_steps_and_resumed_otherwise(tmp_path: Path, base: Path) -> None:
    """With packing, accumulation, dropout, noise and evaluation; resident from the second step on, and streamed again
    from the eighth."""
    recipe = write_recipe(tmp_path / "whole", base)
    recorder = train(recipe, *ON)
    said = [text for text in values(recorder, "notice", "message") if "head is streamed" in text]
    assert len(said) == 1 and "3 blocks of 128 rows" in said[0]
    wanted = hashes(recipe, STEPS)
    begun = write_recipe(tmp_path / "begun", base)
    train(begun, *ON, stop_after=1)
    train(begun, *RESIDENT, mode="resume", stop_after=7)
    recorder = train(begun, *ON, mode="resume")
    assert hashes(begun, STEPS) == wanted
    assert not [text for text in values(recorder, "notice", "message") if "not bit for bit" in text]


def test_a_run_that_began_with_its_head_whole_says_that_it_differs(tmp_path: Path, llama: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    settings = (*EVERYTHING, "train.max_steps=3")
    train(recipe, *settings, *PLACES[0], stop_after=1)
    recorder = train(recipe, *settings, *PLACES[1], mode="resume", stop_after=2)
    (said,) = [text for text in values(recorder, "notice", "message") if "not bit for bit" in text]
    assert "rows a block of the head 0 (now 128)" in said
    recorder = train(recipe, *settings, *PLACES[1], mode="resume")
    assert not [text for text in values(recorder, "notice", "message") if "not bit for bit" in text]


# Blocks that are sent in the checks and the dry run, in the first step's loss, and in its gradient.
@pytest.mark.parametrize("at", sampled([30, 33, 35], 33))
def test_memory_runs_out_while_blocks_come(
    tmp_path: Path, llama: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are done again, fewer at a time: what a run gives that began with as few."""
    seen, send = list[int](), StreamedHead.send

    def counted(sender: StreamedHead, layer: int, *rest: Any) -> Any:
        seen.append(layer)
        if len(seen) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 1.00 MiB free.")
        return send(sender, layer, *rest)

    settings = ("train.max_steps=3", "train.batch_size=4", "data.max_length=96", "data.eval_fraction=0", *PLACES[1])
    settings = (*settings, "train.gradient_checkpointing=true", "lora.dropout=0")
    recipe = write_recipe(tmp_path / "out", llama)
    with monkeypatch.context() as patch:
        patch.setattr(StreamedHead, "send", counted)
        recorder = train(recipe, *settings, "train.micro_batch_size=2")
    assert "micro-batches of 1 instead of 2 rows" in values(recorder, "recovered", "message")[0]
    plain = write_recipe(tmp_path / "few", llama)
    train(plain, *settings, "train.micro_batch_size=1")
    assert hashes(plain, 3) == hashes(recipe, 3)


def test_on_a_card(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in takes each branch of a GPU: pinned blocks, a table without values, exports of the live model."""
    recipe = write_recipe(tmp_path, base)
    settings = (*EVERYTHING, "train.max_steps=4", "export.formats=['hf']", "export.max_kl=10", *PLACES[1])
    pinned = list[bool]()
    blocks = StreamedHead.blocks
    monkeypatch.setattr(
        StreamedHead, "blocks", lambda sender, **how: (pinned.append(bool(sender._pinned)), blocks(sender, **how))[1]
    )
    with rehearsal(monkeypatch, Card(total=512 * MIB)) as card:
        from qlora.export.verify import weights

        monkeypatch.setattr(weights, "reopen", lambda merge, targets: {key: [] for key in targets})
        recorder = train(recipe, *settings)
    assert values(recorder, "end", "reason") == ["finished"]
    assert pinned[-1] and not card.calls["record_stream"]
    assert list((run_dir(recipe) / "export" / "hf").glob("*.safetensors"))
