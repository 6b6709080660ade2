"""A model run on `meta` while each value is followed: what it was computed from, and where tokens meet each other.

Nothing is computed. Every operation passes through `Trace`, which keeps two things of each tensor: a number that stands
for the whole expression that it came from (equal numbers are equal computations, whatever the weights), and its origins
(tokens, given positions, places in the row). The row's length is a prime that divides no size of the model, so that the
dimension that runs along the tokens is known by its size alone, through any reshaping.

What keeps each token by itself (products with weights, norms over channels, anything elementwise) is known; all else
that touches the dimension of the tokens is written down as mixing. So is an operation that nobody here knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

META = torch.device("meta")
# Origins of a tensor.
TOKENS, POSITIONS, PLACES = 1, 2, 4
LARGEST_CONTENT = 1 << 16  # values of a real tensor (ids, positions, rotary frequencies) that are told by their content

# Operations by what they do to the dimension of the tokens; names of aten's overload packets.
_SAME_VALUE = {"detach", "alias", "clone", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "positive"}
_RESHAPES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "expand", "permute", "transpose", "t"),
    *("unsqueeze", "squeeze", "repeat", "movedim", "view_as_real", "view_as_complex", "view_dtype"),
}
_ELEMENTWISE = {
    "stack",
    *("masked_fill_", "copy_", "zero_", "fill_", "native_dropout", "_conj", "complex", "polar", "real", "imag"),
    *("log_sigmoid_forward", "masked_fill", "where", "_neg_view", "isnan", "isinf", "resolve_conj", "exponential_"),
}
_FILLS = {
    *("zeros", "ones", "full", "empty", "scalar_tensor", "zeros_like", "ones_like", "full_like", "empty_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "empty_strided", "new_empty_strided"),
    *("rand_like", "randn_like"),
}
_OVER_DIMENSIONS = {
    *("sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "std_mean", "norm", "linalg_vector_norm"),
    *("logsumexp", "_softmax", "_log_softmax", "softmax", "cumsum", "cumprod", "logcumsumexp", "prod", "any", "all"),
    *("argmax", "argmin", "topk", "sort", "glu", "flip", "gather", "scatter", "scatter_", "scatter_add", "unbind"),
    *("select", "split", "split_with_sizes", "chunk", "repeat_interleave", "cat", "index_select", "unfold"),
}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "matmul", "linear"}
_NORMS = {"native_layer_norm": 1, "_fused_rms_norm": 1, "rms_norm": 1, "layer_norm": 1}  # argument of the shape


@dataclass(frozen=True)
class Mixing:
    """A place where tokens meet: the module's path and class, and what it does in words."""

    path: str
    kind: str
    what: str


@dataclass(frozen=True)
class _Value:
    number: int
    origins: int = 0


