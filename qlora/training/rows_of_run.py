"""The rows of a run as it reads them: what its steps learn from, and what it is measured on."""

from __future__ import annotations

from functools import partial

from qlora.data.layout import Layout
from qlora.recipe.sections import DataSection
from qlora.step.forward import CausalParts
from qlora.step.loss import Objective
from qlora.training import reference
from qlora.training.answered import AnsweredBatches
from qlora.training.dividing import Division
from qlora.training.evaluate import RunEvaluation
from qlora.training.recovery import OomRecovery
from qlora.training.rollouts import Rollouts
from qlora.training.setup import Job
from qlora.training.step_batches import StepBatches


def batches_of(job: Job, section: DataSection, drawn: Rollouts | None) -> StepBatches | AnsweredBatches:
    """What the steps read: rows, or answers to them. `section` has packing as it is really done."""
    if drawn is not None:
        return drawn.over(section)
    rows, layout = job.data.train, Layout.of_run(job.device)
    return StepBatches.of(rows, section, job.recipe.train, job.chat.pad_id, layout)


def evaluation_of(
    job: Job,
    section: DataSection,
    of_step: tuple[CausalParts, Objective, Rollouts | None],
    recovery: OomRecovery,
    shares: Division,
) -> RunEvaluation | None:
    """What the run is measured with; None of a run without evaluation rows."""
    if not len(job.data.eval.lengths):
        return None
    parts, objective, drawn = of_step
    return RunEvaluation(
        model=job.model,
        parts=parts,
        objective=objective,
        chat=job.chat,
        split=job.data.eval,
        data=section,
        section=job.recipe.eval,
        recovery=recovery,
        clock=job.clock,
        began=partial(reference.as_it_began, job),
        judge=drawn.judged if drawn else None,
        check_stop=job.stop.check,
        shares=shares,
    )
