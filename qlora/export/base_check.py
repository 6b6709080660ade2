"""Whether the base of an export is the one that its adapter was trained on.

At the door a sample of the weights decides, so that a wrong base is refused in a second; their whole content decides
before anything is published: it is taken while the trained model is loaded, or while a merge reads (`base_content`).
"""

from __future__ import annotations

from qlora.errors import ExportError
from qlora.events import Notice, Sink
from qlora.export.artifacts import Source
from qlora.model import identity
from qlora.model.identity import BaseIdentity
from qlora.model.meta_model import taken_tensors


def at_the_door(source: Source, sink: Sink) -> None:
    """Refuse another base as far as a sample shows. Raises ExportError; says what could not be compared."""
    base, origin = source.base, source.origin
    refuse_another(source, identity.at_the_door(base.config, taken_tensors(base, source.meta_model)))
    if origin.identity is None and origin.fingerprint is not None:
        sink.emit(Notice("base", f"the adapter {identity.NOT_COMPARED}"))


def read_through(source: Source, sink: Sink) -> BaseIdentity:
    """The base's identity with its content, where it is not loaded. Raises ExportError for another base than was
    trained on, ModelError for weights that are not finite.
    """
    base = source.base
    found = identity.read_through(base.config, taken_tensors(base, source.meta_model), sink)
    refuse_another(source, found)
    return found


def refuse_another(source: Source, now: BaseIdentity) -> None:
    """Raises ExportError where `now` is not the base that the adapter records; adapters of others record none."""
    origin, base = source.origin, source.base
    if origin.fingerprint is None:
        return
    difference = identity.another_base(origin.identity, now, origin.fingerprint, base.fingerprint)
    if difference is not None:
        raise ExportError(
            f"{source.adapter.folder}: was trained on another base than {base.name} is now: {difference}",
            f"put the base back as it was at training ({origin.revision}), or name that one with `base_model`",
        )
