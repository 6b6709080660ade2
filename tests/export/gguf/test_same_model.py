"""A GGUF file of another model is told by its shape, though its tokens are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import ExportError
from qlora.events import Recorder
from qlora.export.gguf import same_model
from qlora.export.gguf.plan import Tokens
from qlora.export.llama_cpp import runtime
from qlora.model.resolve import resolve
from tests.export.gguf.written import write_base
from tests.families import make_base, make_tokenizer


def test_another_model_is_told_by_its_shape(llama: Path, tmp_path: Path) -> None:
    found = runtime.find_runtime()
    if found is None:
        pytest.skip("llama.cpp is not installed")
    file = write_base(llama, tmp_path / "written", ("f16",))["f16"]
    tokenizer = make_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in same_model.TEXTS]
    same_model.check(file, found, resolve(str(llama), "main", Recorder()), Tokens(), ids)
    deeper = make_base("llama", tmp_path / "deeper", overrides={"num_hidden_layers": 3})
    with pytest.raises(ExportError, match=r"block_count is .*, not 3"):
        same_model.check(file, found, resolve(str(deeper), "main", Recorder()), Tokens(), ids)
    other = make_base("qwen3", tmp_path / "other")
    with pytest.raises(ExportError, match="is another model than this run's"):
        same_model.check(file, found, resolve(str(other), "main", Recorder()), Tokens(), ids)
    with pytest.raises(ExportError, match="another tokenizer"):
        same_model.check(file, found, resolve(str(llama), "main", Recorder()), Tokens(), [[1]] * len(ids))
