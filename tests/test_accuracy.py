"""The accuracy table meets its budgets, keeps what was measured, and compares like with like."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accuracy as tool
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.cli.demo import Digits, build
from tests.support.accuracy import (
    MATCHES,
    NARROW,
    OURS,
    PEER,
    STAGES,
    Cell,
    Method,
    Record,
    Settings,
    bisected,
    every_method,
    identity,
    measure,
    one_channel,
    trained,
)
from tests.support.accuracy_report import Difference, Results, Table

SETTINGS = Settings(depth=8, epochs=1, batches=1)
L2, L2_PEER = Method(OURS, "l2"), Method(PEER, "magnitude")


def digits() -> Digits:
    """Returns a few images of noise."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 1, 32, 32, generator=generator), torch.randint(10, (24,), generator=generator)
    return Digits(images[:16], labels[:16], images[16:], labels[16:])


def record(cell: Cell, **measured: object) -> Record:
    """Returns what measuring a cell might have given."""
    return {**identity(cell, SETTINGS), **measured}


def table(folder: Path, *records: Record, budgets: tuple[float, ...] = (0.3, 0.5), seeds: tuple[int, ...] = (0, 1)) -> Table:
    """Returns the table of L2 and the peer's magnitude on networks of 1,000 MACs, of which the dearest channel costs 50."""
    results = Results(folder / "results.jsonl", SETTINGS)
    for one in records:
        results.add(one)
    return Table(results, [L2, L2_PEER], budgets, seeds, dict.fromkeys(seeds, 0.99), 1000, 50)


