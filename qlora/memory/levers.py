"""What makes a step smaller and changes no number that is learned: each with its key, and what it is likely to save.

The guesses say where a search looks first; what is said of a plan was simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora import processes
from qlora.memory.changes import changed, value_of
from qlora.memory.hardware import Machine
from qlora.memory.links import GATHERED_BYTES_PER_SECOND, copied_bytes_per_second
from qlora.memory.simulation import Drawn, Workload
from qlora.model.weight_receiving import Place
from qlora.model.weight_streaming import SLOTS
from qlora.recipe.reading import Recipe
from qlora.step import head_blocks

# A 4-bit weight with its constants in 8 bit: 4 + 0.127 bits (Dettmers et al. 2023, section 3).
BYTES_OF_WEIGHT = 0.516
EMBEDDING, OFFLOAD, STREAM = "memory.embedding", "memory.offload_activations", "memory.stream_weights"
SHARD = "memory.shard_weights"
HEAD = f"{EMBEDDING} and {STREAM}"  # what both save together beside what each saves: with both the head comes in blocks


@dataclass(frozen=True)
class Lever:
    """A key, its value with the lever off and on, and whether it asks for all layers to be recomputed."""

    key: str
    off: Any
    on: Any
    whole: bool = False


ON_DEVICE = Place()
LEVERS = (
    Lever(EMBEDDING, "device", "host"),
    Lever(OFFLOAD, False, True),
    Lever(STREAM, False, True, whole=True),
    Lever(SHARD, False, True, whole=True),
)


@dataclass(frozen=True)
class Saving:
    """Of one lever, of one micro-batch as it was simulated: bytes on the device, which grow with its rows or do not;
    seconds of copies beside the forward and beside the backward pass; and seconds that nothing hides. `head`: its bytes
    are among them."""

    nbytes: int
    by_rows: bool
    beside: tuple[float, float] = (0.0, 0.0)
    alone: float = 0.0
    head: bool = False

    def with_head(self, head: Saving) -> Saving:
        """Both, where the head is worth it."""
        both = (self.nbytes + head.nbytes, self.by_rows, self.beside, self.alone + head.alone, True)
        return Saving(*both) if head.nbytes else self


def free(recipe: Recipe, machine: Machine) -> tuple[Lever, ...]:
    """Those that the recipe leaves open. Without a GPU there is one memory, and nothing to move; what waits for a
    second computation of a layer needs one."""
    if machine.device_type != "cuda":
        return ()
    setting = recipe.train.gradient_checkpointing
    known = type(recipe.memory).model_fields
    there = [lever for lever in LEVERS if lever.key.partition(".")[2] in known]
    whole, memory = setting is True or setting == "auto", recipe.memory
    asks = {EMBEDDING: True, OFFLOAD: setting is not False, STREAM: whole and memory.shard_weights is not True}
    several = processes.of_run().size > 1 and not recipe.data.documents  # a study is one process's, and comes before
    asks[SHARD] = whole and memory.stream_weights is not True and several
    return tuple(lever for lever in there if asks[lever.key] and value_of(recipe, lever.key) == "auto")


def go_together(levers: Sequence[Lever]) -> bool:
    """Whether they may all be on: layers are in the host's memory or shared by several cards, not both."""
    return not {STREAM, SHARD} <= {lever.key for lever in levers}


def with_what_levers_ask(recipe: Recipe) -> Recipe:
    """Whoever wants inputs or weights to wait on the host has every layer computed a second time."""
    known = type(recipe.memory).model_fields
    asks = any(value_of(recipe, key) is True for key in (OFFLOAD, STREAM) if key.partition(".")[2] in known)
    asks = asks or Place.of(recipe.memory).comes_and_goes
    open_ = recipe.train.gradient_checkpointing == "auto"
    return changed(recipe, {"train.gradient_checkpointing": True}) if asks and open_ else recipe


def savings(
    text: Any, workload: Workload, drawn: Drawn, machine: Machine, place: Place = ON_DEVICE
) -> Mapping[str, Saving]:
    """What each lever is likely to save, of this workload of a model that has of its weights on the host what `place`
    says: with the second of layers and embeddings goes the head."""
    layers, hidden, tokens = int(text.num_hidden_layers), int(text.hidden_size), workload.rows * workload.length
    link = copied_bytes_per_second(machine.gpu) if machine.gpu is not None else float("inf")
    looked_up, inputs = 2 * tokens * hidden, 2 * tokens * hidden * max(0, layers - 2)
    weights, comes = bytes_of_layers(drawn), gathered(drawn, processes.of_run().size)
    table = 0 if getattr(text, "tie_word_embeddings", False) else 2 * int(text.vocab_size) * hidden - looked_up
    found = {
        EMBEDDING: Saving(max(0, table), False, alone=looked_up / link + looked_up / GATHERED_BYTES_PER_SECOND),
        OFFLOAD: Saving(inputs, True, (inputs / link, inputs / link)),
        STREAM: Saving(weights * max(0, layers - 2) // layers, False, (weights / link, weights / link)),
        SHARD: Saving(max(0, comes - weights * 2 // layers), False, (comes / link, comes / link)),
    }
    head = _of_head(int(text.vocab_size), hidden, tokens, machine)
    if place.comes_and_goes == place.host_embedding:
        return found | {HEAD: head}
    last = (EMBEDDING,) if place.comes_and_goes else (STREAM, SHARD)
    return found | {key: found[key].with_head(head) for key in last}


def bytes_of_layers(drawn: Drawn) -> int:
    """About what the frozen matrices of all layers take in 4 bit."""
    return int(drawn.values.linear * BYTES_OF_WEIGHT) + drawn.stacked_bytes


def gathered(drawn: Drawn, shards: int) -> int:
    """Of them, what comes from the other cards where so many share them: by the same bus, since consumer boards have no
    other way from card to card."""
    return bytes_of_layers(drawn) * (shards - 1) // shards


def _of_head(vocabulary: int, hidden: int, tokens: int, machine: Machine) -> Saving:
    """It comes twice, beside three products with it."""
    whole, places = 2 * vocabulary * hidden, SLOTS * 2 * hidden * head_blocks.rows_of(vocabulary, hidden)
    if machine.gpu is None or whole <= places:
        return Saving(0, False)
    computed = 3 * whole * tokens / (machine.gpu.teraflops * 1e12)
    return Saving(whole - places, False, alone=max(0.0, 2 * whole / copied_bytes_per_second(machine.gpu) - computed))
