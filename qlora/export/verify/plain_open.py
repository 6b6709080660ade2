"""Whether plain transformers opens an exported folder as its reader will: config, tokenizer, and every weight's place.

The model is opened on `meta`, where weights have names and shapes and no bytes, so that the largest takes no memory;
their values are compared by `weights_child`, in whose process this runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import foreign_failures
from qlora.model import mxfp4_config
from qlora.model.tensors import load_json
from qlora.third_party import draw_no_bars

Result = tuple[str, bool, str]  # what was checked, whether it holds, in detail

_CHECK = "opens in transformers"
_NAMED = 3


def opens(folder: Path) -> Result:
    """Open a folder of safetensors by transformers' own doors, with no code of ours and none of the folder's."""
    draw_no_bars()
    with foreign_failures() as failure:
        model, loaded = _model(folder)
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            _tokenizer(folder)
    if failure.error:
        return _CHECK, False, f"it does not: {failure.reason}"
    wrong = [
        f"{name} is {what}"
        for key, what in (("missing_keys", "missing"), ("unexpected_keys", "read by nothing"))
        for name in sorted(loaded[key])
    ]
    more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
    return _CHECK, not wrong, "; ".join(wrong[:_NAMED]) + more if wrong else f"as {type(model).__name__}"


def _model(folder: Path) -> tuple[Any, Mapping[str, Any]]:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    # Where it finds Triton and a GPU, transformers would get kernels for MXFP4 from the hub.
    in_mxfp4 = mxfp4_config.is_stated(load_json(folder / "config.json"))
    how = {"quantization_config": Mxfp4Config(dequantize=True)} if in_mxfp4 else {}
    return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
        folder,
        dtype="auto",
        device_map={"": "meta"},
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=False,
        **how,
    )


def _tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
