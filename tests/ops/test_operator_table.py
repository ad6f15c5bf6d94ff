"""Forty operators that move or mix channels, between two convolutions and in pairs: right, or frozen with a reason; never wrong."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Final

import operator_table
import pytest
import torch

from graphprune.groups.graph import Frozen
from graphprune.ops import registry
from tests.support import operator_table as support
from tests.support.operator_section import BEGIN, COMMAND, END, replaced, row, section
from tests.support.operator_table import OPERATORS, Operator
from tests.support.operator_verdicts import Outcome, measure, pair

README: Final = Path(__file__).parents[2] / "README.md"
BY_NAME: Final = {operator.name: operator for operator in OPERATORS}
PAIRS, MANY_PAIRS = 60, 400
AT_LEAST: Final = 32  # of the forty, how many are pruned rather than frozen


@cache
def alone(name: str) -> Outcome:
    """Returns what was measured of one operator between two convolutions."""
    return measure([BY_NAME[name]])


def faults(outcome: Outcome) -> list[str]:
    """Returns what may not be: a wrong result, anything raised, and a frozen operator whose reason does not name it."""
    if outcome.verdict in ("wrong", "crash"):
        return [f"{outcome.name}: {outcome.verdict}: {outcome.fault}"]
    if outcome.verdict == "frozen" and not outcome.named:
        return [f"{outcome.name}: frozen, and no reason names the operator: {[str(f) for f in outcome.reasons]}"]
    return []


# -- the table -----------------------------------------------------------------------------------------------------------------------


def test_there_are_forty_operators() -> None:
    """The table has forty rows with forty names."""
    assert len(OPERATORS) == len(BY_NAME) == 40


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_an_operator_is_right_or_frozen_with_a_reason(operator: Operator) -> None:
    """Between two convolutions, an operator agrees with every oracle, or is frozen by a reason that names it."""
    assert faults(alone(operator.name)) == []


def test_most_operators_are_pruned() -> None:
    """At least 32 of the forty let all channels of both convolutions go, with an effect on the output."""
    others = [outcome for outcome in map(alone, BY_NAME) if outcome.verdict != "pruned"]
    assert len(OPERATORS) - len(others) >= AT_LEAST, [(outcome.name, outcome.verdict) for outcome in others]


def test_the_readme_says_what_is_measured() -> None:
    """The section of the README is the one that the measurements give."""
    readme = README.read_text(encoding="utf-8")
    same = replaced(readme, section([alone(name) for name in BY_NAME])) == readme
    assert same, f"the table of operators in README.md is out of date; write it with: {COMMAND}"


@pytest.mark.parametrize("seed", range(PAIRS))
def test_a_pair_of_operators_is_right_or_frozen_with_a_reason(seed: int) -> None:
    """Two operators one after the other, with or without a convolution between them, agree with every oracle, or are frozen."""
    assert faults(measure(pair(seed))) == []


@pytest.mark.slow
def test_many_pairs_of_operators_are_right_or_frozen_with_a_reason() -> None:
    """The same for several hundred pairs."""
    assert [fault for seed in range(PAIRS, PAIRS + MANY_PAIRS) for fault in faults(measure(pair(seed)))] == []


# -- the tests of the tester ---------------------------------------------------------------------------------------------------------


def unmoved(op: registry.Op) -> registry.Labels:
    """A rule that says that channels stay where they are."""
    return op.dims(op["self"])


def pointless(op: registry.Op) -> registry.Labels:
    """A rule that lets channels through without a word on the statistic that is taken across them."""
    op.zero = False
    return [labels if size > 1 else None for labels, size in zip(op.dims(op["self"]), op.shape, strict=True)]


def uncoupled(op: registry.Op) -> registry.Labels:
    """A rule that gives labels which meet nothing."""
    return [op.table.fresh(size) if d == 1 else None for d, size in enumerate(op.shape)]


# Operator -> a rule for it that is wrong, and whether a network comes out at all when the engine does not look at its own result.
BROKEN: Final[dict[str, tuple[str, Any, bool]]] = {
    "flip": ("aten::flip", unmoved, True),
    "roll": ("aten::roll", unmoved, True),
    "index_select": ("aten::index_select", unmoved, False),
    "PixelShuffle": ("aten::pixel_shuffle", uncoupled, False),
    "cumsum": ("aten::cumsum", uncoupled, False),
    "x - mean": ("aten::mean", pointless, True),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_does_not_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong rule the engine refuses its own result, and where it does not look, the oracles find it wrong, or it does not run."""
    target, rule, runs = BROKEN[name]
    monkeypatch.setitem(registry.RULES, target, rule)
    refused, unverified = measure([BY_NAME[name]]), measure([BY_NAME[name]], verify=False)
    assert refused.verdict == "crash"
    assert unverified.verdict == ("wrong" if runs else "crash")
    assert faults(refused)
    assert faults(unverified)


