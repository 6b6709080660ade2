"""What tests of runs share: an optimizer after a step, what a manifest says of the run, and a recipe with documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora import disk
from qlora.model.weight_stores import HostStore
from qlora.model.weight_streaming import Ring
from qlora.step.optimizer import AdapterOptimizer
from qlora.stop import StopRequest
from qlora.study import exam_questions
from qlora.study.labels import COLUMNS, Labels, LabelStore
from qlora.study.records import Answer, Candidate, Question, key_of
from qlora.study.split import Split
from qlora.study.study import Studied

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")  # of a checkpoint
ABOUT = {"versions": {"qlora": "1.2.3", "torch": "2.10.0"}, "recipe_sha256": "ab" * 32}

MANUAL = """# Lamps

The Orla lamp runs for nine hours. The Bexley lamp costs 12 euros. The Tavery lamp comes in green.

# Pumps

The Marlow pump has a warranty of seven years. Code E41 means that water is missing. The Zephra pump weighs 3 kg.
"""
DOCUMENT_KEYS = (
    "train.batch_size=2",
    "train.epochs=2",
    "data.max_length=256",
    "exam.questions=2",
    "checkpoint.every_steps=2",
)


def optimizer() -> AdapterOptimizer:
    """After one step over four small matrices; the same values each time."""
    torch.manual_seed(0)
    parameters = {
        f"base_model.model.l{i}.lora_{m}.default.weight": torch.nn.Parameter(torch.randn(4, 8).bfloat16())
        for i in (0, 1)
        for m in "AB"
    }
    made = AdapterOptimizer(parameters, "adamw", 0.0)
    for key, master in made.masters.items():
        made.add_gradient(key, torch.randn_like(master))
    made.gradient_norm()
    made.step(1e-3)
    return made


def write_manuals(folder: Path, base: Path, more: str = "") -> Path:
    """A recipe that learns a folder of one manual."""
    (folder / "manuals").mkdir(parents=True)
    (folder / "manuals" / "manual.md").write_text(MANUAL)
    path = folder / "learn.toml"
    text = (
        f'[model]\nbase = "{base}"\n[[data.documents]]\npath = "manuals"\n{more}[output]\ndir = "{folder / "runs"}"\n'
    )
    path.write_text(text)
    return path


def script(asked: list[str]) -> Any:
    """A study that asks one question of each sentence; `asked` grows by the keys of those not answered before."""

    def study(teacher: Any, passages: Any, settings: Any, folder: Path, sink: Any, stop: StopRequest) -> Studied:
        vocabulary = teacher.model.get_input_embeddings().weight.shape[0]
        store = LabelStore(folder / "labels.bin", vocabulary)
        store.cut_torn()
        candidates = []
        for passage in passages:
            for at, sentence in enumerate(passage.sentences):
                stop.check()
                key = key_of(passage.key, at, settings.base, settings.seed)
                ids = teacher.chat.tokenizer(sentence, add_special_tokens=False)["input_ids"][:6]
                if key not in store:
                    asked.append(key)
                    store.append([(key, labels_of([*ids, teacher.chat.end_token_ids[0]], vocabulary))])
                text = teacher.chat.tokenizer.decode(ids)
                question = Question(key, passage.key, at, "fact", "train", 1, f"What holds of {sentence[:20]}?")
                answer = Answer(key, text, tuple(ids), True, 0.9, 0.9, "", 0.1, text)
                candidates.append(Candidate(question, answer, passage))
        split = Split(train=candidates[2:], hold=[], exam=candidates[:1], left_out=candidates[1:2], leaks=[])
        exam_questions.save(folder, split)
        lost = {"question": "What?", "answer": "no idea", "reason": "no answer", "detail": "<b>no</b> idea"}
        (folder / "dropped.jsonl").write_text(json.dumps(lost) + "\n")
        return Studied(split, "chat", store)

    return study


def labels_of(tokens: list[int], vocabulary: int) -> Labels:
    """Each token with 0.7, the one after it with 0.2."""
    ids = np.full((len(tokens), COLUMNS), -1, dtype=np.int32)
    logprobs = np.full((len(tokens), COLUMNS), -np.inf, dtype=np.float16)
    ids[:, 0], ids[:, 1] = tokens, [(token + 1) % vocabulary for token in tokens]
    logprobs[:, 0], logprobs[:, 1] = np.log(0.7), np.log(0.2)
    return Labels(np.array(tokens, dtype=np.int32), ids, logprobs)


def signed_anew(folder: Path, **files: bytes) -> Path:
    """The checkpoint with other files under a manifest that fits them, as a stranger could send it."""
    content = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}
    content |= {name.replace("_", "."): data for name, data in files.items()}
    about = {"versions": ABOUT["versions"]}
    shutil.rmtree(folder)

    def write(place: Path) -> None:
        for name, data in content.items():
            (place / name).write_bytes(data)

    disk.publish_folder(folder, write, about)
    return folder


def poison_slots(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """What a layer that came leaves behind in its slot holds no weight of anybody's; for good in a process of a run."""
    let_go = Ring.let_go

    def poison(ring: Ring, layer: int) -> None:
        slot = ring._slot_of(layer)
        let_go(ring, layer)
        if slot is not None and not slot.blob.is_meta:
            slot.blob.fill_(0xFF)
            slot.layer = None

    if monkeypatch is None:
        Ring.let_go = poison  # type: ignore[method-assign]
    else:
        monkeypatch.setattr(Ring, "let_go", poison)


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[16] ^= 1
    path.write_bytes(raw)


def run_out_of_slots(monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
    """Memory runs out once, when a blob is sent for the `at`th time; says after how many slots were there."""
    seen: list[int] = []
    send = HostStore.send

    def counted(store: HostStore, layer: int, *rest: Any) -> Any:
        seen.append(layer)
        if len(seen) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 1.00 MiB free.")
        return send(store, layer, *rest)

    monkeypatch.setattr(HostStore, "send", counted)
    return seen


def fail_in_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Memory runs out once in the forward pass of that step."""
    from qlora.training.loop import Training

    done: list[int] = []
    gather = Training._micro_steps

    def failing(training: Training, state: Any, batches: Any, weight: float) -> Any:
        if not done and state.step + 1 == step:
            done.append(step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB. GPU 0 has 1.00 MiB free.")
        return gather(training, state, batches, weight)

    monkeypatch.setattr(Training, "_micro_steps", failing)
