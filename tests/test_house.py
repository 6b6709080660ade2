"""qlora/README.md draws the house as it is: each module on its floor, the spine with its lines; pages and links."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.floors import FLOORS, MODULES, PACKAGE, ROOT
from tools.house import WINGS

PAGE = (PACKAGE / "README.md").read_text(encoding="utf-8")
SPINE_AT_MOST = 5700


def drawn_modules() -> list[tuple[int, str]]:
    """Floor and path of each module in the drawing."""
    (drawing,) = re.findall(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)
    found, floor = [], 0
    for line in drawing.splitlines():
        if number := re.search(r'subgraph \w+\["(\d+)', line):
            floor = int(number[1])
        elif node := re.search(r'\w+\["(?:<b>([\w/]+)/</b><br/>)?(.+)"\]', line):
            names = re.split(r"<br/>| · ", node[2])
            found += [(floor, f"{node[1]}/{name}.py" if node[1] else name) for name in names if name]
    return found


def test_the_plan_has_each_module_once_on_its_floor() -> None:
    drawn = drawn_modules()
    assert sorted(path for _, path in drawn) == sorted(str(path.relative_to(PACKAGE)) for path in MODULES)
    for floor, path in drawn:
        assert FLOORS[path.split("/")[0].removesuffix(".py")] == floor, path


def test_the_page_is_the_one_that_the_script_draws() -> None:
    """After a change of modules: python tools/house.py"""
    command = [sys.executable, "tools/house.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def spine_of_the_page() -> dict[str, int]:
    section = PAGE.partition("## The spine")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w/.]+)` \| ([\d,]+) \|", section, re.MULTILINE)
    return {name: int(lines.replace(",", "")) for name, lines in rows}


def test_the_spine_is_counted_and_short() -> None:
    spine = spine_of_the_page()
    rooms = {
        str(path.relative_to(PACKAGE))
        for room in ("recipe", "step", "training")
        for path in (PACKAGE / room).rglob("*.py")
        if not str(path.relative_to(PACKAGE)).startswith(WINGS)
    }
    walks = {f"data/{name}.py" for name in ("sources", "formats", "chat", "packing", "prepare", "loader")}
    walks |= {f"model/{name}.py" for name in ("resolve", "load", "nf4", "adapters")}
    assert set(spine) == {*rooms, *walks, "events.py", "batch.py"}
    counted = {name: len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in spine}
    assert spine == counted
    assert f"**{sum(counted.values()):,} lines in all**" in PAGE
    assert sum(counted.values()) <= SPINE_AT_MOST


def test_every_path_that_the_page_names_is_there() -> None:
    written = re.sub(r"<!-- spine: .*<!-- end of spine -->", "", PAGE, flags=re.DOTALL)
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", written):
        assert any((folder / name).exists() for folder in (PACKAGE, ROOT, ROOT / "tests")), name


def test_the_glossary_has_twenty_words() -> None:
    section = PAGE.partition("## Words")[2].partition("\n## ")[0]
    assert len(re.findall(r"^\| (?!word|---)", section, re.MULTILINE)) == 20


def test_the_readme_is_a_newcomers_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_every_link_of_the_pages_leads_somewhere() -> None:
    pages = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *PACKAGE.glob("*.md"))]
    pages += ["recipes/README.md", "recipes/MODELS.md", "tools/bench/README.md"]
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
            assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_result_of_a_benchmark_is_in_its_page() -> None:
    bench = ROOT / "tools" / "bench"
    text = (bench / "README.md").read_text(encoding="utf-8")
    for file in (*bench.glob("results/*.json"), *(path for path in bench.glob("*.py") if "_" not in path.stem)):
        assert f"`{file.name}`" in text, file.name
