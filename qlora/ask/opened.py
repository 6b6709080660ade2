"""RUN_OR_MODEL: a run, an adapter's folder, a whole model's folder or a GGUF file, opened to be asked.

`named` says what a name means, before anything heavy is imported; `open_model` opens it. A run and an adapter are the
base as training held it (in 4 bit) with the adapter on it, and the base is the one of the training by its bytes, as a
resumed run asks; a whole model is held as its files hold it; a GGUF file is computed by llama.cpp in a child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora import files, run_folder
from qlora.errors import ExportError, TokenizerError
from qlora.events import Notice, Sink
from qlora.guarded import Guarded
from qlora.model.base_cache.places import mode_beside

if TYPE_CHECKING:
    import torch

    from qlora.ask.llama import LlamaModel
    from qlora.data.chat import ChatTokenizer
    from qlora.model.adapter_folder import Provenance
    from qlora.model.base_folder import BaseFolder
    from qlora.model.tokenizer_files import TokenizerFiles
    from qlora.recipe.reading import Recipe

HUB = "hub:"  # before a name of the hub, as rows of the hub are named
_HINT = f"name a run, an adapter's folder, a model's folder or a GGUF file; a model of the hub is {HUB}owner/name"
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Named:
    """What a name means. `place` is a folder or file, and for a model of the hub its name."""

    kind: Literal["adapter", "model", "gguf"]
    place: Path | str

    @property
    def name(self) -> str:
        """A short one, to be shown: the run's, the folder's or the file's."""
        if isinstance(self.place, str):
            return self.place
        return run_folder.name_of(self.place) if self.kind == "adapter" else self.place.name


@dataclass(frozen=True)
class HowToOpen:
    """`base_model`: where an adapter's base lies, if not where the adapter says. `nf4`: hold a model's linear layers in
    4 bit although its files hold them in 16. `context`: tokens of one conversation at most."""

    base_model: str | Path | None = None
    nf4: bool = False
    context: int = 8192


def named(text: str | Path) -> Named:
    """What RUN_OR_MODEL means. Raises ExportError for what is none of the four."""
    if isinstance(text, str) and text.startswith(HUB):
        return Named("model", text.removeprefix(HUB))
    path = files.user_path(text, "the model")
    if (why := files.unreachable(path)) is not None:
        raise ExportError(f"{path}: {why}", _HINT)
    if not path.exists():
        raise ExportError(f"{path}: there is no such file or folder", _HINT)
    if not path.is_dir():
        return Named("gguf", _checked_gguf(path))
    if (path / "adapter").exists() or (path / "adapter_config.json").exists():
        return Named("adapter", run_folder.adapter_of(path)[0])
    if (path / "config.json").is_file():
        return Named("model", path)
    found = sorted(file for file in path.glob("*.gguf") if not file.name.startswith("mmproj"))
    if len(found) == 1:
        if files.is_link(found[0]):
            raise ExportError(f"{found[0]}: is a link", "name the file that it leads to")
        return Named("gguf", _checked_gguf(found[0]))
    if found:
        raise ExportError(f"{path}: holds {len(found)} GGUF files", f"name one of them, such as {found[0]}")
    return Named("adapter", run_folder.adapter_of(path)[0])  # which says what is missing


def _checked_gguf(file: Path) -> Path:
    try:
        with files.open_to_read(file) as stream:
            is_gguf = stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except files.UnsafePathError as error:
        raise ExportError(str(error), _HINT) from error
    except OSError as error:
        raise ExportError(f"{file}: cannot be read ({error.strerror or error})", _HINT) from error
    if not is_gguf:
        raise ExportError(f"{file}: is no GGUF file", _HINT)
    return file


@dataclass
class TorchModel:
    """A model of transformers, ready to be asked.

    model      peft's wrapper around the causal LM, or a causal LM alone; frozen, in evaluation mode
    chat       its tokenizer and template, as training had them
    context    tokens of a row at most: the model's, or what was asked for if that is less
    adapter    the adapter's folder; None for a model alone
    origin     what the adapter was trained against; None for a model alone
    """

    name: str
    model: Any
    chat: ChatTokenizer
    device: torch.device
    base: BaseFolder
    context: int
    adapter: Path | None = None
    origin: Provenance | None = None

    def adapters_off(self) -> AbstractContextManager[None]:
        """While it is open, the model is its base."""
        return self.model.disable_adapter() if self.adapter is not None else nullcontext()

    @cached_property
    def vocabulary(self) -> int:
        """Rows of the head."""
        causal = self.model.get_base_model() if self.adapter is not None else self.model
        return int(causal.get_output_embeddings().weight.shape[0])


@contextmanager
def open_model(source: Named, how: HowToOpen, sink: Sink) -> Iterator[TorchModel | LlamaModel]:
    """The model that `source` names. Its memory is given back behind the block.

    Raises ExportError where the base is another than the adapter's, or a file is none; ModelError for what cannot be
    loaded; TokenizerError for a model without a tokenizer; DoesNotFit.
    """
    if source.kind == "gguf":
        from qlora.ask.llama import open_gguf

        with open_gguf(Path(source.place), how.context, sink) as file:
            yield file
        return
    from qlora.device import release
    from qlora.model import emptied
    from qlora.model.cpu_matmul import fast_matmul
    from qlora.training.setup import pick_device

    device = pick_device()
    release(device)  # an earlier model may still be held by what refers to itself
    with fast_matmul(device):
        with Guarded("loading the model", "end other programs that hold memory, or name a smaller model"):
            opened = (_open_adapter if source.kind == "adapter" else _open_whole)(source, how, device, sink)
        try:
            yield opened
        finally:
            emptied.empty(opened.model)
            release(device)


