"""Draws the house in qlora/README.md anew: the plan of its floors, and the spine with its lines.

    python tools/house.py            after a module was added, moved, or became longer or shorter
    python tools/house.py --check    reports what is stale and leaves with 1

The floors and the order within a room are those of tests/floors.py; what a module is for is the first
sentence of its docstring. The rest of the page is written by hand.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora"
PAGE = PACKAGE / "README.md"
SPINE_AT_MOST = 5700
# What one must read to understand a run, in the order in which it reads best.
SPINE: dict[str, tuple[str, ...]] = {
    "What a person writes, and what a run emits": ("recipe", "events.py"),
    "A row, from its file to a tensor": (
        *("data/sources.py", "data/formats.py", "data/chat.py", "data/prepare.py", "data/packing.py"),
        *("data/loader.py", "batch.py"),
    ),
    "A weight, from its file to a layer with an adapter": (
        *("model/resolve.py", "model/load.py", "model/nf4.py", "model/adapters.py"),
    ),
    "A step": ("step",),
    "A run": ("training",),
}
# Of these rooms, what a reader of a plain run may leave closed: what makes the same step smaller, faster or shared by
# several processes; other losses than a plain run's; its last event, and how rows and evaluation are put together.
WINGS = (
    "step/kernels",
    "step/lora_linear.py",
    "step/experts.py",
    "step/expert_lora.py",
    "step/tiled_mlp.py",
    "step/head_loss.py",
    "step/head_blocks.py",
    "step/offload.py",
    "step/objectives.py",
    "step/group_relative.py",
    "step/soft_labels.py",
    "training/reference.py",
    "training/preferences.py",
    "training/questions.py",
    "training/dividing.py",
    "training/measuring.py",
    "training/handing.py",
    "training/exchanging.py",
    "training/channel.py",
    "training/processes.py",
    "training/sharing.py",
    "training/words.py",
    "training/follower.py",
    "training/answered.py",
    "training/ending.py",
    "training/generations.py",
    "training/rollouts.py",
    "training/rows_of_run.py",
)
MODULES_A_LINE = 3


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    drawn = redrawn(page)
    missing = [entry for entries in SPINE.values() for entry in entries if not (PACKAGE / entry).exists()]
    if missing:
        print(f"the spine names what is not there: {', '.join(missing)}", file=sys.stderr)
    if "--check" in sys.argv[1:]:
        if drawn != page or missing:
            sys.exit("qlora/README.md is not what the code is: python tools/house.py")
        return
    PAGE.write_text(drawn, encoding="utf-8")
    print(f"the spine has {sum(lines_of(file) for file in spine_files()):,} lines, at most {SPINE_AT_MOST:,}")


def redrawn(page: str) -> str:
    """The page with its plan and its spine as the code is now."""
    for name, text in (("plan", plan()), ("spine", spine())):
        marked = re.compile(rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if len(marked.findall(page)) != 1:
            sys.exit(f"{PAGE}: there is no place for the {name}")
        page = marked.sub(lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}", page)  # type: ignore[misc]
    return page


# --- the plan --------------------------------------------------------------------------------------------------------


def plan() -> str:
    """The floors as a mermaid drawing, the highest first."""
    floors = architecture("FLOORS")
    lines = ["```mermaid", '%%{init: {"flowchart": {"wrappingWidth": 500}}}%%', "flowchart TB"]
    drawn = []
    for floor in sorted({number for name, number in floors.items() if name}, reverse=True):
        rooms = [name for name, number in floors.items() if number == floor and (PACKAGE / name).is_dir()]
        single = [f"{name}.py" for name, number in floors.items() if number == floor and is_module(name)]
        if rooms or single:
            drawn.append(f"floor{floor}")
            lines += [f'  subgraph floor{floor}["{floor}"]', "    direction TB"]
            lines += [f"    {node}" for room in rooms for node in room_nodes(room)]
            lines += [f'    modules{floor}["{wrapped(single)}"]'] if single else []
            lines.append("  end")
    return "\n".join([*lines, f"  {' --> '.join(drawn)}", "```"])


def room_nodes(room: str) -> Iterator[str]:
    """A room with its modules in the order of its line, and each room within it."""
    names = architecture("LINES")[room.replace("/", ".")]
    modules = [name for name in names if is_module(f"{room}/{name}")]
    yield f'{room.replace("/", "_")}["<b>{room}/</b><br/>{wrapped(modules)}"]'
    for name in names:
        if (PACKAGE / room / name).is_dir():
            yield from room_nodes(f"{room}/{name}")


def wrapped(names: list[str]) -> str:
    rows = [names[start : start + MODULES_A_LINE] for start in range(0, len(names), MODULES_A_LINE)]
    return "<br/>".join(" · ".join(row) for row in rows)


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file()


def architecture(name: str) -> dict[str, list[str]]:
    """FLOORS or LINES, which a test holds."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return getattr(import_module("tests.floors"), name)  # type: ignore[no-any-return]


# --- the spine -------------------------------------------------------------------------------------------------------


def spine() -> str:
    """The files to read, in reading order, with their lines and what they are for."""
    text = []
    for number, (title, entries) in enumerate(SPINE.items(), 1):
        rows = [f"| `{name_of(file)}` | {lines_of(file):,} | {purpose_of(file)} |" for file in expanded(entries)]
        text.append("\n".join([f"{number}. {title}", "", "| file | lines | |", "| --- | ---: | --- |", *rows]))
    total = sum(lines_of(file) for file in spine_files())
    return "\n\n".join([*text, f"**{total:,} lines in all**; a test keeps them at {SPINE_AT_MOST:,} or fewer."])


def spine_files() -> list[Path]:
    return [file for entries in SPINE.values() for file in expanded(entries)]


def expanded(entries: tuple[str, ...]) -> list[Path]:
    """The files of these entries that are there; of a room all, in the order of its line."""
    files = []
    for entry in entries:
        place = PACKAGE / entry
        if place.is_dir():
            files += [place / "__init__.py", *(place / f"{name}.py" for name in architecture("LINES")[entry])]
        elif place.is_file():
            files.append(place)
    return [file for file in files if not name_of(file).startswith(WINGS)]


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def lines_of(file: Path) -> int:
    return file.read_text(encoding="utf-8").count("\n")


def purpose_of(file: Path) -> str:
    """The first sentence of a module's docstring, as a cell of a table."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.?!])\s", text)[0]
    return sentence.rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    main()
