"""Prints the rooms of the package on their floors, and every import that breaks the house rules; read from the text alone.

    python tools/architecture.py           # rooms, floors, circles, upward imports
    python tools/architecture.py --arrows  # also who imports whom, with the number of imports

A room is a module or a package at the top of `graphprune/`. It may import rooms of its own floor and of floors below, as long as no
circle arises. Every import counts, also one within a function and one for annotations only.

Exit code: 0; 1 where there is a circle (of rooms or of files), an upward import, a room on no floor, or more than `MOST_ROOMS` rooms.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from _environment import ROOT, enter

PACKAGE = "graphprune"
MOST_ROOMS = 30

FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words", ("errors", "ops", "torch_private", "torch_version")),
    ("what ran", ("runs", "trace", "latency")),
    ("structure", ("groups", "export")),
    ("numbers", ("sizes", "masks")),
    ("surgery", ("surgery", "data")),
    ("values", ("criteria", "cost", "verify", "training")),
    ("decisions", ("pruners", "repair")),
    ("the verb", ("speedup",)),
    ("plans", ("recipes", "schedules", "sensitivity", "search")),
    ("hands", ("compat", "cli", "__main__", "__init__")),
)
"""From the ground up: the name of each floor and the rooms on it."""


@dataclass(frozen=True)
class Import:
    """One import of one module of the package by another.

    Attributes:
        file: path of the importing file within the package, such as "ops/linear.py".
        line: where it stands.
        target: path of the imported file, likewise.
    """

    file: str
    line: int
    target: str


@dataclass
class House:
    """The package as its imports show it.

    Attributes:
        files: all files of the package, by their paths within it.
        imports: all imports among them.
        floor_of: room -> number of its floor.
    """

    files: list[str]
    imports: list[Import]
    floor_of: dict[str, int] = field(default_factory=lambda: {r: i for i, (_, rooms) in enumerate(FLOORS) for r in rooms})

    @staticmethod
    def of(folder: Path) -> House:
        """Reads all files of a package."""
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
        known = set(files)
        return House(files, [i for file in files for i in imports_of(file, (folder / file).read_text(encoding="utf-8"), known)])

    @property
    def rooms(self) -> list[str]:
        """The rooms, `__init__` and `__main__` among them."""
        return sorted({room_of(file) for file in self.files})

    def homeless(self) -> list[str]:
        """Returns the rooms that stand on no floor."""
        return [room for room in self.rooms if room not in self.floor_of]

    def arrows(self) -> Counter[tuple[str, str]]:
        """Returns (room, imported room) -> number of imports, those of a room by itself left out."""
        pairs = ((room_of(i.file), room_of(i.target)) for i in self.imports)
        return Counter((a, b) for a, b in pairs if a != b)

    def upward(self) -> list[Import]:
        """Returns the imports of a room on a higher floor."""
        return [i for i in self.imports if self.floor_of.get(room_of(i.target), 0) > self.floor_of.get(room_of(i.file), 0)]

    def circles_of_rooms(self) -> list[list[str]]:
        """Returns sets of rooms that import each other, in a circle."""
        return circles(set(self.arrows()))

    def circles_of_files(self) -> list[list[str]]:
        """Returns sets of files that import each other, in a circle."""
        return circles({(i.file, i.target) for i in self.imports if i.file != i.target})


def room_of(file: str) -> str:
    """Returns the room that a file stands in."""
    return file.partition("/")[0].removesuffix(".py")


def imports_of(file: str, source: str, known: set[str]) -> Iterator[Import]:
    """Yields the imports of other files of the package; a package that is imported by its name stands for its `__init__.py`.

    Args:
        file: path of the importing file within the package.
        source: its text.
        known: all files of the package.
    """
    for node in ast.walk(ast.parse(source)):
        for name in _names(node, file):
            target = _file_of(name, known)
            if target is not None:
                yield Import(file, node.lineno, target)  # type: ignore[attr-defined]  # (what yields names has a line)


def _names(node: ast.AST, file: str) -> Iterator[str]:
    """Yields the dotted names that a statement imports, absolute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = [PACKAGE, *file.split("/")[:-1]]
        start = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*start, *([node.module] if node.module else [])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def _file_of(name: str, known: set[str]) -> str | None:
    """Returns the file that an imported name stands in: the longest part of the name that is a module or a package."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in range(len(parts), 0, -1):
        stem = "/".join(parts[1:end])
        for path in (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py"):
            if path in known:
                return path
    return None


def circles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """Returns the sets of nodes that reach each other, each sorted."""
    import networkx as nx  # noqa: PLC0415 - before the environment is entered there is nothing but the standard library

    graph: nx.DiGraph[str] = nx.DiGraph(sorted(arrows))
    return sorted(sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1)


def main() -> int:
    """Prints the house, and returns 1 where a rule is broken."""
    parser = argparse.ArgumentParser(description="rooms, floors, circles and upward imports of the package")
    parser.add_argument("--arrows", action="store_true", help="print who imports whom as well")
    options = parser.parse_args()
    house = House.of(ROOT / PACKAGE)
    for name, members in reversed(FLOORS):
        print(f"{name:>10} | {'  '.join(members)}")
    if options.arrows:
        for (a, b), count in sorted(house.arrows().items()):
            print(f"  {a} -> {b} ({count})")
    rooms = [room for room in house.rooms if room not in ("__init__", "__main__")]
    problems = [f"room on no floor: {room}" for room in house.homeless()]
    problems += [f"upward: {i.file}:{i.line} imports {i.target}" for i in house.upward()]
    problems += [f"circle of rooms: {', '.join(circle)}" for circle in house.circles_of_rooms()]
    problems += [f"circle of files: {', '.join(circle)}" for circle in house.circles_of_files()]
    problems += [f"{len(rooms)} rooms, more than {MOST_ROOMS}"] if len(rooms) > MOST_ROOMS else []
    print("\n".join(problems) or "no rule is broken")
    circular = len(house.circles_of_rooms()) + len(house.circles_of_files())
    print(f"{len(rooms)} rooms, {len(house.arrows())} arrows, {circular} circles, {len(house.upward())} upward")
    return 1 if problems else 0


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
