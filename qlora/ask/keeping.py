"""A row of tokens in a model's memory: what was computed of it is kept, and the next prompt pays for its end alone.

A conversation's next prompt begins as the last one did, so that only the new question is computed. Where the new row
leaves the held one (an answer that the template writes otherwise later, an /undo), what is behind that place is cut
off; what a family keeps that cannot be cut (a recurrent state, a sliding window that has moved on) is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora.ask.llama import LlamaModel, LlamaRow, common_length
from qlora.ask.opened import TorchModel
from qlora.model.generate import forward_parameters, name_of_cache
from qlora.model.weight_receiving import device_of

TOKENS_AT_ONCE = 512  # of a prompt, computed in one go: between two, a stop is seen
_WINDOW = "DynamicSlidingWindowLayer"
_PLAIN = ("DynamicLayer", _WINDOW)  # layers that hold keys and values alone, in the order of the tokens


class TorchRow:
    """One row of tokens, its keys and values. `reused`: how many tokens of the last row were not computed again.

    `check` is called before each piece of a prompt, and may raise; what was computed before stays.
    """

    def __init__(self, model: Any, check: Callable[[], None] = lambda: None) -> None:
        self._model = model
        self._device = device_of(model)
        self._cache_name = name_of_cache(model)
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
        self._cache: Any = None
        self._held: list[int] = []
        self._keeps = True  # a family that keeps nothing gets the whole row with each token
        self.check = check
        self.reused = 0

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (V,) of the token behind `ids`."""
        self.reused = start = self._cut(min(common_length(self._held, ids), len(ids) - 1))
        logits_V: NDArray[np.float32] | None = None
        while start < len(ids):
            self.check()
            until = min(len(ids), start + TOKENS_AT_ONCE) if self._keeps else len(ids)
            logits_V = self._extended(ids, start, until)
            start = until if self._keeps or until == len(ids) else 0
        assert logits_V is not None
        return logits_V

    def forget(self) -> None:
        """Nothing is held any more."""
        self._cache, self._held = None, []

    def _extended(self, ids: Sequence[int], start: int, until: int) -> NDArray[np.float32]:
        """Compute tokens `start`, … of the row, and hold them."""
        whole = False
        try:
            with torch.no_grad():
                output = self._forward(ids, start, until)
            self._cache = output.get(self._cache_name)
            self._keeps = self._cache is not None
            self._held = list(ids[:until]) if self._keeps else []
            found: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
            whole = True
            return found
        finally:
            if not whole:  # some layers have these tokens, and some have not
                self.forget()

    def _forward(self, ids: Sequence[int], start: int, until: int) -> Any:
        """S new tokens behind what is held."""
        ids_1S = torch.tensor([list(ids[start:until])], device=self._device)
        return self._model(
            input_ids=ids_1S,
            attention_mask=torch.ones((1, until), dtype=torch.long, device=self._device),
            position_ids=torch.arange(start, until, device=self._device)[None],
            use_cache=True,
            **({} if self._cache is None else {self._cache_name: self._cache}),
            **self._last_only,
        )

    def _cut(self, length: int) -> int:
        """Hold the first `length` tokens alone; 0 where they cannot be had without the others."""
        if length < len(self._held):
            if length == 0 or not _can_be_cut(self._cache):
                self.forget()
                return 0
            for layer in self._cache.layers:
                if layer.is_initialized:
                    layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
                if type(layer).__name__ == _WINDOW:
                    layer.cumulative_length = length
            self._held = self._held[:length]
        return length


def _can_be_cut(cache: Any) -> bool:
    """Whether all of a row's keys and values are there, and nothing else."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(
        type(layer).__name__ in _PLAIN
        and (type(layer).__name__ != _WINDOW or layer.cumulative_length < layer.sliding_window)
        for layer in layers
    )


def row_of(opened: TorchModel | LlamaModel) -> TorchRow | LlamaRow:
    """A row of the model's, nothing held yet. A GGUF file has one."""
    return LlamaRow(opened.live) if isinstance(opened, LlamaModel) else TorchRow(opened.model)