def test_every_oracle_sees_a_forgotten_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets a flip gives a network that runs, and that is wrong against zeroed channels and when channels are exchanged."""
    monkeypatch.setitem(registry.RULES, "aten::flip", unmoved)
    outcome = measure([BY_NAME["flip"]], verify=False)
    assert outcome.error > 1e-3
    for oracle in ("half by L1, cut='blocks', 2 images:", "any channels, 3 images:", "promised to be exact:", "permuting channels:"):
        assert oracle in outcome.fault


def test_a_rule_that_promises_too_much_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax that is said to leave channels alone breaks the promise of exactness, though the small network itself is right."""
    monkeypatch.setitem(registry.RULES, "aten::softmax", pointless)
    outcome = measure([BY_NAME["softmax"]], verify=False)
    assert outcome.verdict == "wrong"
    assert all("promised to be exact" in fault for fault in outcome.fault.split("; "))


def test_a_rule_that_is_missing_freezes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rule, an operator that nothing can be proven of is frozen and named."""
    monkeypatch.delitem(registry.RULES, "aten::sort")
    outcome = measure([BY_NAME["sort"]])
    assert outcome.verdict == "frozen"
    assert any("aten::sort" in reason for reason in outcome.named)


def test_a_reason_that_names_nothing_is_a_fault() -> None:
    """A frozen operator passes when a reason names an operator that it ran, and not when only a neighbour is named."""

    def outcome(operator: str, module: str) -> Outcome:
        index = torch.arange(16).numpy()
        return Outcome("flip", "frozen", reasons=(Frozen("conv0.weight", 0, index, "is somehow moved", operator, module),))

    assert faults(outcome("aten::flip", "op1")) == []
    assert faults(outcome("aten::conv2d", "last"))
    assert faults(outcome("", "op1"))


# -- the section of the README -------------------------------------------------------------------------------------------------------


def test_a_row_shows_what_was_measured() -> None:
    """Errors of rounding are not told apart; others are shown, and bars in a reason do not end the cell."""
    assert row(Outcome("a", "pruned", 1.0, 3e-16, 0.456)) == "| a | pruned | < 1e-12 | 0.46 |  |"
    assert row(Outcome("a", "partly", 0.5, 3e-16, 0.456)) == "| a | partly, 50% | < 1e-12 | 0.46 |  |"
    assert row(Outcome("a", "wrong", 1.0, 0.25, 0.456, fault="x | y")) == "| a | wrong | 2e-01 | 0.46 | x \\| y |"
    assert row(Outcome("a", "crash", fault="KeyError: 1")) == "| a | crash |  |  | KeyError: 1 |"


def test_only_the_section_is_replaced() -> None:
    """What stands before and after the two comments stays; without them nothing is written."""
    assert replaced(f"before {BEGIN} old {END} after", "new") == "before new after"
    for broken in ("", BEGIN, END, f"{END} {BEGIN}", f"{BEGIN} {END} {END}", f"{BEGIN} {BEGIN} {END}"):
        with pytest.raises(ValueError, match="needs the lines"):
            replaced(broken, "new")


def test_the_tool_writes_the_section_and_checks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool finds a section out of date without touching it, writes it, and then finds it up to date."""
    monkeypatch.setattr(support, "OPERATORS", (BY_NAME["flip"],))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    arguments = ["--readme", str(readme)]
    assert operator_table.main([*arguments, "--check"]) == 1
    assert "flip" not in readme.read_text(encoding="utf-8")
    assert operator_table.main(arguments) == 0
    assert "| flip | pruned |" in readme.read_text(encoding="utf-8")
    assert operator_table.main([*arguments, "--check"]) == 0
    assert list(tmp_path.iterdir()) == [readme]


def test_the_tool_fails_where_an_operator_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a broken rule the tool writes what it measured, names the operator and ends with 1."""
    monkeypatch.setattr(support, "OPERATORS", (BY_NAME["flip"],))
    monkeypatch.setitem(registry.RULES, "aten::flip", unmoved)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}{END}", encoding="utf-8")
    assert operator_table.main(["--readme", str(readme)]) == 1
    assert "flip: crash: VerificationError" in capsys.readouterr().out
    assert "| flip | crash |" in readme.read_text(encoding="utf-8")