def _open_adapter(source: Named, how: HowToOpen, device: torch.device, sink: Sink) -> TorchModel:
    from qlora.export import adapter_base
    from qlora.model import adapter_seal, mixture_adapters
    from qlora.model.adapter_folder import provenance, read_adapter
    from qlora.recipe.sections import QuantizationSection

    folder = Path(source.place)
    sealed = adapter_seal.seal(folder, sink)
    adapter = read_adapter(folder)
    origin, recipe = provenance(folder, adapter.config), run_folder.recipe_of(folder, sink)
    base = adapter_base.open_base(adapter, origin, how.base_model, sink)
    mixture_adapters.refuse_other_experts(adapter, base)
    origin = adapter_base.as_trained(origin, base, "auto")
    if how.nf4 and origin.quantization.type == "none":
        origin = replace(origin, quantization=QuantizationSection())
    chat = chat_of_adapter(folder, recipe, lambda: base, sink)
    attention = "auto" if recipe is None else recipe.model.attention
    base = replace(base, cache=mode_beside(None if recipe is None else recipe.memory))
    model = tuned_model(folder, origin, base, (attention, device), sink)
    sealed.check()
    if adapter.idle:
        message = "adapters on other parts than the text model are left out"
        sink.emit(Notice("adapter", f"{message}, {adapter.idle[0]} first", len(adapter.idle)))
    context = _context(model.get_base_model(), how)
    return TorchModel(source.name, model, chat, device, base, context, folder, origin)


def tuned_model(
    folder: Path, origin: Provenance, base: BaseFolder, settings: tuple[str, torch.device], sink: Sink
) -> Any:
    """The base as `origin` says that training held it, with the adapter in `folder` on it. `settings`: how it attends,
    and where it lies. Raises ExportError where it is another base than was trained on."""
    from qlora.model import adapters, identity, load, precision

    attention, device = settings
    how = (origin.quantization, attention, device, sink)
    model: Any = load.load_base(base, *how, dtype=precision.of_saved(folder, device))
    another = identity.another_base(
        origin.identity, model.base_identity, origin.fingerprint or base.fingerprint, base.fingerprint
    )
    if another is not None:
        what = f"{folder}: was trained on another base than {base.name} is now: {another}"
        raise ExportError(what, "put the base back as it was at training")
    return adapters.open_saved(model, folder)


def tokenizer_of_adapter(
    folder: Path, recipe: Recipe | None, base: Callable[[], BaseFolder], sink: Sink
) -> TokenizerFiles:
    """The tokenizer that the adapter in `folder` was trained with, with its template.

    Its run's (where `recipe` is one), else its own. `base` is asked only where neither is there.
    """
    from qlora.model import chat_template, tokenizer_files

    if recipe is None:
        return tokenizer_files.of_export(base().path, folder)
    kept = tokenizer_files.of_run(folder.parent, sink)
    if kept is None:
        read = tokenizer_files.read_files(base().path)
        kept = chat_template.chosen(read, recipe.model, base().name, sink)
    return chat_template.as_before(kept, recipe.model.base, folder, sink)


def chat_of_adapter(folder: Path, recipe: Recipe | None, base: Callable[[], BaseFolder], sink: Sink) -> ChatTokenizer:
    """The same, as what renders and reads its conversations."""
    from qlora.data.chat import ChatTokenizer
    from qlora.model.tokenizer import open_tokenizer

    taken = tokenizer_of_adapter(folder, recipe, base, sink)
    name, loss_on = (base().name, "assistant") if recipe is None else (recipe.model.base, recipe.data.loss_on)
    with taken.placed() as place:
        tokenizer = open_tokenizer(place, name)
    return ChatTokenizer(tokenizer, loss_on, sink, taken.embedding_rows)


def _open_whole(source: Named, how: HowToOpen, device: torch.device, sink: Sink) -> TorchModel:
    from qlora.data.chat import ChatTokenizer
    from qlora.model import chat_template, load, precision, tokenizer_files
    from qlora.model.resolve import resolve
    from qlora.model.tokenizer import open_tokenizer
    from qlora.recipe.sections import ModelSection, QuantizationSection

    base = resolve(str(source.place), "main", sink)
    read = tokenizer_files.read_files(base.path)
    taken = chat_template.chosen(read, ModelSection(base=str(source.place)), base.name, sink)
    with taken.placed() as folder:
        tokenizer = open_tokenizer(folder, base.name)
    chat = ChatTokenizer(tokenizer, "assistant", sink, taken.embedding_rows)
    in_4bit = how.nf4 or base.stored_4bit
    section = QuantizationSection() if in_4bit else QuantizationSection(type="none")
    model = load.load_base(base, section, "auto", device, sink, dtype=precision.of_device(device))
    return TorchModel(source.name, model, chat, device, base, _context(model, how))


def _context(causal: Any, how: HowToOpen) -> int:
    """Tokens of a row at most. A model without a length of its own (a recurrent one) takes what was asked for."""
    known = getattr(causal.config, "max_position_embeddings", None)
    return min(known, how.context) if isinstance(known, int) and known > 0 else how.context


def refuse_without_template(opened: TorchModel | LlamaModel) -> None:
    """Raises TokenizerError for a model that knows no conversations."""
    if opened.chat.template is None:
        what = f"{opened.name}: has no chat template: it continues text, and knows no questions and answers"
        raise TokenizerError(what, 'train with chat_template = "chatml" under [model], or name a model that has one')
