"""Imports point one way: a part of the package knows those below it, and none above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import calm_pl

PACKAGE = Path(calm_pl.__file__).parent
# From the ground up. What shares a floor may know each other.
FLOORS = (
    ("__init__", "lazy", "conf", "progress", "stopping", "functional"),
    ("audio", "container", "video"),
    ("clip",),
    ("headstore",),
    ("methods",),
    ("baselines",),
    ("backbone",),
    ("data",),
    ("classifier", "classifier_files"),
    ("training",),
    ("report",),
    ("run",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}


def part_of(module: str) -> str:
    """The part of the package that a module is in: ``calm_pl.data.recipes.hf`` is in ``data``."""
    _, *inside = module.split(".")
    return inside[0] if inside else "__init__"


def imported(file: Path) -> Iterator[str]:
    """The project's modules that a file imports when it is run, inside functions too; types alone do not count."""
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def test_imports_point_downward() -> None:
    upward = []
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for name in imported(file):
            if name.split(".")[0] == "calm_pl" and FLOOR_OF[part_of(name)] > FLOOR_OF[part_of(module)]:
                upward.append(f"{module} imports {name}")
    assert not upward


def test_every_part_has_its_floor() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts == set(FLOOR_OF)
