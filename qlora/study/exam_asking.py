"""Who answers in an exam: the run's own model, its adapters off and on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.model.generate import forward_parameters
from qlora.model.weight_receiving import device_of
from qlora.step.forward import evaluating
from qlora.study.generation import Written
from qlora.study.prompts import Frame
from qlora.study.teacher import Teacher

AT_ONCE = 16  # answers: what a killed exam has to ask again
NATS_TOKENS = 32  # of the base's answer along which two models are compared


@dataclass
class TeacherAsker:
    """A loaded model with adapters. See `exam.Asker`."""

    teacher: Teacher
    frame: Frame
    base_frame: Frame
    base_id: str
    tuned_id: str
    at_once: int = AT_ONCE

    def base(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [self._text(written) for written in self.teacher.greedy(self.base_frame, texts, max_new_tokens)]

    def tuned(self, texts: Sequence[str], max_new_tokens: int) -> list[str]:
        return [self._text(written) for written in self.teacher.tuned(self.frame, texts, max_new_tokens)]

    def nats(self, texts: Sequence[str]) -> list[float]:
        """KL(base || tuned) along the base's own greedy answer: where a user meets the model, and in the direction that
        context distillation minimizes. A prompt to which the base answers nothing counts at its first position."""
        model, values = self.teacher.model, []
        for text, written in zip(texts, self.teacher.greedy(self.frame, texts, NATS_TOKENS), strict=True):
            self.teacher.stop.check()
            ids = [*self.teacher.ids(self.frame, text), *written.token_ids]
            positions = len(written.token_ids) + 1
            with self.teacher.adapters_off():
                base_TV = _logprobs(model, ids, positions)
            tuned_TV = _logprobs(model, ids, positions)
            # What the base rules out adds nothing, and would be no number.
            terms_TV = torch.where(base_TV > -torch.inf, base_TV.exp() * (base_TV - tuned_TV), 0.0)
            values.append(float(terms_TV.sum(dim=-1).mean()))
        return values

    def _text(self, written: Written) -> str:
        return self.teacher.text(written)


def _logprobs(model: Any, ids: Sequence[int], positions: int) -> Tensor:
    """Log-probabilities at the last `positions` places: fp32 (T, V)."""
    device = device_of(model)
    last = {"logits_to_keep": positions} if "logits_to_keep" in forward_parameters(model) else {}
    with evaluating(model):
        logits_1SV = model(input_ids=torch.tensor([ids], device=device), use_cache=False, **last).logits
    return torch.log_softmax(logits_1SV[0, -positions:].float(), dim=-1)
