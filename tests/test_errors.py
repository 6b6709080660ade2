"""The tree of errors: drawn as it is, two lines each, and what a library raises over a stranger's file."""

from __future__ import annotations

import gc
import re
import signal
import sys
import weakref

import pytest
import torch

from qlora import errors
from qlora.errors import DataError, Problem, QloraError, RecipeError, StoppedBySignal, foreign_failures, forget_frames


def drawn() -> dict[str, tuple[str | None, int | None]]:
    """Of each class in the module's drawing its parent, and the exit code that stands beside it."""
    found: dict[str, tuple[str | None, int | None]] = {}
    above: dict[int, str] = {}
    for branch, name, code in re.findall(r"^    ([│├└─ ]*)([A-Z]\w+) +(\d+)?", errors.__doc__ or "", re.MULTILINE):
        depth = len(branch) // 4
        above[depth] = name
        found[name] = (above[depth - 1] if depth else None, int(code) if code else None)
    return found


def test_the_drawing_is_the_tree() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, QloraError)]
    parents = {kind.__name__: kind.__bases__[0].__name__ for kind in classes if kind is not QloraError}
    tree = drawn()
    assert {name: parent for name, (parent, _) in tree.items() if parent} == parents
    for kind in classes:
        code = tree[kind.__name__][1]
        if code is not None and kind is not StoppedBySignal:  # that one's code is its signal's
            assert kind.exit_code == code, kind
    assert [tree[name][1] for name in ("UserError", "DoesNotFit", "TrainingStopped", "StoppedBySignal")] == [
        2,
        3,
        4,
        130,
    ]


def test_a_stop_ends_as_shells_count() -> None:
    assert StoppedBySignal("a", "b", signal.SIGINT).exit_code == 130
    assert StoppedBySignal("a", "b", signal.SIGTERM).exit_code == 143


def test_what_and_hint_are_one_line_each() -> None:
    error = QloraError("column 'a\n  b' is\r\nodd\n", "rename it\n")
    assert (error.what, error.hint, str(error)) == ("column 'a b' is odd", "rename it", "column 'a b' is odd")


def test_a_recipe_has_all_its_problems_and_shows_the_first() -> None:
    problems = [Problem("a.toml:1", "one", "do one"), Problem("a.toml:2", "two", "do two")]
    error = RecipeError(problems)
    assert error.problems == problems and (error.what, error.hint) == ("a.toml:1: one", "do one")


def test_whatever_a_library_raises_is_caught_and_has_a_reason() -> None:
    with foreign_failures() as failure:
        raise Exception("a  message\nof two lines " + "x" * 300)
    assert failure.reason.startswith("a message of two lines xxx") and len(failure.reason) == 200
    with foreign_failures() as failure:
        raise ZeroDivisionError
    assert isinstance(failure.error, ZeroDivisionError) and failure.reason == "ZeroDivisionError"
    with foreign_failures() as failure:
        pass
    assert failure.error is None


def test_what_a_failed_trial_computed_with_is_let_go_at_once() -> None:
    """The error is kept, and its traceback keeps who caught it: a circle, in which a GPU's memory would wait."""

    class Tensors(set[str]):
        __hash__ = object.__hash__

    held: weakref.WeakSet[set[str]] = weakref.WeakSet()

    def computing(at_hand: set[str]) -> None:
        held.add(at_hand)
        try:
            raise KeyError("in the kernel") from None
        except KeyError as error:
            raise RuntimeError("behind it") from error

    def caught() -> str:
        with foreign_failures(trial=True) as failure:
            computing(Tensors())
        return failure.reason

    gc.disable()
    try:
        assert caught() == "behind it" and not held
    finally:
        gc.enable()


def test_errors_that_name_each_other_in_a_circle_end() -> None:
    one, other = KeyError("one"), KeyError("other")
    one.__context__, other.__cause__ = other, one
    with foreign_failures() as failure:
        raise other
    assert failure.error is other


def test_an_error_that_is_kept_keeps_no_tensor_and_the_callers_frames_stay() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def deep() -> None:
        big = torch.ones(64)
        held.append(weakref.ref(big))
        raise ValueError("deep")

    def work() -> None:
        try:
            deep()
        except ValueError as error:
            raise KeyError("above") from error

    def callers() -> None:
        own = torch.ones(8)
        held.append(weakref.ref(own))
        raise OSError("his own error, which he is handling")

    try:
        callers()
    except OSError:
        handled = sys.exception()
        with pytest.raises(KeyError) as caught:
            work()
        assert held[1]() is not None
        forget_frames(caught.value, handled)
        assert held[1]() is None and held[0]() is not None


