"""All that must hold before a GGUF file is written, found without reading a weight: also checked before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile

from qlora.errors import ExportError
from qlora.export.gguf.architectures import Layout, lay_out
from qlora.export.gguf.quant_mixes import QUANTS, MixHparams, TypeChoice, choose_types
from qlora.export.gguf.vocab import Vocab, read_vocab
from qlora.export.llama_cpp.library import Ggml, find_library
from qlora.export.merge.parts import expert_pieces
from qlora.files import inside
from qlora.model.base_folder import BaseFolder
from qlora.model.meta_model import MetaModel, build
from qlora.model.tokenizer_files import TokenizerFiles, read_files

_KEPT = "experts stay in MXFP4, as they were published, in every quant: another type would round them a second time"


@dataclass(frozen=True)
class GgufPlan:
    """A model's layout and vocabulary, the types of its tensors for each quant, and ggml where a quant needs it."""

    layout: Layout
    vocab: Vocab
    choices: Mapping[str, TypeChoice]
    library: Ggml | None

    @property
    def notices(self) -> tuple[str, ...]:
        fallbacks = [f"{quant}: {notice}" for quant, choice in self.choices.items() if (notice := choice.notice())]
        kept = [_KEPT] if self.layout.kept and self.choices else []
        return (*self.layout.notices, *self.vocab.warnings, *fallbacks, *kept)


@dataclass(frozen=True)
class Tokens:
    """Where the vocabulary is read: the files of the trained tokenizer, and what overrides what stands in them."""

    files: TokenizerFiles | None = None  # None: the base's own
    template: str | None = None
    pre: str | None = None


def plan(
    base: BaseFolder,
    shapes: Mapping[str, tuple[int, ...]] | None,
    tokens: Tokens,
    quants: Sequence[str],
    has_imatrix: bool = False,
    meta_model: MetaModel | None = None,
) -> GgufPlan:
    """The plan for a model of `base` whose stored parameters are `shapes` (None: the base's own).

    `meta_model` is the base's (None: built here). Raises ExportError for whatever llama.cpp cannot express, for a quant
    that needs a ggml that is not installed, and for a tokenizer that llama.cpp would read in another way.
    """
    meta_model = meta_model or build(base)
    pieces = expert_pieces(base, meta_model)
    if shapes is None:
        weights = meta_model.model.state_dict()
        shapes = {name: tuple(weights[name].shape) for name in meta_model.sources}
        stored = {name: base.tensors.get(piece.tensor) for name, (_, piece) in pieces.items()}
        shapes |= {name: entry.shape for name, entry in stored.items() if entry is not None}
    layout = lay_out(meta_model.model, shapes, pieces)
    mixed = [quant for quant in quants if QUANTS[quant].of_experts]
    if mixed and not layout.experts:
        what = f"{mixed[0]}: puts experts into MXFP4, and {base.name} has none"
        raise ExportError(what, "take q8_0, which it would be, or q4_k_m")
    with _tokenizer_folder(base, tokens.files) as folder:
        vocab = read_vocab(folder, shapes["model.embed_tokens.weight"][0], pre=tokens.pre, template=tokens.template)
    hparams = MixHparams(layout.layers, layout.heads, layout.kv_heads, layout.experts)
    named = list(layout.stored.items())
    choices = {quant: choose_types(quant, layout.arch, hparams, named, has_imatrix) for quant in quants}
    choices = {quant: choice.keeping(layout.kept) for quant, choice in choices.items()}
    needed = any(QUANTS[quant].needs_library for quant in quants)
    return GgufPlan(layout, vocab, choices, find_library() if needed else None)


@contextmanager
def _tokenizer_folder(base: BaseFolder, trained_with: TokenizerFiles | None) -> Iterator[Path]:
    """A private folder with the tokenizer of the training, beside the base's configuration.

    Which tokens end an answer stands in the base's generation_config.json, which an adapter's folder does not have.
    """
    with (trained_with or read_files(base.path)).placed() as folder:
        for name in ("config.json", "generation_config.json"):
            if (file := inside(base.path, name)).is_file():
                copyfile(file, folder / name)
        try:
            yield folder
        except ExportError as error:  # it names the folder that it was given, which nobody knows
            raise ExportError(error.what.replace(str(folder), base.name), error.hint) from error
