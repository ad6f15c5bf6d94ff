"""What users may import: the names below and no others. A name that leaks or vanishes fails here, and the message says what to do.

Three packages promise names: `graphprune`, and `graphprune.ops` and `graphprune.compat` by their own paths. Everything else is where it is
defined and may move, so nothing else may re-export.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import graphprune as gp

ROOT = Path(__file__).resolve().parent.parent
PROMISED = {
    "graphprune": """
        ADMMPruner AGPPruner AMCPruner APoZ ActivationAPoZRankPruner ActivationMeanRankPruner AutoCompressPruner BNScale Budget
        ConfigError Cost Criterion DependencyGraph ElementMasks ExportError ExportReport FPGM FPGMPruner FileError Frozen GraphPruneError
        Group HessianDiagonal InputError L1 L1NormPruner L2 L2NormPruner LAMP LatencyReport LevelPruner LinearPruner LotteryTicketPruner
        MaskError Masks MeanActivation ModelChangedError MovementPruner NetAdaptPruner Objective OnnxLatency Op Part Pruner Random Recipe
        Reconstruction
        ReconstructionReport SearchResult Sensitivity SensitivityPruner SimulatedAnnealingPruner Slice SlimPruner SpeedupReport Study
        StudyResult Taylor TaylorFOWeightPruner TaylorGroup TraceError Trial VerificationError Wanda WeightSparsity count export_onnx load
        measure_latency prune recalibrate reconstruct rule run_study save sensitivity slice_average slice_optimizer speedup trace
    """,
    "graphprune.ops": """
        Labels Notes Op RULES UNBOUND Value Why aten attention convolution creation experts indexing joining linear losses normalisation
        pointwise pooling quantisation recurrent reduction reshaping rule rule_for vision writing
    """,
    "graphprune.compat": """
        ADMMPruner AGPPruner AGP_Pruner AMCPruner ActivationAPoZRankFilterPruner ActivationMeanRankFilterPruner AutoCompressPruner
        FPGMPruner L1FilterPruner L2FilterPruner LevelPruner LotteryTicketPruner ModelSpeedup NetAdaptPruner SensitivityPruner
        SimulatedAnnealingPruner SlimPruner TaylorFOWeightFilterPruner
    """,
}
MODULES = sorted(module.name for module in pkgutil.walk_packages(gp.__path__, "graphprune."))
USERS = ("graphprune", "tests", "tools", "examples")
# What compat is built from, and the one door to PyTorch's private names.
OFFERING = {f"graphprune.{name}" for name in ("pruners", "repair", "schedules", "search", "schedules.history", "torch_private")}


def faults(package: str, found: set[str], promised: set[str]) -> list[str]:
    """Returns one sentence for every name that leaks or vanishes, with what to do about it."""
    leaked = (
        f"{package}.{name} leaks: users can import it. Begin it with an underscore or take it out of `__all__`; if users shall have it, "
        f"add it to PROMISED in this test and to CHANGELOG.md{ENTRIES if package == 'graphprune' else ''}"
        for name in sorted(found - promised)
    )
    vanished = (
        f"{package}.{name} has vanished: users' code breaks. Put it back; if it is to go, take it out of PROMISED in this test, and say in "
        f"CHANGELOG.md what to write instead"
        for name in sorted(promised - found)
    )
    return [*leaked, *vanished]


ENTRIES = ", and in graphprune/__init__.py to the imports, `__all__` and `_HOMES`"


@pytest.mark.parametrize("package", PROMISED)
def test_exactly_the_promised_names_are_public(package: str) -> None:
    """`__all__` and what `dir` shows are the names written out above."""
    module, promised = import_module(package), set(PROMISED[package].split())
    assert not (found := faults(package, set(module.__all__), promised)), "\n".join(found)
    shown = {name for name in dir(module) if not name.startswith("_")}
    if package == "graphprune":
        assert not (found := faults(package, shown, promised)), "\n".join(found)
    assert all(hasattr(module, name) for name in promised)


def test_leaking_and_vanishing_names_are_told() -> None:
    """The messages name the name, and the places to change."""
    leak, loss = faults("graphprune", {"prune", "helper"}, {"prune", "trace"})
    assert "graphprune.helper leaks" in leak
    assert "`_HOMES`" in leak
    assert "graphprune.trace has vanished" in loss
    assert "CHANGELOG.md" in loss


def test_imports_for_type_checkers_say_what_is_imported() -> None:
    """In graphprune/__init__.py, the imports that type checkers see, the table of modules and `__all__` agree."""
    tree = ast.parse(Path(inspect.getfile(gp)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == gp._HOME_OF  # noqa: SLF001 - the table is what is tested
    assert sorted(seen) == sorted(gp.__all__)


@pytest.mark.parametrize("name", gp.__all__)
def test_public_name_is_documented_where_it_is_defined(name: str) -> None:
    """It has a docstring of its own, and is the object of that name in the module that it says it comes from."""
    value = getattr(gp, name)
    assert value.__module__ == gp._HOME_OF[name], "the table in graphprune/__init__.py names another module"  # noqa: SLF001
    assert getattr(import_module(value.__module__), name) is value
    doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has the docstring that dataclasses make up"


def test_every_module_can_be_imported() -> None:
    """Every module is importable by its name, and what it defines says so itself."""
    for path in MODULES:
        module = import_module(path)
        assert isinstance(module, ModuleType), path
        own = [value for value in vars(module).values() if inspect.isclass(value) or inspect.isfunction(value)]
        assert all(value.__module__ is not None for value in own), path


def bound(source: str) -> set[str]:
    """Returns the names that a module defines itself, at its top: imports are none of them."""
    return {name for node in ast.parse(source).body for name in _bound_by(node)}


def _bound_by(node: ast.stmt) -> Iterator[str]:
    """Yields the names that one statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
    elif isinstance(node, ast.If | ast.Try):
        for field in ("body", "orelse", "handlers", "finalbody"):
            for inner in getattr(node, field, []):
                yield from (n for part in (inner.body if isinstance(inner, ast.ExceptHandler) else [inner]) for n in _bound_by(part))


