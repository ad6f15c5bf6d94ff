"""The house rules that no linter knows, checked on the text of every module of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import architecture
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "graphprune"

# Who may import what: graphs are made and rewritten in few places, files are written and timed in two. Anybody may name the types.
RESERVED = {
    "torch.fx": {"torch_private", "trace", "surgery"},
    "torch.onnx": {"export"},
    "onnx": {"export", "latency"},
    "onnxruntime": {"export", "latency"},
    "onnxscript": {"export", "latency"},
}
PRINTING_ROOMS = {"cli"}
FEWEST_REASON_LETTERS = 8

NETWORKS = (
    "alexnet|bert|convnext|deit|densenet|efficientnet|googlenet|gpt|inception|llama|mnasnet|mobilenet|regnet|resnet|resnext|roberta"
    "|shufflenet|squeezenet|swin|unet|vgg|vit|yolo"
)
# Whole words, also with a size or within snake_case and CamelCase ("ViT", "swin_t", "wide_resnet50_2", "MaxVit"), but not "swing".
NETWORK_NAME = re.compile(rf"(?i:\b|wide|max|se|[\d_])(?i:{NETWORKS})(?=s?\b|[\d_]|v\d|[A-Z])|[a-z](?=[A-Z])(?i:{NETWORKS})(?![a-z])")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package.

    Args:
        path: its path within the package, such as "ops/linear.py".
        source: its text.
    """

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.source)

    @property
    def lines(self) -> list[str]:
        """The lines of the text."""
        return self.source.splitlines()

    @property
    def room(self) -> str:
        """The room that the file belongs to."""
        return architecture.room_of(self.path)

    @property
    def functions(self) -> Iterator[FunctionNode]:
        """All functions, methods and nested functions."""
        return (node for node in ast.walk(self.tree) if isinstance(node, FunctionNode))


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of everything that is imported, absolute; `from a import b` yields "a.b".

    An attribute chain such as `torch.fx.Graph` counts as well, for `import torch` alone makes it available, and so does
    `import_module("a.b")`.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [PACKAGE, *module.path.split("/")[:-1]]
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, ast.unparse(name).strip("\"'")) for name in node.args[:1])


