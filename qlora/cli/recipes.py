"""A recipe to begin with: of another trainer's (`qlora-train --import`), or of a base and rows (`--new`)."""

from __future__ import annotations

from pathlib import Path

from qlora import shown
from qlora.cli import common
from qlora.redaction import redact


def import_recipe(file: Path, name: Path | None) -> None:
    """Write `name`, or the file's own name as .toml in the current folder, and say what became of each key."""
    from qlora import recipe_file
    from qlora.importers.read import read

    target = recipe_file.target_of(name or Path(f"{file.stem}.toml"))
    found = read(file)
    recipe_file.write(target, found.table, found.head(), found.notes)
    carried, ours, left = found.of("carried"), found.of("ours"), found.of("left")
    lines = [f"{target.name}: from {found.file.name}, a configuration of {found.trainer}"]
    for title, accounts, between in (
        (f"carried ({len(carried)})", carried, "→"),
        (f"as it is done here anyway ({len(ours)})", ours, "·"),
        (f"NOT CARRIED ({len(left)})", left, "·"),
    ):
        lines += [title] if accounts else []
        lines += [f"  {account.key} {between} {account.said}" for account in accounts]
    _tell([*lines, f"next: qlora-train {name or target.name} --check"])


def first_recipe(name: Path | None, base: str | None, rows: str | None) -> None:
    """Write `name` for a base and rows, and say what was looked at."""
    from qlora.errors import Problem, RecipeError

    if name is None or base is None or rows is None:
        given = {"--new NAME.toml": name, "--base BASE": base, "--data PATH": rows}
        lacks = " and ".join(option for option, value in given.items() if value is None)
        hint = "for example qlora-train --new first.toml --base Qwen/Qwen3-4B --data rows.jsonl"
        raise RecipeError([Problem("qlora-train", f"a first recipe needs {lacks}", hint)])
    from qlora import recipe_file

    recipe_file.target_of(name)  # before anything is imported
    from qlora import new_recipe
    from qlora.cli import cards
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink
    from qlora.stop import StopRequest

    stop = StopRequest()
    screen = common.Screen(ConsoleSink(), stop)
    with common.Signals(stop, screen):
        try:
            cards.settle(Sinks(screen))
            written = new_recipe.first_recipe(name, base, rows, sink=screen)
        finally:
            screen.close()
    _tell([*written.said, f"written: {written.path}; next: qlora-train {name} --check"])


def _tell(lines: list[str]) -> None:
    common.tell(*(shown.one_line(redact(common.as_options(line))) for line in lines))
