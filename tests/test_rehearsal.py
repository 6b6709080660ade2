"""One run on the stand-in for a card: no line that only a GPU would reach is left unrun.

A recipe is trained, memory runs out in the middle, the run is stopped, resumed, evaluated and exported. `coverage` then
says which lines of the CUDA path that didn't reach. The path is found in the code itself: all of `device.py`, and each
branch that asks `is_card` or a planned machine's `device_type`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora import api, determinism
from qlora.errors import HardwareError, StoppedBySignal
from qlora.events import Event, Recorder, Sinks
from qlora.export.verify import weights
from qlora.recipe.reading import load_recipe
from qlora.stop import StopRequest
from qlora.training import setup
from tests.card import MIB, Card, rehearsal
from tests.floors import MODULES, PACKAGE
from tests.runs import EVERYTHING, StopAfter, run_dir, train, values, write_recipe

SETTINGS = (*EVERYTHING, "train.max_steps=5", "lora.r=64", "export.formats=['hf']")

SHORT = (
    "data.max_length=96",
    "train.max_steps=1",
    "train.deterministic=false",
    "data.eval_fraction=0",
    "memory.limit='480MiB'",
    "memory.stream_weights=true",
    "memory.embedding='host'",
)

# Lines of the CUDA path that this run does not reach, by how `module::function: statement` begins, with the reason.
NOT_REHEARSED = {
    "device.py::Cuda.": "torch.cuda itself",
    "device.py::available_ram": "asks the host, and nothing of a card",
    "device.py::free_bytes": "asked where an export measures a family whole, which no family of the tests needs",
    "device.py::capability: return (0, 0)": "an AMD card; tests/test_device.py",
    "device.py::_memory: free = max(": "a card that shares the RAM; tests/test_device.py",
    "device.py::is_full": "asked where the driver may spill, Windows and WSL; tests/memory/test_spilling.py",
    "device.py::pinned: return block": "where the system pins no more; tests/test_device.py",
    "device.py::measure_context": "where a command begins; tests/test_device.py, tests/cli/test_cards.py",
    "device.py::context_taken: return measured": "where it was measured; tests/test_device.py",
    "device.py::on_default_stream": "nothing computes beside the default stream yet; tests/test_device.py",
    "memory/multi_gpu.py::this_rank: card = ": "where several processes join; tests/memory/test_multi_gpu.py",
    "training/channel.py::Channel.__init__": "NCCL, where several processes join; tests/training/test_channel.py",
    "training/words.py::word_of: limit = ": "what several processes are told; tests/training/test_words.py",
    **dict.fromkeys(
        (f"device.py::{name}" for name in ("facts", "trouble", "trouble_in_sight", "has_xpu")),
        "a command's questions before a run; tests/test_device.py asks them of the stand-in",
    ),
    **dict.fromkeys(("device.py::live_bytes", "prove/"), "a proof's own; tests/prove"),
    "doctor/": "asked beside a run; tests/doctor/test_stages.py asks it of the stand-in",
    "determinism.py::exactly": "an operation without an exact form, which no CPU has; tests/test_determinism.py",
    'flat/managed.py::why_not: return "this system': "Windows and WSL; tests/flat/test_managed.py",
    'flat/managed.py::why_not: return "bitsandbytes': "another build of it; tests/flat/test_managed.py",
    "flat/managed.py::why_not: needed": "without room in RAM; tests/flat/test_managed.py",
    "flat/managed.py::why_not: return f'paging needs": "without room in RAM; tests/flat/test_managed.py",
    "memory/spec.py::_kernel: return assumed": "asked of a card before a run; tests/memory",
    "memory/spilling.py": "Windows and WSL; tests/memory/test_spilling.py",
    **dict.fromkeys(
        (f"model/attention_choice.py::choose: {one}" for one in ("return (kernel", "raise _imp", "return (None, '')")),
        "CUDA's own kernels pass no trial on a CPU; tests/model/test_attention_choice.py",
    ),
    "model/attention_choice.py::passing: yield kernel": "nor here",
    "model/compiled.py::choose: return None": "there is no Triton beside a CPU's torch; tests/model/test_compiled.py",
    "memory/plan.py::does_not_fit": "weights that are streamed by hand, or not in 4 bit; tests/memory/test_plan.py",
    "memory/plan.py::_levers": "of what fits nothing is asked; tests/memory/test_plan.py",
    "model/base_cache/reading.py::_Reading.tensor": "a base of 1 GiB and more; tests/model/base_cache/test_reading.py",
    "model/base_cache/layers_on_disk.py": "RAM has room here; tests/training/test_streamed_run.py",
    "model/weight_stores.py::DiskStore": "the same; tests/model/test_weight_stores.py",
    "model/weight_stores.py::HostStore.settle": "where the system pins no more; tests/model/test_weight_stores.py",
    "training/processes.py": "one process trains here; tests/training/test_follower.py, on CPUs",
    "step/offload.py::Pool.said": "no input of this model takes 2 MiB; tests/training/test_offloaded_run.py",
    "model/lora_functions.py::_now: return None": "this run drops, which is peft's; tests/model/test_lora_functions.py",
}
# Code that asks for a type of device itself, with the reason: most mean the CPU's own kernels.
ASKS_A_TYPE = {
    "model/cpu_matmul.py": "the CPU's products; on a card there are none to replace",
    "step/head_loss.py": "the CPU keeps its chunks; meta tensors stand for a card",
    "step/expert_lora.py": "the same of adapters on experts",
    "step/experts.py": "grouped products of bf16 are a GPU's; the CPU multiplies expert by expert",
    "flat/moments.py": "meta tensors are updated in one run, as a card's are",
    "prove/suite.py": "a person names it",
    "cli/prove.py": "a person names it",
}


class PinchAfter:
    """A sink that lets the card have less memory than its last steps took, once a step is done."""

    def __init__(self, step: int, card: Card) -> None:
        self.step, self.card = step, card

    def emit(self, event: Event) -> None:
        if event.kind != "step":
            return
        if event.as_dict()["step"] == self.step:
            self.card.limit = self.card.live + (self.card.highest - self.card.live) * 3 // 4
        else:
            self.card.highest = self.card.live

    def close(self) -> None:
        pass


def rehearse(recipe: Path, short: Path, card: Card) -> list[Recorder]:
    """A short run; then one that is pinched after step 2, stopped after 4, resumed to its end and exported."""
    train(short, *SHORT)
    first, stop = Recorder(), StopRequest()
    sinks = Sinks(first, PinchAfter(2, card), StopAfter(4, stop))
    with pytest.raises(StoppedBySignal):
        api.train(load_recipe(recipe, SETTINGS), name=recipe.stem, sink=sinks, stop=stop)
    card.limit = card.total
    card.capability = (5, 2)
    with pytest.raises(HardwareError, match="older than"):
        setup.pick_device()
    card.capability = (8, 6)
    return [first, train(recipe, *SETTINGS, mode="resume")]


@pytest.fixture(scope="module")
def reached(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, set[int]]:
    """The lines that the rehearsal ran, by module. What it did is asserted here."""
    coverage = pytest.importorskip("coverage")
    recipe, short = (write_recipe(tmp_path_factory.mktemp(name), llama) for name in ("rehearsal", "short"))
    watch = coverage.Coverage(data_file=None, include=[str(PACKAGE / "**" / "*.py")])
    with pytest.MonkeyPatch.context() as patch, rehearsal(patch, Card(total=512 * MIB)) as card:
        # A command that ran in this process before may have set it; a user's fresh process has not.
        patch.delenv(determinism.WORKSPACE, raising=False)
        # Another process, in which there is no stand-in: it compares the written weights with what they should be.
        patch.setattr(weights, "reopen", lambda merge, targets: {key: [] for key in targets})
        watch.start()
        try:
            first, second = rehearse(recipe, short, card)
        finally:
            watch.stop()
    assert card.out_of_memory and [event.as_dict()["step"] for event in first.of("recovered")] == [3]
    assert values(first, "step", "step") == [1, 2, 3, 4] and values(second, "step", "step") == [5]
    assert values(second, "end", "reason") == ["finished"]
    assert list((run_dir(recipe) / "export" / "hf").glob("*.safetensors"))
    data = watch.get_data()
    return {path: set(data.lines(str(path)) or ()) for path in MODULES}


@pytest.mark.slow
def test_the_rehearsal_reaches_every_line_of_the_cuda_path(reached: dict[Path, set[int]]) -> None:
    missed = [
        f"{path.relative_to(PACKAGE)}:{statement.lineno}: {ast.unparse(statement).splitlines()[0]}"
        for path in MODULES
        for where, statement in cuda_path(path)
        if not reached[path] & header(statement) and not is_excepted(where, statement)
    ]
    assert not missed, "\n".join(missed)


def is_excepted(where: str, statement: ast.stmt) -> bool:
    return any(f"{where}: {ast.unparse(statement)}".startswith(one) for one in NOT_REHEARSED)


def test_nothing_asks_a_tensor_for_its_kind_of_device() -> None:
    """`is_card` is asked instead: what asks a type is no part of the rehearsal."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asks = isinstance(node, ast.Compare) and any(
                isinstance(side, ast.Constant) and side.value in ("cuda", "cpu", "xpu", "mps")
                for one in node.comparators
                for side in ast.walk(one)
            )
            if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_xpu"):
                found.add(str(path.relative_to(PACKAGE)))
            if asks and not any(word in ast.unparse(node) for word in ("device_type", "target")):
                found.add(str(path.relative_to(PACKAGE)))
    assert found == {"device.py", *ASKS_A_TYPE}


