"""Declarations of families: each key that a configuration's class declares is accounted for, other values are named."""

from __future__ import annotations

from typing import Any

import pytest

from qlora.errors import ExportError
from qlora.export.gguf.architectures import lay_out
from qlora.export.gguf.families import FAMILIES
from qlora.export.gguf.family import unaccounted
from tests.export.gguf.cases import shapes_of
from tests.families import make_config, make_model


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_declared_key_is_accounted_for(model_type: str) -> None:
    """A key that a later transformers adds is refused by name where its value is not the usual one."""
    from transformers import AutoConfig

    assert not unaccounted(FAMILIES[model_type], AutoConfig.for_model(model_type))


def test_a_key_that_nobody_accounts_for_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.export.gguf import family

    config: Any = make_config("llama")
    model = make_model(config)
    monkeypatch.setattr(family, "NEUTRAL", family.NEUTRAL - {"pretraining_tp"})
    assert lay_out(model, shapes_of(model)).arch == "llama"
    config.pretraining_tp = 2
    with pytest.raises(ExportError, match="pretraining_tp = 2 of llama"):
        lay_out(model, shapes_of(model))
