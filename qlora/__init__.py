"""QLoRA training on one consumer GPU: a recipe in, a trained and merged model out.

    import qlora

    recipe = qlora.Recipe.from_file("recipes/quickstart.toml", ["train.seed=7"])
    result = qlora.train(recipe, name="support")
    print(result.state.eval_loss, result.adapter)
    exported = qlora.merge_and_export(result.run_dir, to="hf")
    print(exported.folder)

Functions, `Recipe` and `ExportOptions` are imported when they are first used: `import qlora` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora.errors import (
    DataError,
    DoesNotFit,
    ExportError,
    HardwareError,
    ModelError,
    QloraError,
    RecipeError,
    RewardError,
    RunFolderError,
    StoppedBySignal,
    TargetTaken,
    TokenizerError,
    TrainingStopped,
    UserError,
)
from qlora.events import (
    End,
    Evaluated,
    Event,
    Examined,
    Exported,
    Fidelity,
    Notice,
    Plan,
    Preferred,
    Progress,
    Recovered,
    Rejected,
    Routed,
    Sampled,
    Saved,
    Sink,
    Start,
    StepDone,
)
from qlora.reward_events import Rewarded
from qlora.stop import StopRequest
from qlora.version import __version__

if TYPE_CHECKING:
    from qlora.api import check, estimate_memory, merge_and_export, train
    from qlora.ask.chats import open_chat
    from qlora.ask.settings import Sampling
    from qlora.export.artifacts import ExportOptions
    from qlora.export.combination import Combination
    from qlora.export.push import Push
    from qlora.pushing import push_exports
    from qlora.recipe.reading import Recipe
    from qlora.report.write import write_report

__all__ = ["Recipe", "train", "check", "estimate_memory", "merge_and_export", "ExportOptions"]
__all__ += ["Combination", "Push", "push_exports", "open_chat", "Sampling", "write_report"]
__all__ += ["Sink", "StopRequest", "__version__"]
__all__ += ["QloraError", "UserError", "RecipeError", "DataError", "ModelError", "TokenizerError", "RunFolderError"]
__all__ += [
    "HardwareError",
    "RewardError",
    "ExportError",
    "TargetTaken",
    "DoesNotFit",
    "TrainingStopped",
    "StoppedBySignal",
]
__all__ += [
    "Event",
    "Start",
    "Plan",
    "Notice",
    "Progress",
    "StepDone",
    "Evaluated",
    "Preferred",
    "Rewarded",
    "Routed",
    "Sampled",
    "Saved",
    "Recovered",
]
__all__ += ["Rejected", "Fidelity", "Examined", "Exported", "End"]

_HOMES = {
    "Recipe": "qlora.recipe.reading",
    "train": "qlora.api",
    "check": "qlora.api",
    "estimate_memory": "qlora.api",
    "merge_and_export": "qlora.api",
    "ExportOptions": "qlora.export.artifacts",
    "Combination": "qlora.export.combination",
    "Push": "qlora.export.push",
    "push_exports": "qlora.pushing",
    "open_chat": "qlora.ask.chats",
    "Sampling": "qlora.ask.settings",
    "write_report": "qlora.report.write",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