@dataclass
class _Call:
    """One operation: what it was given, as it is on meta, and the values of its tensors."""

    func: Any
    args: Any
    kwargs: dict[str, Any]
    inputs: Sequence[Tensor]
    numbers: Sequence[int]
    origins: Sequence[int]
    outputs: Sequence[Tensor] = ()

    @property
    def packet(self) -> str:
        """The operation's name, whatever its overload."""
        return str(self.func._overloadpacket.__name__)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what is computed while it is entered. `length` is the size of the dimension of the tokens.

    Real tensors (ids, positions, buffers) stay real as long as they meet only their like, so that masks can be looked
    at; where they meet `meta` they are taken for meta tensors of the same value.
    """

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.mixings: list[Mixing] = []
        self.modules: list[tuple[str, nn.Module]] = []
        self._known: dict[tuple[Any, ...], _Value] = {}
        self._writes: dict[int, int] = {}  # of a storage: what was written into it, as a number
        self._stains: dict[int, int] = {}  # and of which origins
        self._kept: list[Any] = []  # so that no storage's address is used again
        self._scales: dict[int, tuple[int, float]] = {}  # of a scaled number: what was scaled, and by what
        self._unseen: dict[str, int] = {}

    # --- values ---------------------------------------------------------------------------------------------------

    def name(self, tensor: Tensor, what: Any, origins: int = 0) -> None:
        """`tensor` is an input of this name, of these origins."""
        self._know(tensor, _Value(hash(("input", what)), origins))

    def name_weights(self, model: nn.Module) -> None:
        """Parameters are known by their names, buffers by their contents."""
        for name, parameter in model.named_parameters():
            self.name(parameter, name)

    def number(self, tensor: Tensor) -> int:
        """Of the expression that `tensor` is; equal for equal computations on equal inputs."""
        number, writes = self._value(tensor).number, self._writes.get(tensor.untyped_storage()._cdata)
        return number if writes is None else hash((number, writes))

    def origins(self, tensor: Tensor) -> int:
        return self._value(tensor).origins | self._stains.get(tensor.untyped_storage()._cdata, 0)

    def _know(self, tensor: Tensor, value: _Value) -> None:
        self._kept.append(tensor)
        self._known[_place(tensor)] = value

    def _value(self, tensor: Tensor) -> _Value:
        key = _place(tensor)
        if key not in self._known:
            if not tensor.is_meta and tensor.numel() <= LARGEST_CONTENT and not tensor.is_quantized:
                self._know(tensor, _Value(hash((str(tensor.dtype), tuple(tensor.shape), _content(tensor)))))
            else:
                where = self.modules[-1][0] if self.modules else ""
                self._unseen[where] = self._unseen.get(where, 0) + 1
                self._know(tensor, _Value(hash(("unseen", where, self._unseen[where]))))
        return self._known[key]

    # --- operations -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
        numbers, of_each = [self.number(one) for one in inputs], [self.origins(one) for one in inputs]
        if any(tensor.is_meta for tensor in inputs):
            args, kwargs = tree_map_only(Tensor, self._on_meta, (args, kwargs))
            if kwargs.get("device") is not None:
                kwargs["device"] = META
        call = _Call(func, args, kwargs, inputs, numbers, of_each)
        result = func(*args, **kwargs)
        call.outputs = [item for item in tree_flatten(result)[0] if isinstance(item, Tensor)]
        origins = reduce(or_, of_each, 0)
        if origins & TOKENS:
            self._judge(call)
        elif not origins and call.packet not in _FILLS and any(map(self.token_dims, call.outputs)):
            along = call.packet in _OVER_DIMENSIONS and self._reaches_tokens(call)
            born = not any(map(self.token_dims, inputs)) and call.packet not in _RESHAPES
            origins = PLACES if along or born else 0
        self._keep(call, self._expression(call), origins)
        return result

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta or tensor.ndim == 0:
            return tensor
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        self._know(empty, _Value(self.number(tensor), self.origins(tensor)))
        return empty

    def _expression(self, call: _Call) -> int:
        """The number of an operation's result; conversions, whole slices and factors have their own form."""
        packet, known = call.packet, call.numbers
        shapes = {tuple(tensor.shape) for tensor in (*call.inputs[:1], *call.outputs)}
        same_shape = len(shapes) == 1 and packet in {"view", "_unsafe_view", "expand", "slice", "reshape"}
        if known and call.outputs and (packet in _SAME_VALUE or same_shape):
            return known[0]
        numbers = iter(known)

        def plain(item: Any) -> Any:
            if isinstance(item, Tensor):
                return next(numbers)
            return item if isinstance(item, (int, float, str, bool, type(None))) else str(item)

        kept = {key: value for key, value in call.kwargs.items() if key not in ("device", "layout", "pin_memory")}
        factor = _factor(packet, call.args)
        if factor is not None and known and not kept:
            return self._scaled(known[0], factor)
        scale = 1.0
        if packet in _RESHAPES | {"mm", "bmm"} and known and known[0] in self._scales:
            base, scale = self._scales[known[0]]  # a factor of the inputs is one of the product
            numbers = iter((base, *known[1:]))
        number = hash((str(call.func), tuple(plain(item) for item in tree_flatten((call.args, kept))[0])))
        return number if scale == 1.0 else self._scaled(number, scale)

    def _scaled(self, number: int, factor: float) -> int:
        base, before = self._scales.get(number, (number, 1.0))
        total = float(f"{factor * before:.6g}")
        if total == 1.0:
            return base
        scaled = hash(("scaled", base, total))
        self._scales[scaled] = (base, total)
        return scaled

    def _keep(self, call: _Call, number: int, origins: int) -> None:
        if call.func._schema.is_mutable:
            storage = call.inputs[0].untyped_storage()._cdata
            self._writes[storage] = hash((self._writes.get(storage, 0), number))
            self._stains[storage] = self._stains.get(storage, 0) | origins
            return
        for at, tensor in enumerate(call.outputs):
            if _place(tensor) not in self._known:  # a view may lead back to what it came from
                self._know(tensor, _Value(number if len(call.outputs) == 1 else hash((number, at)), origins))

    # --- where tokens meet ------------------------------------------------------------------------------------------

    def token_dims(self, tensor: Tensor) -> list[int]:
        """Dimensions along the tokens, counted from the right (-1, -2, …)."""
        return [at - tensor.ndim for at, size in enumerate(tensor.shape) if size and size % self.length == 0]

    def note(self, what: str) -> None:
        """Write down that tokens meet here."""
        own = [(path, module) for path, module in self.modules if not type(module).__module__.startswith("torch.")]
        path, module = own[-1] if own else ("", None)
        self.mixings.append(Mixing(path, type(module).__name__ if module is not None else "", what))

    def _judge(self, call: _Call) -> None:
        """Writes down what an operation on tokens does that is not each token's own affair."""
        packet, inputs, origins, outputs = call.packet, call.inputs, call.origins, call.outputs
        tokens = [tensor for tensor, of_one in zip(inputs, origins, strict=True) if of_one & TOKENS]
        if not any(map(self.token_dims, tokens)) or packet in _SAME_VALUE | _RESHAPES | _FILLS:
            return
        if packet == "slice" and tuple(outputs[0].shape) == tuple(inputs[0].shape):
            return
        if torch.Tag.pointwise in call.func.tags or packet in _ELEMENTWISE:
            dims = [set(self.token_dims(tensor)) for tensor in inputs]
            if len(set().union(*dims)) > max(map(len, dims)):
                self.note("compares tokens with each other in code of its own")
            elif any(of_one & PLACES and self.token_dims(one) for one, of_one in zip(inputs, origins, strict=True)):
                self.note("counts positions by the place in the row")
            return
        if packet in _PRODUCTS:
            contracted = [tensor for tensor in inputs[-2:-1] if tensor.ndim and -1 in self.token_dims(tensor)]
            outer = len(self.token_dims(outputs[0])) > max(len(self.token_dims(tensor)) for tensor in inputs[-2:])
            if contracted or outer:
                self.note("attends in code of its own")
            return
        if packet == "embedding" or (packet == "index" and not origins[0] & TOKENS):
            return  # ids of tokens, or the experts that they chose, choose rows of a table
        if packet in _NORMS:
            normalized = len(call.args[_NORMS[packet]])
            if any(dim >= -normalized for dim in self.token_dims(inputs[0])):
                self.note("normalizes over tokens")
            return
        if packet in ("convolution", "_convolution", "conv1d"):
            kernel = inputs[1].shape[2:]
            if any(dim >= -len(kernel) and kernel[dim] > 1 for dim in self.token_dims(inputs[0])):
                self.note("convolves over tokens")
            return
        if packet in _OVER_DIMENSIONS | {"slice", "constant_pad_nd", "roll"}:
            if self._reaches_tokens(call):
                self.note("goes from token to token" if packet in ("select", "slice", "unbind") else _words(packet))
            return
        self.note(f"does what is not known here ({packet})")

    def _reaches_tokens(self, call: _Call) -> bool:
        """Whether an operation over dimensions is one over the dimension of the tokens."""
        packet, inputs, outputs, args = call.packet, call.inputs, call.outputs, call.args
        first = next((one for one in inputs if self.token_dims(one)), inputs[0])
        along = set(self.token_dims(first))
        if packet == "constant_pad_nd":  # pads of the last dimension come first; 1 and -1 keep the length
            return any(any(args[1][2 * at : 2 * at + 2]) for at in range(len(args[1]) // 2) if -1 - at in along)
        if packet in ("slice", "repeat_interleave") and outputs:
            return {(dim, outputs[0].shape[dim]) for dim in along} != {(dim, first.shape[dim]) for dim in along}
        declared = call.func._schema.arguments
        values = dict(zip((argument.name for argument in declared), args, strict=False)) | call.kwargs
        chosen = values.get("dim", values.get("dims", values.get("dimension")))
        if chosen is None:
            defaults = {one.name: one.default_value for one in declared if one.has_default_value()}
            chosen = defaults.get("dim")
        if chosen is None or chosen == []:
            return True
        dims = {dim if dim < 0 else dim - first.ndim for dim in ([chosen] if isinstance(chosen, int) else chosen)}
        return bool(dims & along)

    # --- which module -----------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While the block runs, what is written down names the module of `model` in which it happens."""
        handles = []
        for path, module in model.named_modules():

            def enter(inner: nn.Module, _: Any, path: str = path) -> None:
                self.modules.append((path, inner))
                self._unseen[path] = 0

            def leave(*_: Any) -> None:
                self.modules.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.modules.clear()


def row_length(sizes: set[int], at_least: int) -> int:
    """The smallest prime from `at_least` on that divides none of `sizes`."""
    length = at_least
    while any(length % divisor == 0 for divisor in range(2, length)) or any(size % length == 0 for size in sizes):
        length += 1
    return length


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which values of which memory: two tensors of the same place are the same."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _content(tensor: Tensor) -> bytes:
    with torch.utils._python_dispatch._disable_current_modes():
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _factor(packet: str, args: Sequence[Any]) -> float | None:
    """The number that a tensor is multiplied with or divided by; None for anything else."""
    if packet not in ("mul", "div") or len(args) != 2 or not isinstance(args[0], Tensor):
        return None
    other = args[1]
    if isinstance(other, Tensor) and other.ndim == 0 and not other.is_meta:
        with torch.utils._python_dispatch._disable_current_modes():
            other = float(other)
    if isinstance(other, bool) or not isinstance(other, (int, float)) or (packet == "div" and other == 0):
        return None
    return float(other) if packet == "mul" else 1.0 / float(other)


def _words(packet: str) -> str:
    return "shifts or pads tokens" if packet in ("constant_pad_nd", "roll", "cat") else f"sums over tokens ({packet})"
