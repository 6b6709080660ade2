"""The folder `adapter/`: the adapter that a run delivers, as PEFT and a person read it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora import disk, run_folder
from qlora.events import Notice, Saved, Sink
from qlora.export.cards import adapter_card
from qlora.model import adapters, lora_functions, precision
from qlora.model.adapter_folder import PROVENANCE_FILE, keep_private
from qlora.model.base_folder import BaseFolder
from qlora.model.delivered_loss import KEY
from qlora.model.identity import BaseIdentity
from qlora.model.tokenizer_files import TokenizerFiles
from qlora.model.weight_names import ClassNames, class_names
from qlora.recipe.reading import Recipe
from qlora.starting_adapter import StartedFrom
from qlora.training.checkpoint import RunState
from qlora.version import __version__


@dataclass(frozen=True)
class BestAdapter:
    """The adapter of the best evaluation so far, and what its folder says about the run."""

    model: Any
    base: BaseFolder
    tokenizer: TokenizerFiles
    recipe: Recipe
    train_rows: int
    eval_rows: int
    identity: BaseIdentity
    started_from: StartedFrom | None = None

    @cached_property
    def _names(self) -> tuple[ClassNames | None, list[str]]:
        """The names in the class that the base names; and what there is to say of them, once."""
        said: list[str] = []
        return class_names(self.base, self.model, said.append), said

    def publish(self, run_dir: Path, state: RunState, sink: Sink) -> None:
        """Write `run_dir/adapter` anew, in one rename."""
        names, said = self._names
        while said:
            sink.emit(Notice("adapter", f"the adapter is {said.pop()}"))
        loss = state.delivered if state.delivered and state.delivered.step == state.step else None

        def write(folder: Path) -> None:
            adapters.save(self.model, folder, self.base.name, self.base.commit, names)
            self.tokenizer.deliver(folder)
            (folder / "README.md").write_text(self.card(state), encoding="utf-8")
            # What the adapter was trained against, for programs: here the base keeps its whole path.
            provenance = {
                "version": __version__,
                "base": self.base.name,
                "revision": self.base.commit or self.recipe.model.revision,
                "fingerprint": self.base.fingerprint,
                "identity": self.identity.model_dump(),
                "quantization": self.recipe.quantization.model_dump(mode="json"),
                "functions": lora_functions.of_run(),
                "dtype": precision.name_of_run(),
                "step": state.step,
                "started_from": self.started_from and self.started_from.model_dump(),
                KEY: None if loss is None else loss.model_dump(),
            }
            disk.write_atomic(folder / PROVENANCE_FILE, json.dumps(provenance, indent=1) + "\n")
            keep_private(folder, self.base.name)

        size = run_folder.publish_adapter(run_dir, write, sink)
        sink.emit(Saved("adapter", state.step, str(run_dir / "adapter"), size))

    def card(self, state: RunState) -> str:
        """The model card: Markdown under the hub's metadata."""
        train = "not measured" if state.train_loss is None else f"{state.train_loss:.4f}"
        measured = "not measured (no evaluation rows)" if state.eval_loss is None else f"{state.eval_loss:.4f}"
        unit = "nats a token" if self.recipe.train.objective == "sft" else f"by {self.recipe.train.objective}"
        facts = {
            "training rows": str(self.train_rows),
            "evaluation rows": str(self.eval_rows),
            "optimizer steps": str(state.step),
            "trained tokens": str(state.trained_tokens),
            "training loss of the last step": f"{train} {unit}",
            "evaluation loss": f"{measured} {unit}",
        }
        before, after = state.exact_match_before, state.exact_match_after
        if before is not None and after is not None:
            facts["exact match"] = f"{before:.1%} before, {after:.1%} after"
        if self.started_from is not None:
            facts["continued from"] = str(self.started_from)
        if (names := self._names[0]) is not None:  # peft finds no place for it on another class
            facts["opens on"] = names.opens_on
        return adapter_card(self.base, self.recipe, facts)
