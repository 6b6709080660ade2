"""How many layers are recomputed: the setting, its next larger value, and what a run takes between none and all.

Of a model with many layers two runs are simulated, one that keeps every layer's tensors and one that recomputes every
layer. A run that recomputes its first N is put together from their phases: it goes up through N layers as the second
does and through the others as the first does, and comes down the same way. No formula guesses a layer's bytes, and the
whole model simulated with N says the same (tests/memory/test_recomputing.py).
"""

from __future__ import annotations

from dataclasses import replace

from qlora.memory.operations import partly
from qlora.memory.simulation import Simulation, Workload
from qlora.memory.trace import Peak

UP = ("forward", "loss")  # the loss ends with the gradients of the top layer
FIRST_SHARE = 4  # of the layers, what is recomputed first when memory runs out: twice as many each time


def layers_of_setting(setting: bool | int, layers: int) -> int:
    """How many of a model's layers `train.gradient_checkpointing` recomputes."""
    return min(int(setting), layers) if not isinstance(setting, bool) else layers * setting


def more(setting: bool | int, layers: int) -> bool | int | None:
    """The next setting that recomputes more; None where all are. `layers` 0: not known how many there are."""
    if setting is True or (setting is not False and setting >= layers):
        return None
    following = 2 * setting if setting is not False else -(-layers // FIRST_SHARE)
    return following if 0 < following < layers else True


def of_model(workload: Workload, layers: int) -> Workload:
    """The workload as a model of so many layers has it: as many layers as it has, or more, are all."""
    return replace(workload, recomputed=0) if workload.recomputed >= layers else workload


def share(workload: Workload, layers: int) -> float:
    """Of the layers, what is computed a second time."""
    return layers_of_setting(workload.recompute, layers) / layers


def apart(workload: Workload) -> tuple[Workload, Workload]:
    """The two that a run which recomputes some layers is put together from; where none is, no input waits."""
    none = replace(workload, gradient_checkpointing=False, recomputed=0, offloads=False)
    return none, replace(workload, gradient_checkpointing=True, recomputed=0)


def saved_once(kept: Simulation, recomputed: Simulation, layers: int) -> int:
    """What one recomputed layer is enough for: the first's hidden states are held, and what all layers are handed."""
    return layers * (kept.each["loss"] - recomputed.each["loss"]) - (kept.held - recomputed.held)


def put_together(kept: Simulation, recomputed: Simulation, layers: int, count: int) -> Simulation:
    """A run that recomputes the first `count` of `layers`, by one that recomputes none and one that recomputes all."""
    phases = dict(recomputed.phases)
    once = saved_once(kept, recomputed, layers)
    # Of inputs on the host, the top layer's is none where all are recomputed: of the first `count` all are.
    an_input = recomputed.pinned // max(1, layers - 1)
    once -= an_input
    for phase, more in zip(UP, (kept.first, once), strict=True):
        saved = count * (kept.each[phase] - recomputed.each[phase]) - more
        phases[phase] = _less(kept.phases[phase], saved)
    down = []
    if layers - count > 1:  # below the top layer, whose backward pass is the end of the loss
        saved = count * (kept.each["backward"] - recomputed.each["backward"]) - once
        down.append(_less(kept.phases["backward"], saved))
    if count > 1:  # the lowest layer's is the end of the backward pass
        down.append(_less(recomputed.phases["backward"], (layers - 1 - count) * recomputed.each["backward"]))
    phases["backward"] = max(down or [phases["backward end"]], key=lambda peak: peak.total)
    reserved = max(kept.reserved, recomputed.reserved, key=lambda one: one.beyond)
    work = partly(kept.work, recomputed.work, count / layers)
    return replace(recomputed, phases=phases, reserved=reserved, pinned=count * an_input, work=work)


def _less(peak: Peak, activations: int) -> Peak:
    parts = {**peak.parts, "activations": max(0, peak.parts["activations"] - activations)}
    return replace(peak, parts=parts, reserved=max(0, peak.reserved - activations))