def test_the_path_is_found_in_the_code() -> None:
    """The search itself: a branch on a card, its opposite, and a name that holds the answer."""
    source = """
def one(device):
    if is_card(device):
        return 1
    return 2

def two(device):
    if device.type == "cpu" and not hardware.is_card(device):
        return 3
    value = 4
    return value

class Three:
    def __init__(self, places):
        self.on_card = any(is_card(place) for place in places)
        later = 5 if self.on_card else 6

    def use(self):
        if self.on_card and self.more:
            self.seven()
        else:
            self.eight()
"""
    found = [ast.unparse(statement) for _, statement in branches(ast.parse(source))]
    assert found == ["return 1", "value = 4", "return value", "later = 5 if self.on_card else 6", "self.seven()"]


# --- the CUDA path, by the syntax tree -------------------------------------------------------------------------------


def header(statement: ast.stmt) -> set[int]:
    """Lines of a statement, of a compound one those before its body."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return set(range(statement.lineno, max(last, statement.lineno) + 1))


def cuda_path(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Statements that only a card reaches, each with `module::function`."""
    tree, module = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(PACKAGE))
    found = everything(tree) if module == "device.py" else branches(tree)
    for where, statement in found:
        yield f"{module}::{where}", statement


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef))


def everything(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Each statement of each function, without the arms that only a CPU takes."""
    for name, function in functions(tree):
        host = set().union(*(set(inside(arm)) for arm in arms(function, set(), of_card=False)))
        yield from ((name, one) for one in inside(function.body) if one not in host)


def branches(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """What stands in a branch that a card decides, and each statement that decides within itself."""
    answers = names_of_answers(tree)
    for name, function in functions(tree):
        found = dict.fromkeys(one for arm in arms(function, answers, of_card=True) for one in inside(arm))
        for one in inside(function.body):
            own = [node for node in parts(one) if isinstance(node, ast.IfExp) and asks_a_card(node.test, answers)]
            if one in found or own:
                yield name, one


def names_of_answers(tree: ast.Module) -> set[str]:
    """Names and attributes that hold the answer to `is_card`."""
    return {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.IfExp) and asks_a_card(node.value, set())
    }


def asks_a_card(test: ast.expr, answers: set[str]) -> bool:
    text = ast.unparse(test)
    named = any(isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in answers for node in ast.walk(test))
    return named or "is_card(" in text or "is_available(" in text or ("device_type" in text and "'cuda'" in text)


def arms(function: ast.FunctionDef, answers: set[str], of_card: bool) -> Iterator[list[ast.stmt]]:
    """Blocks that are run on a card alone, or (`of_card` False) on a CPU alone."""
    for node in ast.walk(function):
        for block in blocks(node):
            for place, one in enumerate(block):
                if isinstance(one, ast.If) and asks_a_card(one.test, answers):
                    text = ast.unparse(one.test)
                    negated = re.search(r"not [\w.]*(is_card|is_available)\(|!= 'cuda'|^not ", text) is not None
                    ends = isinstance(one.body[-1], ast.Return | ast.Raise | ast.Continue)
                    yield (one.orelse or (block[place + 1 :] if ends else [])) if negated == of_card else one.body


def blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        if isinstance(block := getattr(node, name, None), list) and block:
            yield block


def inside(block: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a block and of the blocks in it, in order, without texts and definitions."""
    for one in block:
        if isinstance(one, ast.FunctionDef | ast.ClassDef):
            yield from inside(one.body)
            continue
        if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)) and not isinstance(one, ast.Pass):
            yield one
        for inner in blocks(one):
            yield from inside(inner)
        for handler in getattr(one, "handlers", []):
            yield from inside(handler.body)


def parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement itself, not of the statements in it."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.expr):
            yield from ast.walk(child)