def check_reserved_imports(module: Module) -> list[str]:
    """torch.fx, onnx and onnxruntime are imported in their rooms only, except for annotations."""
    blocks = [node for node in ast.walk(module.tree) if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")]
    for_types = {statement.lineno for block in blocks for statement in block.body}
    return [
        f"line {line}: {name} belongs in {sorted(rooms)}"
        for line, name in imported(module)
        for reserved, rooms in RESERVED.items()
        if f"{name}.".startswith(f"{reserved}.") and module.room not in rooms and line not in for_types
    ]


def check_no_print(module: Module) -> list[str]:
    """Nothing is printed outside the command line and the demo."""
    calls = (node for node in ast.walk(module.tree) if isinstance(node, ast.Call))
    prints = [call for call in calls if ast.unparse(call.func) in {"print", "sys.stdout.write", "sys.stderr.write"}]
    return [] if module.room in PRINTING_ROOMS else [f"line {call.lineno}: prints" for call in prints]


def check_no_star_import(module: Module) -> list[str]:
    """Every imported name is written out."""
    return [f"line {line}: star import" for line, name in imported(module) if name.endswith(".*")]


def check_broad_except(module: Module) -> list[str]:
    """A handler that swallows every error gives its reason in a comment on its line."""
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and not isinstance(node.body[-1], ast.Raise):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
            caught = node.args
        else:
            continue
        names = {ast.unparse(error) if error else "everything" for error in caught}
        if names & {"everything", "Exception", "BaseException"} and not _has_reason(module.lines[node.lineno - 1]):
            found.append(f"line {node.lineno}: swallows every error and does not say why")
    return found


def _has_reason(line: str) -> bool:
    """Returns whether the line ends in a comment that is more than a `noqa`."""
    comment = line.partition("#")[2]
    words = re.sub(r"noqa(: *[A-Z]+\d+(, *[A-Z]+\d+)*)?", "", comment)
    return len(re.findall(r"[A-Za-z]", words)) >= FEWEST_REASON_LETTERS


def check_docstrings(module: Module) -> list[str]:
    """The module, each public class and each public function in it has a docstring."""
    bare = [] if ast.get_docstring(module.tree) else ["line 1: module without a docstring"]
    nodes = list(_public(module.tree.body))
    return bare + [f"line {node.lineno}: {node.name} has no docstring" for node in nodes if not ast.get_docstring(node)]


def _public(body: list[ast.stmt]) -> Iterator[ast.ClassDef | FunctionNode]:
    """Yields the public classes and functions of a body and the public members of these classes, overload stubs left out."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _public(node.body + node.orelse)
        elif isinstance(node, ast.ClassDef | FunctionNode) and not node.name.startswith("_"):
            if not any(ast.unparse(decorator).endswith("overload") for decorator in node.decorator_list):
                yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node.body)


def check_annotations(module: Module) -> list[str]:
    """Every parameter and every result of every function is annotated, self and cls apart."""
    methods = {id(node) for owner in ast.walk(module.tree) if isinstance(owner, ast.ClassDef) for node in owner.body}
    found = []
    for node in module.functions:
        own = node.args
        positional = own.posonlyargs + own.args
        static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
        named = positional[1:] if id(node) in methods and not static else positional
        optional = [argument for argument in (own.vararg, own.kwarg) if argument]
        missing = [argument.arg for argument in [*named, *own.kwonlyargs, *optional] if argument.annotation is None]
        missing += [] if node.returns else ["return"]
        found += [f"line {node.lineno}: {node.name} leaves {name} without annotation" for name in missing]
    return found


def check_no_network_by_name(module: Module) -> list[str]:
    """No network is known by name, be it in code, text or comments: what holds is derived from operators."""
    hits = [(number, NETWORK_NAME.search(line)) for number, line in enumerate(module.lines, 1)]
    return [] if module.path == "cli/demo.py" else [f"line {number}: names the network {hit[0]!r}" for number, hit in hits if hit]


Check = Callable[[Module], list[str]]
CHECKS: tuple[Check, ...] = (
    check_reserved_imports,
    check_no_print,
    check_no_star_import,
    check_broad_except,
    check_docstrings,
    check_annotations,
    check_no_network_by_name,
)
PATHS = sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT / PACKAGE).as_posix())
def test_module_keeps_the_house_rules(path: Path) -> None:
    """Every module of the package passes every check."""
    module = Module(path.relative_to(ROOT / PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
    problems = [f"{module.path}: {problem} ({(check.__doc__ or '').strip()})" for check in CHECKS for problem in check(module)]
    assert not problems, "\n".join(problems)


def test_rooms_stand_on_floors() -> None:
    """No room imports one of a higher floor, no circle, no room that the table of floors does not know, and few rooms."""
    house = architecture.House.of(ROOT / PACKAGE)
    rooms = [room for room in house.rooms if not room.startswith("__")]
    assert house.homeless() == []
    assert house.upward() == [], "move what is imported down, or the importing file up: the table is FLOORS in tools/architecture.py"
    assert house.circles_of_rooms() == []
    assert house.circles_of_files() == []
    assert len(rooms) <= architecture.MOST_ROOMS


def test_every_floor_names_rooms_that_exist() -> None:
    """The table of floors lists no room that has gone."""
    listed = {room for _, rooms in architecture.FLOORS for room in rooms}
    assert listed == set(architecture.House.of(ROOT / PACKAGE).rooms)


def planted(files: dict[str, str]) -> architecture.House:
    """Returns the house of a made-up package, given as path -> text."""
    known = set(files)
    return architecture.House(sorted(files), [i for path, text in files.items() for i in architecture.imports_of(path, text, known)])


HOUSE = {
    "__init__.py": "",
    "errors.py": "",
    "ops/__init__.py": "",
    "ops/labels.py": "",
    "masks/__init__.py": "",
    "masks/channels.py": "",
    "cost/__init__.py": "",
}


@pytest.mark.parametrize(
    ("path", "text", "target"),
    [
        ("ops/labels.py", "from graphprune.masks.channels import Masks", "masks/channels.py"),
        ("ops/labels.py", "def f():\n    from ..masks import channels", "masks/channels.py"),
        ("errors.py", "from . import cost", "cost/__init__.py"),
        ("masks/channels.py", "import graphprune", "__init__.py"),
        ("masks/channels.py", "from graphprune import prune", "__init__.py"),
        ("errors.py", "import importlib\nimportlib.import_module('graphprune.cost')", "cost/__init__.py"),
        ("errors.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import graphprune.masks.channels", "masks/channels.py"),
    ],
)
def test_upward_import_is_found(path: str, text: str, target: str) -> None:
    """An import of a higher floor is named, however it is written, with its line."""
    found = planted({**HOUSE, path: text}).upward()
    assert [(i.file, i.target) for i in found] == [(path, target)]
    assert text.splitlines()[found[0].line - 1].strip()


def test_circles_are_found() -> None:
    """Files that import each other are named, and so are rooms, also where no two of their files do."""
    files = {**HOUSE, "ops/labels.py": "from graphprune import errors", "errors.py": "from graphprune.ops import labels"}
    assert planted(files).circles_of_files() == [["errors.py", "ops/labels.py"]]
    files = {**HOUSE, "ops/labels.py": "from graphprune import errors", "errors.py": "from graphprune.ops import Op"}
    assert planted(files).circles_of_files() == []
    assert planted(files).circles_of_rooms() == [["errors", "ops"]]


def test_unlisted_room_is_found() -> None:
    """A room that the table of floors does not list is named."""
    assert planted({**HOUSE, "attic.py": ""}).homeless() == ["attic"]
    assert planted(HOUSE).homeless() == []


def test_package_is_found() -> None:
    """The parametrised test sees modules; an empty list would pass without checking anything."""
    assert ROOT / PACKAGE / "errors.py" in PATHS


GOOD = '''"""Does one thing."""
from typing import TYPE_CHECKING
from graphprune.errors import nearest
from . import labels
if TYPE_CHECKING:
    from torch import fx

class Thing:
    """Holds a swing of values, invited in a regretful network."""

    def size(self) -> int:
        """Returns the size."""
        try:
            return 1
        except Exception as error:
            raise ValueError from error

    def _guess(self) -> None:
        try:
            self.size()
        except Exception:  # noqa: BLE001 - a guess may fail in any way
            return
'''

BROKEN = (
    (check_reserved_imports, "masks.py", "import torch.fx", "torch.fx"),
    (check_reserved_imports, "masks.py", "from torch import fx", "torch.fx"),
    (check_reserved_imports, "masks.py", "import torch\nGRAPH = torch.fx.Graph()", "torch.fx.Graph"),
    (check_reserved_imports, "trace/recorder.py", "from onnx import helper", "onnx.helper"),
    (check_reserved_imports, "cli/app.py", "import importlib\nORT = importlib.import_module('onnxruntime')", "onnxruntime"),
    (check_no_print, "masks.py", "def f():\n    print('mask')", "line 2"),
    (check_no_star_import, "masks.py", "from graphprune.groups.graph import *", "star"),
    (check_broad_except, "masks.py", "try:\n    x = 1\nexcept:\n    pass", "line 3"),
    (check_broad_except, "masks.py", "try:\n    x = 1\nexcept (ValueError, Exception):  # noqa: BLE001\n    pass", "line 3"),
    (check_broad_except, "masks.py", "with contextlib.suppress(Exception):\n    x = 1", "line 1"),
    (check_docstrings, "masks.py", "x = 1", "module"),
    (check_docstrings, "masks.py", '"""Module."""\nclass Mask:\n    """Class."""\n    def size(self): ...', "size"),
    (check_annotations, "masks.py", "def f(x) -> int: ...", "leaves x"),
    (check_annotations, "masks.py", "def f(x: int, *rest, **more): ...", "leaves return"),
    (check_annotations, "masks.py", "class A:\n    def _f(self, *, x): ...", "leaves x"),
    (check_no_network_by_name, "masks.py", "if name == 'wide_resnet50_2': x = 1", "resnet"),
    (check_no_network_by_name, "masks.py", "class SwinBlock: ...", "Swin"),
    (check_no_network_by_name, "masks.py", "x = 1  # as a ViT has it", "ViT"),
    (check_no_network_by_name, "masks.py", "is_mobilenet_v3 = True", "mobilenet"),
    (check_no_network_by_name, "masks.py", "from torchvision.models import MaxVit, EfficientNet", "MaxVit"),
    (check_no_network_by_name, "masks.py", "class DenseNetLike: ...", "DenseNet"),
)


def test_good_module_passes() -> None:
    """A module that keeps the rules raises no complaint, so a complaint means something."""
    assert [problem for check in CHECKS for problem in check(Module("ops/linear.py", GOOD))] == []


@pytest.mark.parametrize(("check", "path", "source", "culprit"), BROKEN)
def test_broken_module_is_caught(check: Check, path: str, source: str, culprit: str) -> None:
    """Each rule, broken on purpose, is reported and the report names the culprit."""
    assert any(culprit in problem for problem in check(Module(path, source)))


def test_every_check_has_a_broken_case() -> None:
    """No check goes without a snippet that it must reject."""
    assert {check for check, *_ in BROKEN} == set(CHECKS)