def test_our_own_errors_and_interrupts_pass() -> None:
    for error in (errors.ModelError("a", "b"), KeyboardInterrupt()):
        with pytest.raises(type(error)), foreign_failures():
            raise error


def test_memory_that_ran_out_and_a_gpu_that_failed_pass() -> None:
    """They are no fault of the file that was read, except where the process has a limit of its own for it."""
    for error in (MemoryError(), RuntimeError("CUDA error: an illegal memory access was encountered")):
        with pytest.raises(type(error)), foreign_failures():
            raise error
        with foreign_failures(memory_too=True) as failure:
            raise error
        assert failure.error is error


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: invalid configuration argument",
        "CUDA error: invalid argument",
        "CUDA error: invalid device function",
        "CUDA error: operation not supported",
        "CUDA error: too many resources requested for launch",
        "CUDA error: the provided PTX was compiled with an unsupported toolchain.",
        "HIP error: invalid device function",
        "Triton Error [CUDA]: device kernel image is invalid",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_a_kernel_that_is_refused_is_an_answer_of_its_trial(text: str) -> None:
    with foreign_failures(trial=True) as failure:
        raise RuntimeError(text)
    assert failure.reason == text
    with pytest.raises(RuntimeError), foreign_failures():
        raise RuntimeError(text)


def test_a_gpu_that_is_lost_ends_a_trial_too() -> None:
    for text in ("CUDA error: an illegal memory access was encountered", "CUDA error: unspecified launch failure"):
        with pytest.raises(RuntimeError, match=text), foreign_failures(trial=True):
            raise RuntimeError(text)


class PanicException(BaseException):
    """As pyo3 makes one in each library: its own class, that nobody can import."""

    __module__ = "pyo3_runtime"


def test_a_native_librarys_panic_is_caught_and_what_ends_a_process_is_not() -> None:
    with foreign_failures() as failure:
        raise PanicException("gave up")
    assert isinstance(failure.error, PanicException) and failure.reason == "gave up"
    for error in (KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)), foreign_failures():
            raise error


def test_a_real_panic_is_one() -> None:
    """tokenizers' engine for patterns gives up after ten million trials."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"(?:.|.)*[xq][yz]"), "isolated")
    with foreign_failures() as failure:
        split.pre_tokenize_str("x" * 40)
    assert not isinstance(failure.error, Exception) and "retry-limit" in failure.reason


def test_what_a_message_quotes_steers_no_terminal() -> None:
    error = QloraError("folder \x1b]0;owned\x07\x9b31m\udcff: lies", "rename \u202eit\x7f")
    assert (error.what, error.hint) == ("folder ␛]0;owned␇\\x9b31m\\xff: lies", "rename \\u202eit␡")
    assert str(error) == error.what


def test_a_message_that_quotes_a_name_of_a_hundred_thousand_letters_is_cut_in_its_middle() -> None:
    error = QloraError(f"index.json: {'x' * 100_000!r} is not a safetensors file", "y" * 100_000)
    assert error.what.startswith("index.json: 'xxx") and error.what.endswith("xxx' is not a safetensors file")
    assert len(error.what) < 1_500 and len(error.hint) < 1_500


def test_a_secret_is_hidden_before_a_message_is_cut() -> None:
    token = "hf_" + "a" * 30
    for place in range(errors.MAX_CHARACTERS - 540, errors.MAX_CHARACTERS - 470):
        assert "aaa" not in errors.DataError("x" * place + f" {token} " + "y" * 1000, "hint").what


def test_a_notebook_shows_two_lines_a_problem() -> None:
    """IPython asks for `_render_traceback_`, and shows its lines in place of a traceback."""
    problems = [Problem("a.toml:1", "unknown key", "did you mean it?"), Problem("a.toml:2", "\x1b[2J", "mend it")]
    assert RecipeError(problems)._render_traceback_() == [
        "\033[1;31merror\033[0m: a.toml:1: unknown key",
        "       did you mean it?",
        "\033[1;31merror\033[0m: a.toml:2: ␛[2J",
        "       mend it",
    ]
    assert DataError("what", "hint")._render_traceback_() == ["\033[1;31merror\033[0m: what", "       hint"]
