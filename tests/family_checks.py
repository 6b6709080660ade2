"""What is asked of every family: loads, same loss as transformers, packs, trains, merges as PEFT does, opens, GGUF.

Each question is a function from a `Trial` to a short answer; a refusal is an answer too, in the error's own words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora import api
from qlora.batch import Batch
from qlora.errors import QloraError
from qlora.events import Recorder
from qlora.export.artifacts import ExportOptions
from qlora.model.load import load_base
from qlora.model.resolve import resolve, resolve_config
from qlora.recipe.reading import load_recipe
from qlora.recipe.sections import QuantizationSection
from qlora.step.forward import CausalParts, batch_logprobs
from tests import runs
from tests.all_families import MIXTURES, VOCAB, make_base

CPU = torch.device("cpu")
LOSS_TOLERANCE = 1e-5  # mean absolute difference of log-probabilities in fp32, nats
LEAK_TOLERANCE = 1e-3  # of packed rows, which other kernels compute
MERGE_TOLERANCE = 1e-5
MOST_KL = 1e-2  # nats, of the merged model to the trained one: what rounding to bf16 leaves
STEPS = 3
ROWS = 8
# A rate at which three steps move every adapter far enough for a wrong merge to show.
SETTINGS = (
    *(f"train.max_steps={STEPS}", "train.learning_rate=2e-3", "train.batch_size=4", "train.warmup_ratio=0"),
    *("data.eval_fraction=0.25", "eval.samples=1"),
)
TEXT = "What is the price of the lamp?"
ROW_LENGTHS = (37, 22)


class Answer(NamedTuple):
    """Whether the family is right in this column, and what stands there."""

    right: bool
    text: str


@dataclass
class Trial:
    """One family under trial in a folder of its own."""

    family: str
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)
    failed: Exception | None = None

    @cached_property
    def base(self) -> Path:
        return make_base(self.family, self.folder / "base")

    @cached_property
    def recipe(self) -> Path:
        recipe = runs.write_recipe(self.folder / "run", self.base)
        runs.write_rows(recipe.parent / "rows.jsonl", ROWS)
        return recipe

    @cached_property
    def run(self) -> Path:
        """The folder of a short run with the default recipe."""
        if self.failed is not None:  # asked for by several columns, told once
            raise self.failed
        try:
            api.train(load_recipe(self.recipe, SETTINGS), name="tiny", sink=self.recorder)
        except Exception as error:
            self.failed = error
            raise
        return runs.run_dir(self.recipe)

    def plain(self) -> Any:
        """The base as transformers alone opens it, in fp32."""
        return _plain(self.base)

    @cached_property
    def exported(self) -> Path:
        """The run's model merged onto the original weights, in fp32."""
        options = ExportOptions(verify=False, dtype="f32")
        out = self.folder / "hf"
        return api.merge_and_export(self.run, to="hf", merge_base="full", out=out, options=options).folder

    @cached_property
    def merged_by_peft(self) -> Any:
        """transformers' own model with the run's adapter merged by PEFT, in fp32."""
        from peft import PeftModel

        model = PeftModel.from_pretrained(self.plain(), str(self.run / "adapter"), autocast_adapter_dtype=False)
        return model.merge_and_unload().eval()

    @cached_property
    def logprobs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the two rows: transformers' alone, ours alone and ours in one pack, all in fp32."""
        base = resolve(str(self.base), "main", Recorder())
        ours = load_base(base, QuantizationSection(type="none"), "auto", CPU, Recorder()).float()
        # Both are opened in bf16 first, which rounds the tables that a class computes (XGLM's sinusoids).
        parts, theirs = CausalParts.of(ours), _plain(self.base, torch.bfloat16).float()
        rows = [_row(length) for length in ROW_LENGTHS]
        with torch.no_grad():
            reference = torch.cat([_plain_logprobs(theirs, row) for row in rows])
            alone = torch.cat([batch_logprobs(parts, _batch([row])) for row in rows])
            packed = batch_logprobs(parts, _batch(rows))
        return reference, alone, packed


def loads(trial: Trial) -> Answer:
    """With our loader, in 4 bit; of a mixture its configuration alone is asked: its tiny ones are in `mixtures`."""
    if trial.family in MIXTURES:
        try:
            resolve_config(str(trial.base), "main", trial.recorder)
        except QloraError as error:
            return Answer("experts" in error.what, f"refused: {error.what.partition(': ')[2]}")
        return Answer(True, "its experts can be held")
    base = resolve(str(trial.base), "main", trial.recorder)
    model = load_base(base, QuantizationSection(), "auto", CPU, trial.recorder)
    in_4bit = sum(type(module).__name__ == "Linear4bit" for module in model.modules())
    return Answer(in_4bit > 0, f"{in_4bit} layers in 4 bit")


def loss(trial: Trial) -> Answer:
    """Log-probabilities of single rows, ours and plain transformers', in fp32."""
    reference, alone, _ = trial.logprobs
    off = float((alone - reference).abs().mean())
    return Answer(off <= LOSS_TOLERANCE, f"{off:.1e}")


def packing(trial: Trial) -> Answer:
    """Whether two rows of one pack are computed as alone; the run must know it too."""
    reference, _, packed = trial.logprobs
    off = float((packed - reference).abs().mean())
    safe, packs = off <= LEAK_TOLERANCE, _packs(trial)
    text = f"{'safe' if safe else 'leaks'} {off:.1e}, {'on' if packs else 'off'}"
    return Answer(safe or not packs, text)


