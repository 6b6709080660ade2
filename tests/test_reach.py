"""Nothing is there for tests alone: every public name is used, every module is reached from a command."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.floors import MODULES, PACKAGE, ROOT

# Names that nothing in the package uses, and why they stay.
UNUSED = {
    **dict.fromkeys(
        (f"qlora.model.weight_stores:{name}" for name in ("DiskStore", "STAGING_BLOBS", "_Read")),
        "the cache of bases gives it its files",
    ),
    "qlora.data.source_files:_Unchanged.readable": "Python's buffered reader asks it",
    **dict.fromkeys(
        (f"qlora.data.documents.tags:_Tags.handle_{name}" for name in ("data", "endtag", "starttag")),
        "html.parser calls it",
    ),
    "qlora.ask.transport:_Writer.writable": "Python's socketserver asks it of a file",
    **dict.fromkeys(
        (f"qlora.model.compiled_attention:{name}" for name in ("_shape", "_shapes")), "torch asks for shapes"
    ),
    "qlora.memory.trace:LiveBytes._should_skip_dynamo": "torch asks a mode for it",
    "qlora.report.console:Terminal.on_broken_pipe": "rich calls it",
    "qlora.report.drawn:Drawn._repr_mimebundle_": "Jupyter calls it",
    **dict.fromkeys(
        (f"qlora.errors:{name}._render_traceback_" for name in ("QloraError", "RecipeError")), "IPython calls it"
    ),
    "qlora.ask.transport:_Reader.readable": "Python's buffered reader asks it",
    **dict.fromkeys(
        (f"qlora.ask.transport:{name}" for name in ("Handler.handle_one_request", "Handler.log_message")),
        "http.server calls it",
    ),
    "qlora.ask.transport:LocalServer.handle_error": "socketserver calls it",
}
COMMANDS = ["qlora.cli.train", "qlora.cli.data", "qlora.cli.exam", "qlora.cli.export", "qlora.cli.estimate"]
COMMANDS += ["qlora.cli.chat", "qlora.prove.__main__"]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {
    module_of(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in (*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py")))
}


def names_of(statement: ast.AST) -> list[str]:
    """The names that a statement defines, none for what is neither a definition nor an assignment."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", ast.Pass())]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def is_registered(node: ast.stmt) -> bool:
    """Decorated with `@app.command()`, `@field_validator(…)` and the like: typer or pydantic calls it."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(name.startswith(("app.", "field_validator", "model_validator")) for name in decorators)


def uses(tree: ast.Module, module: str) -> Iterator[tuple[ast.stmt, set[tuple[str, str]]]]:
    """What each statement of a module uses: (module, name) of every module's names, (".", name) for each attribute.

    An import alone is no use, and neither is `__all__`.
    """
    origins: dict[str, set[tuple[str, str]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origins.setdefault(alias.asname or alias.name, set()).add((str(node.module), alias.name))
    for statement in tree.body:
        found: set[tuple[str, str]] = set()
        for node in ast.walk(statement) if names_of(statement) != ["__all__"] else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found |= origins.get(node.id, {(module, node.id)})
            elif isinstance(node, ast.Attribute):
                found.add((".", node.attr))
                if isinstance(node.value, ast.Name):
                    found |= {(f"{a}.{b}", node.attr) for a, b in origins.get(node.value.id, ())}
        yield statement, found


def unused_definitions() -> set[str]:
    """`module:name` and `module:Class.method` of what only tests could use; what uses itself alone is not used."""
    statements = [(module, *use) for module, tree in TREES.items() for use in uses(tree, module)]
    face = {name for node in TREES["qlora"].body if names_of(node) == ["__all__"] for name in constants(node)}
    unused: set[str] = set()
    before = -1
    while len(unused) > before:  # what an unused definition uses may be unused with it
        before = len(unused)
        counts = Counter(pair for _, _, found in statements for pair in found)
        left = []
        for module, node, found in statements:
            ours = module.startswith("qlora.") and not is_registered(node)
            names = [name for name in names_of(node) if ours and not name.startswith("__") and name not in face]
            lonely = [name for name in names if counts[module, name] == ((module, name) in found)]
            unused |= {f"{module}:{name}" for name in lonely}
            if ours and isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
                unused |= {f"{module}:{node.name}.{name}" for name in methods_of(node) if not counts[".", name]}
            if not lonely or lonely != names:
                left.append((module, node, found))
        statements = left
    return unused


def methods_of(node: ast.ClassDef) -> list[str]:
    """Names of a class' own methods that somebody must call by name."""
    methods = [method for method in node.body if isinstance(method, ast.FunctionDef) and not is_registered(method)]
    return [method.name for method in methods if not method.name.startswith("__")]


def constants(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_nothing_is_for_tests_alone() -> None:
    unused = unused_definitions()
    assert unused == set(UNUSED)


def test_every_module_is_reached_from_a_command() -> None:
    """Over imports wherever they stand, and over the names of modules that run as processes of their own."""
    seen: set[str] = set()
    waiting = [*COMMANDS]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            tree = TREES[module]
            found = {*(alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names)}
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
            waiting += (found | constants(tree)) & set(TREES)
    modules = {module_of(path) for path in MODULES}
    assert modules - seen == set()
