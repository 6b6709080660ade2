"""An adapter merged and written in both formats, and what its files must hold asked as the child process asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlora.events import Recorder
from qlora.export.gguf import plan as planning
from qlora.export.gguf import vocab, write
from qlora.export.gguf.metadata import entries
from qlora.export.staging import StagedExport
from qlora.export.verify.weights import Check, Target, gguf_target, require
from qlora.export.verify.weights_child import compare_weights, open_folder, open_gguf
from qlora.model.resolve import resolve
from qlora.recipe.sections import LoraSection, QuantizationSection
from tests.export.cases import merge_of, trained
from tests.export.hf_folder import write_hf

NF4 = QuantizationSection()
QUANTS = ("f16", "q8_0")


class Case:
    """An adapter merged, and written in both formats."""

    def __init__(
        self, base: Path, folder: Path, lora: LoraSection, merge_base: Any = "nf4", quants: tuple[str, ...] = QUANTS
    ) -> None:
        trained(base, folder / "adapter", lora)
        found = resolve(str(base), "main", Recorder())
        exact = merge_of(base, folder / "adapter", merge_base=merge_base, quantization=NF4)
        self.merge = replace(exact, dtype=torch.bfloat16)
        write_hf(self.merge, folder / "hf", Recorder())
        self.folder = folder / "hf"
        shapes = {tensor.parameter: tensor.shape for tensor in self.merge.tensors()}
        self.plan = planning.plan(found, shapes, planning.Tokens(), quants)
        self.keys = (*entries(list(self.plan.layout.keys)), *vocab.metadata(self.plan.vocab))
        self.files = {quant: folder / quant / f"{quant}.gguf" for quant in quants}
        planned = [write.GgufFile(q, file.name, self.keys, self.types(q)) for q, file in self.files.items()]
        with StagedExport.open({q: file.parent for q, file in self.files.items()}, exact.identity(), 0) as staged:
            tools = write.Tools(self.plan.library, {})
            write.write(self.plan.layout, exact.tensors(), planned, staged, tools, Recorder())
            for quant in quants:
                staged.publish(quant)

    def types(self, quant: str) -> Any:
        return self.plan.choices[quant].types

    def target(self, quant: str, file: Path | None = None) -> Target:
        return gguf_target(file or self.files[quant], self.types(quant), self.keys)

    def require_folder(self, folder: Path) -> list[Check]:
        """As the child does, without its two seconds of imports. Raises ExportError naming the first that fails."""
        return self._require(folder, open_folder(folder, self.merge, "BF16"))

    def require_file(self, quant: str, file: Path) -> list[Check]:
        target = self.target(quant, file)
        return self._require(file, open_gguf(file, self.plan.layout, target.types, target.keys))

    def _require(self, path: Path, opened: Any) -> list[Check]:
        compare_weights(self.merge, [opened])
        checks = [Check(*result) for result in opened.conclude()]
        require(path, checks)
        return checks
