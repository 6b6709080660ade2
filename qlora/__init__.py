"""QLoRA training on one consumer GPU: a recipe in, a trained and merged model out.

    import qlora

    recipe = qlora.Recipe.from_file("recipes/quickstart.toml", ["train.seed=7"])
    result = qlora.train(recipe, name="support")
    print(result.state.eval_loss, result.adapter)
    exported = qlora.merge_and_export(result.run_dir, to="hf")
    print(exported.folder)

Names are imported when they are first used: `import qlora` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.api import estimate_memory, merge_and_export, train
    from qlora.recipe.reading import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "estimate_memory", "merge_and_export", "train"]

_HOMES = {
    "Recipe": "qlora.recipe.reading",
    "estimate_memory": "qlora.api",
    "merge_and_export": "qlora.api",
    "train": "qlora.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qlora' has no attribute {name!r}")
