"""The families whose GGUF files are shown to compute what transformers computes, a table a kind of block."""

from __future__ import annotations

from collections.abc import Mapping

from qlora.export.gguf.families import gemma, latent, layer_norm, llama_like, mixtures, recurrent, windowed
from qlora.export.gguf.family import Family

# By transformers' model type.
FAMILIES: Mapping[str, Family] = {
    **llama_like.FAMILIES,
    **windowed.FAMILIES,
    **layer_norm.FAMILIES,
    **gemma.FAMILIES,
    **recurrent.FAMILIES,
    **mixtures.FAMILIES,
    **latent.FAMILIES,
}
