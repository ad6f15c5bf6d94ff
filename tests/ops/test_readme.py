"""The guide to adding an operator: its code works as it stands, and its tables are complete."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.ops import registry
from graphprune.ops.registry import RULES, Op
from tests.support.invariants import evaluate
from tests.support.operators import Case, check, images, sequences

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "graphprune" / "ops" / "README.md"
OPERATOR: Final = "aten::select_scatter"
FREEZES: Final = {"a.weight/0": "has no rule"}


def blocks() -> list[str]:
    """Returns the Python blocks of the guide, in order."""
    return re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def executed(source: str) -> dict[str, Any]:
    """Returns the names that a block defines."""
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(source, str(README), "exec"), names)  # noqa: S102 - our own file
    return names


@pytest.fixture
def registered() -> Iterator[None]:
    """Registers the rule of the guide for the time of one test."""
    before = dict(RULES)
    executed(blocks()[0])
    try:
        yield
    finally:
        RULES.clear()
        RULES.update(before)


def example() -> Case:
    """Returns the test case that the guide adds."""
    case = executed(blocks()[1])["CASE"]
    assert isinstance(case, Case)
    return case


def written(*arguments: int) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Returns a forward pass in which what b makes of the mean token is written over one token, or channel, of what a makes of all."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = m.c(torch.select_scatter(m.a(x).relu(), m.b(x).mean(arguments[0]).tanh(), *arguments))
        return out

    return run


A, B, C = "a.bias/0 a.weight/0", "b.bias/0 b.weight/0", "c.weight/1"
PARTS: Final = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "c": nn.Linear(8, 4)}
COUPLED = [f"8 exact: {A} {B} {C}"]
DECLINED: Any = {"frozen": {"a.weight/0": "a position counted from the end"}, "unknown": [(OPERATOR, "", 16)]}
BRANCHES = [
    Case("over a token", written(1, 3), PARTS, COUPLED, inputs=sequences, kind="module"),
    Case("dimension from the end", written(-2, 0), PARTS, COUPLED, inputs=sequences, kind="module"),
    Case("position from the end", written(1, -1), PARTS, [], inputs=sequences, **DECLINED),
    Case("over a channel", lambda m, x: m.c(torch.select_scatter(m.a(x).relu(), x[:, :, 0], -1, 5)), {k: PARTS[k] for k in "ac"},
         [f"7 exact: {A} {C}"], {"c.weight/1": "written over by position"}, inputs=sequences, kind="graph"),
]  # fmt: skip


def test_operator_has_no_rule_yet() -> None:
    """The example of the guide is a real gap: without the rule the operator freezes all that enters it, and says so."""
    assert OPERATOR not in RULES, "this operator has a rule now: choose another one for the guide"
    case = example()
    groups = ["4 exact: b.bias/0 b.weight/0"]
    frozen = Case("without a rule", case.run, case.parts, groups, frozen=FREEZES, unknown=[(OPERATOR, "", 8)])
    check(frozen)


@pytest.mark.usefixtures("registered")
def test_rule_of_the_guide_passes_its_own_test() -> None:
    """The rule, copied out of the guide, gives the groups that the guide states, and removal is exact."""
    check(example())


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("case", BRANCHES, ids=str)
def test_branches_of_the_rule(case: Case) -> None:
    """Every branch of the rule of the guide holds, not the one that it shows alone."""
    check(case)


@pytest.mark.usefixtures("registered")
def test_pruned_network_computes_the_formula() -> None:
    """After gp.prune, the position is the number of survivors before it: the result is the formula over the kept channels, by hand."""
    model, x = example().build(), images(2)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5}], example_inputs=x).masks()
    keep = {name: torch.from_numpy(positions[0]) for name, positions in masks.positions().items() if name in {"a.weight", "b.weight"}}
    small, report = gp.prune(model, x, sparsity=0.5)
    assert report.verified
    assert (small.get_parameter("a.weight").shape[0], small.get_parameter("b.weight").shape[0]) == (4, 2)
    a, b = torch.relu(model.get_submodule("a")(x)), torch.tanh(model.get_submodule("b")(x))[:, keep["b.weight"]].sum(1, keepdim=True)
    joined = torch.cat([a[:, :3], b, a[:, 4:]], dim=1)[:, keep["a.weight"]]
    c: Any = model.get_submodule("c")
    expected = torch.conv2d(joined, c.weight[:, keep["a.weight"]], c.bias, padding=1)
    torch.testing.assert_close(evaluate(small, x)[0], expected, rtol=0, atol=1e-12)
    assert 3 in keep["a.weight"]


def test_rules_are_as_before() -> None:
    """The tests of this file leave no rule behind."""
    assert OPERATOR not in RULES


def test_rule_outside_the_folder_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block, which stands in the user's own code, registers its rule by the public names."""
    rules: dict[str, registry.Rule] = {}
    monkeypatch.setattr(registry, "RULES", rules)
    own = executed(blocks()[-1])["channel_norm"]
    assert rules == {"mine::channel_norm": own}


def test_every_verb_is_described() -> None:
    """The guide shows a call of every public method of Op, and of nothing that Op does not have."""
    shown = set(re.findall(r"`op\.(\w+)\(", README.read_text(encoding="utf-8"))) | {"reason"}
    verbs = {name for name, _ in inspect.getmembers(Op, inspect.isfunction) if not name.startswith("_")}
    assert shown - {"table"} == verbs


def test_every_family_is_listed() -> None:
    """The table of families has one line per file of the folder."""
    listed = re.findall(r"^\| `(\w+\.py)` \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in README.parent.glob("*.py") if path.name != "__init__.py")


def test_every_mentioned_file_exists() -> None:
    """Paths and helpers that the guide sends its readers to are there."""
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tests|examples)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    helpers = text[text.index("Helpers that several families share") : text.index("## The families")]
    for names, file in re.findall(r"((?:`\w+`(?:, | and )?)+) in\s+`(\w+\.py)`", helpers):
        source = (README.parent / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert f"def {name}(" in source, f"{file} has no {name}"
