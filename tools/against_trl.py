"""Losses of preference beside TRL's trainers: the same rows, the same tokens, the same two models, in fp32.

    python tools/against_trl.py --trl-python /path/to/venv/bin/python [--rows 8] [--base recipes/quickstart/base]

The reference is the base; the model is the base with noise on every weight. Our loss goes the whole way of a step
(packed rows, answers as documents, head in chunks), TRL's through `compute_loss` of its trainer over one batch of all
rows. KTO's mismatched answers are handed over too: TRL takes the answer of the row before, ours is of the row behind
that has another question. Of ORPO the odds ratio's part is compared: TRL's own loss of answers is one of questions too,
over the tokens of a batch, where the paper's equation 6 has that of answers. Leaves with 1 where a loss differs by more
than 1e-4 of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MOST_OFF = 1e-4
NOISE = 0.02
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "orpo": {},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.7},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.75},
}
OURS: dict[str, dict[str, float]] = {
    "orpo": {"sft_weight": 0.0},
    "simpo": {"simpo_gamma": 0.7},
    "kto": OBJECTIVES["kto"],
}
BETA = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the interpreter of an environment that has trl")
    parser.add_argument("--base", type=Path, default=ROOT / "recipes" / "quickstart" / "base")
    parser.add_argument("--rows", type=int, default=8, help="pairs")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)  # the folder that is handed over
    asked = parser.parse_args()
    if asked.theirs is not None:
        print(json.dumps({name: trl_loss(asked.theirs, name) for name in OBJECTIVES}))
        return
    with tempfile.TemporaryDirectory(prefix="against-trl-") as place:
        ours = our_losses(asked.base, asked.rows, Path(place))
        command = [asked.trl_python or sys.executable, __file__, "--theirs", place]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    off = {name: abs(ours[name] - theirs[name]) / max(1e-9, abs(theirs[name])) for name in OBJECTIVES}
    for name in OBJECTIVES:
        print(f"{name}: ours {ours[name]:.7f}, TRL {theirs[name]:.7f}, off by {off[name]:.1e}")
    sys.exit(max(off.values()) > MOST_OFF)


# --- ours -------------------------------------------------------------------------------------------------------------


def our_losses(base: Path, count: int, place: Path) -> dict[str, float]:
    """The mean loss of each objective, with everything that TRL needs for it written to `place`."""
    import torch
    from make_preference_rows import pairs
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.data.chat import ChatTokenizer
    from qlora.data.judged_splits import mismatched
    from qlora.data.prepare import prepare
    from qlora.events import Sinks
    from qlora.recipe.sections import DataSection, SourceSection

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    reference, model = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False) for _ in range(2)
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE * parameter.std())
    for name, one in (("reference", reference), ("model", model)):
        one.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()[0][:count]))
    source = SourceSection(path=str(place / "rows.jsonl"), format="preference")
    data = DataSection(train=(source,), eval_fraction=0.0, max_length=256)
    chat = ChatTokenizer(tokenizer, "assistant", Sinks())
    split = prepare(data, "against trl", chat, 0, place / "cache", Sinks()).train
    others = mismatched(split)
    rows = [_parts(one) for one in split.rows]
    answers_of_others = [_parts(one)["answer"] for one in others.rows]
    (place / "rows.json").write_text(json.dumps({"rows": rows, "others": answers_of_others}))
    return {name: _loss(model, reference, split, others, name) for name in OBJECTIVES}


def _parts(row: Any) -> dict[str, list[int]]:
    begin = next(at for at, weight in enumerate(row.loss_weights) if weight)
    until = max(at for at, weight in enumerate(row.loss_weights) if weight) + 1
    return {"question": row.input_ids[:begin], "answer": row.input_ids[begin:until]}


def _loss(model: Any, reference: Any, split: Any, others: Any, name: str) -> float:
    import torch

    from qlora.data.loader import collate
    from qlora.objective_keys import ObjectiveKeys
    from qlora.step.forward import CausalParts, batch_logprobs
    from qlora.step.objectives import PreferenceObjective, answers_of

    packs = [tuple(range(row, row + 4)) for row in range(0, len(split.lengths), 4)]

    def told(one: Any) -> list[float]:
        parts, found = CausalParts.of(reference), []
        with torch.no_grad():
            for members in packs:
                batch = collate(one, [members], 0, 1024)
                found += answers_of(batch_logprobs(parts, batch), batch).logprobs_R.tolist()
        return found

    others = replace(others, preference=others.preference._replace(reference=told(others)))
    whole = replace(split, preference=split.preference._replace(reference=told(split), others=others))
    keys = ObjectiveKeys.model_validate({"objective": name, "beta": BETA, **OURS.get(name, {})})
    objective, parts = PreferenceObjective(keys), CausalParts.of(model)
    batches = [collate(whole, [members], 0, 1024) for members in packs]
    with torch.no_grad():
        objective.begin(batches, lambda batch: batch_logprobs(parts, batch))
        losses = [float(objective.loss(batch_logprobs(parts, batch), batch)) for batch in batches]
    return sum(losses) / sum(objective.weight(batch) for batch in batches)


# --- TRL's ------------------------------------------------------------------------------------------------------------


def trl_loss(place: Path, name: str) -> float:
    """TRL's loss of one batch of all rows, whose tokens are given."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    told = json.loads((place / "rows.json").read_text())
    rows, others = told["rows"], told["others"]
    if name in ("orpo", "simpo"):
        return trl_loss_without_reference(place, name, rows)
    model, reference = (
        AutoModelForCausalLM.from_pretrained(place / one, dtype=torch.float32, trust_remote_code=False)
        for one in ("model", "reference")
    )
    common = {
        "output_dir": str(place / "trl"),
        "beta": BETA,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "report_to": [],
    }
    if name == "kto":
        data = [
            {
                "prompt_ids": row["question"],
                "completion_ids": row["answer"],
                "KL_completion_ids": other,
                "label": at % 2 == 0,
            }
            for at, (row, other) in enumerate(zip(rows, others, strict=True))
        ]
        kind = {**common, **OBJECTIVES[name]}
        config, trainer_class = KTOConfig(per_device_train_batch_size=len(data), **kind), KTOTrainer
    else:
        data = [
            {"prompt_ids": one["question"], "chosen_ids": one["answer"], "rejected_ids": other["answer"]}
            for one, other in zip(rows[::2], rows[1::2], strict=True)
        ]
        kind = {**common, **OBJECTIVES[name]}
        config, trainer_class = DPOConfig(per_device_train_batch_size=len(data), **kind), DPOTrainer

    class AsGiven(trainer_class):  # type: ignore[misc, valid-type]
        """Takes the tokens that it is given, of which it would make prompts and answers itself."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    trainer = AsGiven(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(place / "model", trust_remote_code=False),
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)))


def trl_loss_without_reference(place: Path, name: str, rows: list[dict[str, list[int]]]) -> float:
    """TRL's loss of tensors of all rows: their making is left out, their work from there on is its trainer's own."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32, trust_remote_code=False)
    trainer = object.__new__(ORPOTrainer if name == "orpo" else CPOTrainer)
    known: dict[str, Any] = {
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "aux_loss_enabled": False,
    }
    known |= {"accelerator": Accelerator(cpu=True), "beta": BETA, "alpha": 0.0, "label_smoothing": 0.0}
    for key, value in {**known, **OBJECTIVES[name]}.items():
        setattr(trainer, key, value)
    batch: dict[str, Any] = {}
    for side, some in (("chosen", rows[::2]), ("rejected", rows[1::2])):
        longest = max(len(row["question"]) + len(row["answer"]) for row in some)
        ids, labels = torch.zeros(len(some), longest, dtype=torch.int64), torch.full((len(some), longest), -100)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(some):
            begin, end = len(row["question"]), len(row["question"]) + len(row["answer"])
            ids[at, :end] = torch.tensor(row["question"] + row["answer"])
            labels[at, begin:end], mask[at, :end] = torch.tensor(row["answer"]), 1
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": mask}
    with torch.no_grad():
        if name == "orpo":
            better, worse, *_ = trainer.concatenated_forward(model, batch)
            return float(-trainer.odds_ratio_loss(better, worse)[0].mean())
        return float(trainer.get_batch_loss_metrics(model, batch)[0])


if __name__ == "__main__":
    main()
