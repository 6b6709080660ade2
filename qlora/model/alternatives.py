"""For a base that is refused: a text model that trains here, by its name on the hub, of the same makers where they
publish one, and of about its size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

USUAL_BILLIONS = 8.0  # where a name says no size
# By the makers that a model's type begins with: billions of parameters, and the model. Dense, causal, 16 bit, and of a
# type that is trained here.
LIKE: Mapping[str, Mapping[float, str]] = {
    "qwen": {
        0.6: "Qwen/Qwen3-0.6B",
        1.7: "Qwen/Qwen3-1.7B",
        4: "Qwen/Qwen3-4B",
        8: "Qwen/Qwen3-8B",
        14: "Qwen/Qwen3-14B",
        32: "Qwen/Qwen3-32B",
    },
    "llama": {
        1: "meta-llama/Llama-3.2-1B-Instruct",
        3: "meta-llama/Llama-3.2-3B-Instruct",
        8: "meta-llama/Llama-3.1-8B-Instruct",
        70: "meta-llama/Llama-3.1-70B-Instruct",
    },
    "mistral": {
        7: "mistralai/Mistral-7B-Instruct-v0.3",
        12: "mistralai/Mistral-Nemo-Instruct-2407",
        24: "mistralai/Mistral-Small-24B-Instruct-2501",
    },
    "gemma": {
        1: "google/gemma-3-1b-it",
        2: "google/gemma-2-2b-it",
        9: "google/gemma-2-9b-it",
        27: "google/gemma-2-27b-it",
    },
    "deepseek": {
        7: "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        14: "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        32: "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    },
    "phi": {4: "microsoft/Phi-4-mini-instruct", 14: "microsoft/phi-4"},
    "glm": {9: "zai-org/GLM-4-9B-0414", 32: "zai-org/GLM-4-32B-0414"},
    "granite": {2: "ibm-granite/granite-3.3-2b-instruct", 8: "ibm-granite/granite-3.3-8b-instruct"},
    "olmo": {1: "allenai/OLMo-2-0425-1B-Instruct", 7: "allenai/OLMo-2-1124-7B-Instruct"},
    "smol": {1.7: "HuggingFaceTB/SmolLM2-1.7B-Instruct", 3: "HuggingFaceTB/SmolLM3-3B"},
    "cohere": {7: "CohereLabs/c4ai-command-r7b-12-2024"},
}
# Other beginnings of types by the same makers, or whose text model is theirs.
_MAKERS = {
    "qwen": "qwen",
    "llama": "llama",
    "mllama": "llama",
    "mixtral": "mistral",
    "mistral": "mistral",
    "ministral": "mistral",
    "pixtral": "mistral",
    "voxtral": "mistral",
    "gemma": "gemma",
    "paligemma": "gemma",
    "t5gemma": "gemma",
    "deepseek": "deepseek",
    "phi": "phi",
    "glm": "glm",
    "chatglm": "glm",
    "granite": "granite",
    "olmo": "olmo",
    "flex_olmo": "olmo",
    "smol": "smol",
    "idefics": "smol",
    "cohere": "cohere",
    "aya": "cohere",
}


def text_model_like(model_type: object, name: str) -> str:
    """The hub name of a model that trains here, for one of `model_type` that is called `name`."""
    called = name.rstrip("/").rpartition("/")[2].lower()
    kinds = (str(model_type).lower(), called)
    makers = next((_MAKERS[start] for kind in kinds for start in _MAKERS if kind.startswith(start)), "qwen")
    said = re.search(r"(?<![a-z0-9.])(\d{1,3}(?:\.\d{1,2})?)b(?![a-z])", called)
    billions = float(said[1]) if said else USUAL_BILLIONS
    sizes = LIKE[makers]
    return sizes[min(sizes, key=lambda size: abs(size - billions))]