class Steps(nn.Module):
    """A network of which nothing is known but its cost."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.cost = 1000 - 40 * math.floor(16 * share) - 7 * math.floor(9 * share)


@pytest.mark.parametrize("target", [999, 960, 605, 606, 604, 400])
def test_bisection_finds_the_smallest_share_within_the_budget(target: int) -> None:
    """The same share, to its tolerance, as trying every share at which a channel goes."""
    found, share = bisected(Steps, lambda network: network.cost, target, most=0.95)  # type: ignore[arg-type, return-value]
    shares = sorted([number / 16 for number in range(16)] + [number / 9 for number in range(9)])
    smallest = next(one for one in shares if Steps(one).cost <= target)
    assert smallest <= share <= smallest + 2 * NARROW
    assert found.cost == Steps(smallest).cost


def test_bisection_says_what_cannot_be_reached() -> None:
    """A budget below what the largest share leaves is an error."""
    with pytest.raises(ValueError, match=r"a share of 0.5 of the channels leaves a cost of 652, more than 600"):
        bisected(Steps, lambda network: network.cost, 600, most=0.5)  # type: ignore[arg-type, return-value]


def test_dearest_channel_is_that_of_the_closed_formula() -> None:
    """In a network of depth 8 it is one of the first stage: four 3x3 kernels at full size, and what the second stage reads."""
    first = 9 * 32 * 32 * (1 + 16 + 16)  # its own kernels in the stem and the block, and those of the block that read it
    second = 16 * 16 * (9 * 32 + 32)  # the first convolution of the second stage and its shortcut
    assert one_channel(build(8, 0).eval(), digits().test_images[:1]) == first + second


def test_cell_meets_its_budget_and_leaves_the_network_alone() -> None:
    """Both orders end at most one channel below the budget; the record has every accuracy; the network is bit-identical."""
    model, data = build(8, 0).eval(), digits()
    before = copy.deepcopy(model.state_dict())
    image = data.test_images[:1]
    dense, dearest = gp.count(model, image).macs, one_channel(model, image)
    for method in (Method(OURS, "taylor"), Method(OURS, "l2", "global", (("scope", "group"),))):
        found = measure(Cell(method, 0.5, 3), model, data, SETTINGS)
        assert "error" not in found
        assert dense / 2 - dearest <= found["macs"] <= dense / 2
        assert all(0 <= found[stage] <= 1 for stage in STAGES)
        assert json.loads(json.dumps(found)) == found
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_channels_differ_between_seeds() -> None:
    """A criterion that draws random numbers draws others for every network."""
    model, data = build(8, 0).eval(), digits()
    settings = replace(SETTINGS, finetune_epochs=0)
    first, again, other = (measure(Cell(Method(OURS, "random", "global"), 0.5, seed), model, data, settings) for seed in (0, 0, 1))
    assert first["params"] == again["params"] != other["params"]


def test_method_that_fails_is_recorded() -> None:
    """What stopped it is in the record, and no accuracy."""
    found = measure(Cell(Method(OURS, "l2", "even", (("scope", "nowhere"),)), 0.5, 0), build(8, 0).eval(), digits(), SETTINGS)
    assert found["error"].startswith("ConfigError: scope is 'nowhere'")
    assert not set(STAGES) & set(found)


def test_network_is_trained_once(tmp_path: Path) -> None:
    """The second call reads what the first has written; another seed is another network."""
    data = digits()
    first = trained(tmp_path, SETTINGS, 0, data)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again, other = trained(tmp_path, SETTINGS, 0, data), trained(tmp_path, SETTINGS, 1, data)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(first.get_parameter("fc.weight"), other.get_parameter("fc.weight"))
    assert not first.training


def test_results_are_kept_and_failures_measured_again(tmp_path: Path) -> None:
    """A new reader finds finished cells; a failed one, another seed or other settings are still to be measured."""
    path, cell = tmp_path / "results.jsonl", Cell(L2, 0.3, 0)
    Results(path, SETTINGS).add(record(cell, after=0.5))
    Results(path, SETTINGS).add(record(replace(cell, seed=1), error="KeyError: 'l2'"))
    results = Results(path, SETTINGS)
    assert results.is_done(cell)
    assert not results.is_done(replace(cell, seed=1))
    assert not results.is_done(replace(cell, method=replace(L2, options=(("scope", "group"),))))
    assert not Results(path, replace(SETTINGS, finetune_lr=0.5)).is_done(cell)
    results.add(record(replace(cell, seed=1), after=0.6))
    assert Results(path, SETTINGS).is_done(replace(cell, seed=1))
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """A results file that this tool has not written is an error, and stays."""
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="is not a results file of this tool"):
        Results(path, SETTINGS)
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n'


def test_difference_is_the_mean_over_budgets_and_its_spread_over_seeds(tmp_path: Path) -> None:
    """By hand: seed 0 is 10 and 20 points better, seed 1 is 5 better and 9 worse."""
    ours = {(0.3, 0): 0.9, (0.5, 0): 0.8, (0.3, 1): 0.75, (0.5, 1): 0.5}
    theirs = {(0.3, 0): 0.8, (0.5, 0): 0.6, (0.3, 1): 0.7, (0.5, 1): 0.59}
    cells = [record(Cell(L2, *key), after=value) for key, value in ours.items()]
    cells += [record(Cell(L2_PEER, *key), after=value) for key, value in theirs.items()]
    found = table(tmp_path, *cells)
    assert found.pairs() == [(L2, L2_PEER)]
    difference = found.difference(found.pairs(), "after")
    assert difference is not None
    assert (difference.mean, difference.lowest, difference.highest) == pytest.approx(((15 - 2) / 2, -2, 15))
    assert str(Difference(6.5, -2, 15)) == "+6.50 (-2.00 to +15.00)"
    assert found.mean(L2, "after") == pytest.approx((0.9 + 0.8 + 0.75 + 0.5) / 4)
    assert found.difference(found.pairs(), "before") is None
    assert table(tmp_path, budgets=(0.3, 0.5, 0.7)).difference(found.pairs(), "after") is None


def test_report_names_failures_and_missed_budgets(tmp_path: Path) -> None:
    """A failed cell is shown as failed with its error, one that ends far from its budget is listed, and the plot is a picture."""
    stages = dict.fromkeys(STAGES, 0.5)
    failed = record(Cell(L2, 0.3, 0), error="ValueError: no channel is left")
    cells = [record(Cell(L2_PEER, 0.3, 0), macs=701, **stages), record(Cell(L2_PEER, 0.5, 0), macs=449, **stages)]
    found = table(tmp_path, failed, *cells, record(Cell(L2, 0.5, 0), macs=450, **stages), seeds=(0,))
    assert found.failures() == ["l2, even, 30%, seed 0: ValueError: no channel is left"]
    assert [line.partition(":")[0] for line in found.off_budget()] == [
        f"Torch-Pruning magnitude, even, {share}" for share in ("30%", "50%")
    ]
    text = found.to_markdown()
    assert "no channel is left" in text
    row = next(line for line in text.splitlines() if line.startswith("| l2"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["l2", "failed", "50.0 / 50.0 / 50.0", "-", "-", "-"]
    found.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_has_its_peer_of_the_same_order() -> None:
    """All criteria in both orders, with and without the options given; whatever names a match finds it."""
    methods = every_method(("l2", "fpgm", "bn_scale", "taylor"), (("scope", "group"),))
    assert len(set(methods)) == len(methods) == 2 * (4 + 4 + 3)
    matches = [(method, method.match) for method in methods]
    assert {ours.criterion for ours, theirs in matches if theirs} == set(MATCHES)
    assert all(theirs in methods and theirs.order == ours.order for ours, theirs in matches if theirs)


def test_quick_mode_is_a_default_only() -> None:
    """What is given holds; what cannot be is refused."""
    assert tool.parse(["--quick"]).budgets == [0.5]
    assert tool.parse(["--quick", "--budgets", "0.2"]).budgets == [0.2]
    assert tool.parse([]).seeds == [0, 1, 2]
    for bad in (["--budgets", "50"], ["--with", "scope"], ["--jobs", "0"], ["--lr", "0"]):
        with pytest.raises(SystemExit):
            tool.parse(bad)


def test_exit_code_says_whether_all_cells_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 when they were, 1 when one failed, 2 when nothing could be."""
    run = tool.run
    monkeypatch.setattr(tool, "enter", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--out", str(tmp_path)])
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # so that what the tool sets is undone
    for failures, code in (([], 0), (["l2"], 1)):
        report = SimpleNamespace(to_markdown=lambda: "text", plot=lambda path: path.touch(), failures=lambda found=failures: found)
        monkeypatch.setattr(tool, "run", lambda _, report=report: report)
        assert tool.main() == code
        assert (tmp_path / "accuracy.md").read_text(encoding="utf-8") == "text"
    monkeypatch.setattr(tool, "run", run)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--criteria", "l3", "--out", str(tmp_path)])
    assert tool.main() == 2
