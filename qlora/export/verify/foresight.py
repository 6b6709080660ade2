"""What can be said of an export before its model is trained: whether it can be, and what measuring it takes."""

from __future__ import annotations

import math

from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.model.base_folder import BaseFolder
from qlora.model.family_facts import facts_of
from qlora.model.meta_model import text_config
from qlora.model.tokenizer_files import TokenizerFiles
from qlora.recipe.sections import ExportSection

BF16_BYTES = 2


def foresee_measuring(section: ExportSection, base: BaseFolder, limit_bytes: int, sink: Sink) -> None:
    """A notice where exports of this base are measured by the whole model, which takes more memory than layer by layer.

    `limit_bytes` is what there is. Raises ExportError where the recipe asks for an export that will not be measured.
    """
    text, _ = text_config(base.config, base.name)
    if not (reason := facts_of(text, base.name).layerwise):
        return
    # A byte of a stored 4-bit weight holds two values.
    stored = [math.prod(entry.shape) * (2 if entry.dtype == "U8" else 1) for entry in base.tensors.values()]
    needed = BF16_BYTES * sum(stored)
    takes = f"takes {needed / 2**30:.2f} GiB, not a layer at a time ({reason})"
    if needed <= limit_bytes:
        sink.emit(Notice("verify", f"measuring an export of this base {takes}"))
        return
    what = f"{base.name}: measuring an export of it {takes}; {limit_bytes / 2**30:.2f} GiB are there"
    if section.formats:
        raise ExportError(what, "leave out export.formats, and export with verify=False when it is trained")
    sink.emit(Notice("verify", f"{what}: export with verify=False"))


def foresee_gguf(
    section: ExportSection, base: BaseFolder, files: TokenizerFiles, template: str | None, sink: Sink
) -> None:
    """A notice before training whether its result can become a GGUF; ExportError where the recipe asks for one."""
    from qlora.export.gguf.plan import Tokens, plan

    quants = [name.removeprefix("gguf:") for name in section.formats if name.startswith("gguf:")]
    try:
        foreseen = plan(base, None, Tokens(files, template), quants, section.imatrix)
    except ExportError as error:
        if any("gguf" in name for name in section.formats):
            raise
        sink.emit(Notice("gguf", f"a model trained on this base cannot be exported as GGUF: {error.what}"))
        return
    vocab = foreseen.vocab.pre if foreseen.vocab.model == "gpt2" else "SentencePiece"
    sink.emit(Notice("gguf", f"this base exports to GGUF: {foreseen.layout.arch}, tokenizer {vocab}"))
    for notice in foreseen.notices:
        sink.emit(Notice("gguf", notice))
