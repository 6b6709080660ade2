"""The loss of GRPO beside TRL's: the same answers, advantages and log-probabilities before, the same model, in fp32.

    python tools/against_trl_grpo.py --trl-python /path/to/venv/bin/python [--base recipes/quickstart/base]

Ours goes the whole way of a step (micro-batches of unequal answers, head in chunks), TRL's is `_compute_loss` of its
GRPOTrainer over one padded batch, with log-probabilities of the model's own logits.
Leaves with 1 where a loss differs by more than 1e-4 of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MOST_OFF = 1e-4
WAYS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.04},
    "the clipped term alone": {"num_iterations": 2, "beta": 0.0},
    "grpo, two steps on a drawing": {"num_iterations": 2, "beta": 0.2, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "num_iterations": 2, "temperature": 0.7},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="the interpreter of an environment that has trl")
    parser.add_argument("--base", type=Path, default=ROOT / "recipes" / "quickstart" / "base")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)  # the file that is handed over
    asked = parser.parse_args()
    if asked.theirs is not None:
        print(json.dumps({name: trl_loss(asked.base, asked.theirs, name) for name in WAYS}))
        return
    with tempfile.TemporaryDirectory(prefix="against-trl-") as place:
        file = Path(place) / "answers.json"
        ours = our_losses(asked.base, file)
        command = [asked.trl_python or sys.executable, __file__, "--theirs", str(file), "--base", str(asked.base)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    off = {name: abs(ours[name] - theirs[name]) / max(1e-9, abs(theirs[name])) for name in WAYS}
    for name in WAYS:
        print(f"{name}: ours {ours[name]:.7f}, TRL {theirs[name]:.7f}, off by {off[name]:.1e}")
    sys.exit(max(off.values()) > MOST_OFF)


def our_losses(base: Path, file: Path) -> dict[str, float]:
    """The loss of each way, with the answers written to `file`."""
    import torch
    from transformers import AutoModelForCausalLM

    from qlora.step.forward import CausalParts, batch_loss
    from qlora.step.group_relative import advantages_of, at_temperature
    from qlora.step.objectives import objective_of
    from tests.training.answer_cases import REWARDS, batches_over, drawn, train_section

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    found, told = {}, {}
    for name, keys in WAYS.items():
        train = train_section(**keys)
        answers, parts = drawn(advantages_of(REWARDS, train)), CausalParts.of(model)
        parts = replace(parts, transform=at_temperature(parts.transform, train.temperature))
        objective, batches = objective_of(train), batches_over(answers, train).batches_of(answers, 4)
        with torch.no_grad():
            losses = [float(batch_loss(parts, batch, objective)) for batch in batches]
        found[name] = sum(losses) / sum(objective.weight(batch) for batch in batches)
        told[name] = [vars(answer) for answer in answers]
    file.write_text(json.dumps(told))
    return found


def trl_loss(base: Path, file: Path, name: str) -> float:
    """TRL's loss of one batch of all answers; of its trainer there is what the loss asks for."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    keys, answers = WAYS[name], json.loads(file.read_text())[name]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).eval()

    def padded(key: str, left: bool = False, marks: bool = False) -> torch.Tensor:
        longest, rows = max(len(one[key]) for one in answers), []
        for one in answers:
            values = [1] * len(one[key]) if marks else one[key]
            more = [0] * (longest - len(values))
            rows.append(more + values if left else values + more)
        return torch.tensor(rows)

    def logprobs(model: Any, ids: Any, mask: Any, kept: int, **_: Any) -> tuple[Any, Any, None]:
        """By the model's own forward; TRL's trainer has another one put into the model."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -kept - 1 : -1]
        found = torch.log_softmax(logits.float() / settings["temperature"], dim=-1)
        return found.gather(2, ids[:, -kept:, None])[..., 0], torch.zeros(len(ids), kept), None

    trainer: Any = object.__new__(GRPOTrainer)
    settings = {"beta": 0.04, "epsilon": 0.2, "temperature": 1.0, "loss_type": "grpo", **keys}
    known = {
        "args": GRPOConfig(
            output_dir=str(file.parent / "trl"), use_cpu=True, bf16=False, report_to=[], use_bias_correction_kl=False
        ),
        "beta": settings["beta"],
        "loss_type": settings["loss_type"],
        "temperature": settings["temperature"],
        "epsilon_low": settings["epsilon"],
        "epsilon_high": settings.get("epsilon_high", settings["epsilon"]),
        "max_completion_length": 12,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "current_gradient_accumulation_steps": 1,
        "model": model,
        "model_kwarg_keys": {"logits_to_keep"},
        "accelerator": Accelerator(cpu=True),
        "_metrics": {mode: defaultdict(list) for mode in ("train", "eval")},
    }
    for key, value in {**known, "_get_per_token_logps_and_entropies": logprobs}.items():
        setattr(trainer, key, value)
    inputs = {
        "prompt_ids": padded("prompt_ids", left=True),
        "prompt_mask": padded("prompt_ids", left=True, marks=True),
        "completion_ids": padded("token_ids"),
        "completion_mask": padded("token_ids", marks=True),
        "advantages": torch.tensor([one["advantage"] for one in answers]),
        "ref_per_token_logps": padded("reference"),
    }
    if keys.get("num_iterations", 1) > 1:
        inputs["old_per_token_logps"] = padded("old")
    with torch.no_grad():
        return float(trainer._compute_loss(model, inputs))


if __name__ == "__main__":
    main()