def second_hand(users: Mapping[str, str], modules: Mapping[str, str]) -> list[str]:
    """Returns one sentence for every name that is offered or taken where it is not defined.

    Args:
        users: path -> text of all files that may import from the package, those of the package among them.
        modules: name -> text of all modules of the package.
    """
    defined: dict[str | None, set[str]] = {name: bound(source) for name, source in modules.items()}
    found = []
    for name, source in modules.items():
        offered = next((node.value for node in ast.parse(source).body if ast.unparse(node).startswith("__all__ =")), None)  # type: ignore[attr-defined]
        names = set(ast.literal_eval(offered)) if offered is not None and name not in PROMISED else set()
        found += [f"{name} re-exports {other}: take it out of `__all__`" for other in sorted(names - defined[name])]
    for path, source in users.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.ImportFrom) or node.module not in modules or node.module in PROMISED:
                continue
            strange = [a.name for a in node.names if a.name not in defined[node.module] and f"{node.module}.{a.name}" not in modules]
            found += [f"{path}:{node.lineno} takes {other} from {node.module}: import it from where it is defined" for other in strange]
    return found


def test_nothing_is_re_exported() -> None:
    """Apart from the three packages, no module offers what another one defines, and nobody imports it from there."""
    users = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for folder in USERS for path in (ROOT / folder).rglob("*.py")
    }
    modules = {name: Path(inspect.getfile(import_module(name))).read_text(encoding="utf-8") for name in ["graphprune", *MODULES]}
    found = [fault for fault in second_hand(users, modules) if not OFFERING & set(fault.replace(":", "").split())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "said"),
    [
        ("graphprune.b", "from graphprune.a import f\n__all__ = ['f']", "graphprune.b re-exports f"),
        ("graphprune.c", "from graphprune.b import f", "graphprune.c:1 takes f from graphprune.b"),
        ("graphprune.c", "def g() -> None:\n    from graphprune.b import f", "graphprune.c:2 takes f"),
        ("graphprune.c", "from graphprune.a import T, f, g\nfrom graphprune import b", ""),
        ("graphprune.b", "from graphprune.a import f\n__all__ = ['h']\ndef h(): ...", ""),
        ("graphprune.ops", "from graphprune.a import f\n__all__ = ['f']", ""),
    ],
)
def test_second_hand_names_are_found(path: str, source: str, said: str) -> None:
    """A planted re-export, and a planted import of one, are named with the place; proper ones are not."""
    modules = {
        "graphprune": "",
        "graphprune.a": "T: int = 1\ndef f(): ...\ntry:\n    import x\nexcept ImportError:\n    g = None\n",
        "graphprune.b": "from graphprune.a import f\nf()",
        path: source,
    }
    found = second_hand(modules, modules)
    assert (said in found[0]) if said else not found