def trains(trial: Trial) -> Answer:
    """Some steps with the default recipe: all of its losses are numbers."""
    losses = [event.as_dict()["loss"] for event in (trial.run, trial.recorder)[1].of("step")]
    right = len(losses) == STEPS and all(torch.isfinite(torch.tensor(losses)))
    return Answer(right, f"{losses[0]:.2f} to {losses[-1]:.2f}")


def merges(trial: Trial) -> Answer:
    """The adapter merged onto the original weights in fp32, by us and by PEFT."""
    ours, theirs, before = (
        model.state_dict() for model in (_plain(trial.exported), trial.merged_by_peft, trial.plain())
    )
    if ours.keys() != theirs.keys():
        return Answer(False, f"another model than PEFT's: {sorted(ours.keys() ^ theirs.keys())[0]}")
    off = max(float((ours[name] - theirs[name].float()).abs().max()) for name in ours)
    moved = sum(bool((ours[name] - before[name]).abs().max() > 1e-4) for name in ours)
    return Answer(off <= MERGE_TOLERANCE and moved > 0, f"{off:.1e}, {moved} tensors")


def opens(trial: Trial) -> Answer:
    """The exported folder, opened by plain transformers in a process of its own: the loss of PEFT's merge."""
    found, wanted = _opened_apart(trial.exported), _loss(trial.merged_by_peft, trial.exported)
    if isinstance(found, str):
        return Answer(False, f"does not open: {found}")
    return Answer(abs(found - wanted) <= LOSS_TOLERANCE, f"loss {found:.4f}, PEFT's {wanted:.4f}")


def measured(trial: Trial) -> Answer:
    """The export measures itself against the trained model."""
    report = api.merge_and_export(trial.run, to="hf", out=trial.folder / "measured", sink=trial.recorder)
    kl = [line.kl for line in report.fidelity if line.name == "hf"]  # the first line is the trained model itself
    broken = [f"{name}: {detail}" for _, name, holds, detail in report.checks if not holds]
    near = bool(kl) and kl[0] <= MOST_KL
    return Answer(near and not broken, broken[0] if broken else f"KL {kl[0]:.1e}" if kl else "not measured")


def gguf(trial: Trial) -> Answer:
    """What the run says before training: the architecture in llama.cpp, or why there is none."""
    told = [event.as_dict()["message"] for event in (trial.run, trial.recorder)[1].of("notice")]
    for beginning in ("this base exports to GGUF: ", "cannot be exported as GGUF: "):
        if found := [message for message in told if beginning in message]:
            kind = "yes, " if beginning.startswith("this") else "refused: "
            return Answer(True, kind + found[0].partition(beginning)[2])
    return Answer(False, "the run says nothing about GGUF")


CHECKS: Mapping[str, Callable[[Trial], Answer]] = {
    "loads": loads,
    "loss": loss,
    "packing": packing,
    "trains": trains,
    "merge": merges,
    "opens": opens,
    "measured": measured,
    "gguf": gguf,
}


def answers(family: str, folder: Path, only: tuple[str, ...] = ()) -> Iterator[tuple[str, Answer]]:
    """Each column with a family's answer, one after the other; of a mixture the first alone."""
    trial = Trial(family, folder)
    for column in only or (("loads",) if family in MIXTURES else tuple(CHECKS)):
        yield column, _asked(CHECKS[column], trial)


def _asked(check: Callable[[Trial], Answer], trial: Trial) -> Answer:
    try:
        return check(trial)
    except QloraError as error:
        return Answer(False, f"refused: {error.what}")
    except Exception as error:  # whatever it is: a line of the table
        return Answer(False, f"internal error: {type(error).__name__}: {str(error)[:200]}")


def _opened_apart(folder: Path) -> float | str:
    """The loss of a text with a folder opened by transformers alone, in a forked child; or what went wrong."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        try:
            said = str(_loss(_plain(folder), folder))
        except Exception as error:  # for the table
            said = f"{type(error).__name__}: {str(error)[:150]}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    with suppress(ValueError):
        return float(said)
    return said


def _plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A folder as transformers alone opens it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def _loss(model: Any, folder: Path) -> float:
    """Of one text, by the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT).input_ids])
    with torch.no_grad():
        return float(model(ids, labels=ids, use_cache=False).loss)


def _packs(trial: Trial) -> bool:
    """Whether the run packed its rows."""
    plans = [event.as_dict() for event in (trial.run, trial.recorder)[1].of("plan")]
    return bool(plans[-1]["packing"])


def _row(length: int) -> Tensor:
    return torch.randint(4, VOCAB - 4, (length,), generator=torch.Generator().manual_seed(length))


def _plain_logprobs(model: Any, ids_S: Tensor) -> Tensor:
    logits_SV = model(ids_S.unsqueeze(0), use_cache=False).logits[0].float()
    return torch.log_softmax(logits_SV[:-1], dim=-1).gather(1, ids_S[1:, None]).squeeze(1)


def _batch(rows: list[Tensor]) -> Batch:
    """Rows in one pack, every token but the first of each trained."""
    ids_BS = torch.cat(rows).unsqueeze(0)
    positions_BS = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    documents_BS = torch.cat([torch.full((len(row),), number) for number, row in enumerate(rows)]).unsqueeze(0)
    weights_BS = torch.cat([torch.cat((torch.ones(len(row) - 1), torch.zeros(1))) for row in rows]).unsqueeze(0)
    trained_T = weights_BS.flatten().nonzero().squeeze(1)
    return Batch(ids_BS, positions_BS, documents_BS, ids_BS.roll(-1, 1), weights_BS, trained_T)
