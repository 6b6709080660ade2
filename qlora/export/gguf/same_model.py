"""Whether a GGUF file is of the model that it is asked for: by its architecture, its shape and its tokens.

Its names are anybody's to change, and an earlier run's file has all of that in common: they are told, not judged.
"""

from __future__ import annotations

from pathlib import Path

from qlora.errors import ExportError
from qlora.export.gguf.plan import Tokens, plan
from qlora.export.gguf.probes import PROBE_TEXTS
from qlora.export.llama_cpp import runtime
from qlora.model.base_folder import BaseFolder
from qlora.shown import one_line

TEXTS = PROBE_TEXTS[:20]  # whose tokens are compared
# Whatever a converter leaves out or rounds otherwise, these are the same in every file of a model.
_SHAPE = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_NAMES = ("general.finetune", "general.name")
_AGAIN = "name what was exported from this run: a merged folder or a GGUF file"


def check(file: Path, llama: runtime.Runtime, base: BaseFolder, tokens: Tokens, ids: list[list[int]]) -> str:
    """What the file calls its fine-tuning, or itself; "" for nothing. `ids`: of TEXTS, by the model's tokenizer.

    Raises ExportError for a file that llama.cpp cannot read, and for another model's.
    """
    try:
        layout = plan(base, None, tokens, ()).layout
        expected = {key: str(value) for key, value in layout.keys if key.partition(".")[2] in _SHAPE}
        expected |= {"general.architecture": layout.arch}
    except ExportError:  # we make no such file of this base; by another's tokens it can be told all the same
        expected = {}
    request = runtime.Request(texts=TEXTS, add_special=False, keys=(*expected, *_NAMES))
    with runtime.ask(llama, file, request) as answer:
        found, values = [list(ids) for ids in answer.tokenized], answer.values
    for key, value in expected.items():
        if key in values and values[key] != value:
            what = f"{file}: is another model than this run's: its {key} is {one_line(values[key][:40])}, not {value}"
            raise ExportError(what, _AGAIN)
    if sum(one != other for one, other in zip(found, ids, strict=True)) > len(TEXTS) // 4:
        raise ExportError(f"{file}: has another tokenizer than this run's model", _AGAIN)
    return next((values[name] for name in _NAMES if values.get(name)), "")
