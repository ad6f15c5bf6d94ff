"""The objective of searches: the budget is met to one channel in the proposed proportions, costs are those of the shrunk model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.errors import ConfigError, FileError
from graphprune.search.base import SearchResult, run
from graphprune.search.objective import Objective, Sparsities, Trial
from tests.support.operators import Network, conv, filled, images
from tests.support.untouched import changes, snapshot

FULL = {"a": 12, "b": 20, "c": 16}


def network() -> nn.Module:
    """Returns three convolutions with BatchNorm, and a classifier."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.relu(m.norm(m.a(x)))
        y: Tensor = m.fc(F.relu(m.c(F.relu(m.b(x)))).mean((2, 3)))
        return y

    parts = {"a": conv(3, 12), "norm": nn.BatchNorm2d(12), "b": conv(12, 20), "c": conv(20, 16, 1), "fc": nn.Linear(16, 5)}
    return filled(Network(forward, parts))


def params(model: nn.Module) -> float:
    """Scores by size."""
    return float(sum(p.numel() for p in model.parameters()))


def objective(**options: Any) -> Objective:
    """Returns an objective whose score is the number of parameters."""
    return Objective(network(), images(2), options.pop("evaluator", params), **options)


def layer(name: str) -> str:
    """Returns the one-letter name of a group's first layer."""
    return name.split(".", maxsplit=1)[0]


def shares(target: Objective, **of: float) -> dict[str, float]:
    """Returns group name -> share, from one-letter names."""
    return {name: of[layer(name)] for name in target.groups}


@pytest.mark.parametrize("budget", [gp.Budget(macs=0.5), gp.Budget(params=0.3), gp.Budget(macs=0.8)])
@pytest.mark.parametrize("wish", [(0.5, 0.5, 0.5), (0.9, 0.1, 0.3), (0.0, 0.6, 0.2), (0.01, 0.01, 0.04)])
def test_projection_meets_the_budget_to_within_one_channel(budget: gp.Budget, wish: tuple[float, float, float]) -> None:
    """The cost is at most the target, and giving back one channel of a group that lost its last one would exceed it."""
    target = objective(budget=budget)
    found = target.project(shares(target, **dict(zip("abc", wish, strict=True))))
    dense = gp.count(target.model, images(2))
    allowed = (1 - budget.removed) * getattr(dense, budget.unit)
    assert getattr(target.cost(found), budget.unit) <= allowed
    backs = [{**found, name: found[name] - 1 / target.scores[name].size} for name in found if found[name] > 0]
    assert any(getattr(target.cost({n: max(0.0, s) for n, s in back.items()}), budget.unit) > allowed for back in backs)
    assert target.project(found) == found


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("round_to", [1, 4])
def test_projection_of_what_was_projected_changes_nothing(rounding: str, round_to: int) -> None:
    """Random points, after one projection, stay where they are in the next; points at whole channels off the budget do not."""
    target = objective(budget=gp.Budget(macs=0.5), rounding=rounding, round_to=round_to)
    generator = np.random.default_rng(0)
    for _ in range(40):
        found = target.project(dict(zip(target.groups, generator.uniform(0, 0.9, 3), strict=True)))
        assert target.project(found) == found
        macs = target.cost(found).macs / gp.count(target.model, images(2)).macs
        assert macs <= 0.5 if rounding == "floor" else macs >= 0.5
    assert target.project(shares(target, a=0.0, b=0.0, c=0.5)) != shares(target, a=0.0, b=0.0, c=0.5)


def test_projection_keeps_proportions_to_within_one_channel() -> None:
    """What goes of each group is the same multiple of what was proposed, up to a channel, unless a limit is in the way."""
    target = objective(budget=gp.Budget(macs=0.4))
    wish = shares(target, a=0.2, b=0.4, c=0.1)
    found = target.project(wish)
    factor = max(found[n] / wish[n] for n in wish)
    for name, value in found.items():
        assert factor * wish[name] - value <= 1 / target.scores[name].size + 1e-9
    doubled = target.project({n: 2 * s for n, s in wish.items()})
    assert doubled == found


def test_groups_of_sparsity_zero_lose_channels_only_when_the_others_cannot_lose_more() -> None:
    """With half of the limit left in one group, the others stay whole; a budget beyond that takes from them."""
    easy = objective(budget=gp.Budget(params=0.05))
    found = easy.project(shares(easy, a=0.0, b=0.0, c=0.5))
    assert {layer(n): s > 0 for n, s in found.items()} == {"a": False, "b": False, "c": True}
    hard = objective(budget=gp.Budget(params=0.7), max_sparsity=0.75)
    found = {layer(n): s for n, s in hard.project(shares(hard, a=0.0, b=0.0, c=0.5)).items()}
    assert found["c"] == 0.75
    assert found["a"] > 0
    assert found["b"] > 0


def test_no_group_loses_more_than_its_limit() -> None:
    """The smaller of max_sparsity and the entry's max_sparsity_per_layer holds, also for what is evaluated directly."""
    entries = [{"op_types": ["Conv2d"], "max_sparsity_per_layer": {"b": 0.5}}]
    target = objective(config_list=entries, max_sparsity=0.75)
    found = {layer(n): s for n, s in target(shares(target, a=0.99, b=0.99, c=0.99)).sparsities.items()}
    assert found == {"a": 0.75, "b": 0.5, "c": 0.75}
    assert "fc" not in target.graph.layers or all(layer(n) != "fc" for n in target.groups)


def test_sparsities_of_entries_are_those_of_all_their_channels_together() -> None:
    """Each entry loses its share of channels, whatever the proportions; layers that no entry names stay whole."""
    entries = [{"op_names": ["a", "b"], "total_sparsity": 0.5}, {"op_names": ["c"], "sparsity": 0.25}]
    target = objective(config_list=entries)
    for wish in ({"a": 0.1, "b": 0.9, "c": 0.9}, {"a": 0.5, "b": 0.5, "c": 0.1}):
        gone = {layer(n): s * FULL[layer(n)] for n, s in target.project(shares(target, **wish)).items()}
        assert gone["a"] + gone["b"] == pytest.approx(16)
        assert gone["c"] == pytest.approx(4)


def test_cost_equals_what_is_counted_of_the_shrunk_model() -> None:
    """Parameters and MACs of the forecast are those of the model that the evaluator sees."""
    seen: list[gp.Cost] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(gp.count(model, images(2)))
        return 1.0

    target = objective(evaluator=evaluate)
    for wish in ((0.5, 0.25, 0.75), (0.0, 0.9, 0.1)):
        point = shares(target, **dict(zip("abc", wish, strict=True)))
        trial = target(point)
        assert trial.cost == seen[-1] == target.cost(point)
        assert trial.cost != gp.count(target.model, images(2))


def test_evaluator_sees_a_shrunk_model_that_was_fine_tuned_and_computes_what_the_masked_one_does() -> None:
    """The copy is physically smaller, in evaluation mode after fine-tuning, and equal to the masked model before."""
    events: list[str] = []
    kept: list[nn.Module] = []

    def finetune(model: nn.Module) -> None:
        masks = target.masks(point)
        expected = masks.masked(target.model).eval()(images(2))
        assert torch.allclose(model.eval()(images(2)), expected, atol=1e-5)
        events.append("finetune")
        model.train()

    def evaluate(model: nn.Module) -> float:
        events.append("evaluate")
        kept.append(model)
        assert not model.training
        return 1.0

    target = objective(evaluator=evaluate, finetune=finetune)
    point = shares(target, a=0.5, b=0.5, c=0.25)
    target(point)
    assert events == ["finetune", "evaluate"]
    module: Any = kept[0]
    assert (module.a.out_channels, module.b.in_channels, module.b.out_channels, module.c.out_channels) == (6, 6, 10, 12)


def test_masked_evaluation_stays_masked_after_fine_tuning() -> None:
    """With physical=False shapes are the model's, and what was removed is zero again after training."""

    def finetune(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)

    def zeros(model: nn.Module) -> float:
        return float((model.get_parameter("b.bias") == 0).sum())

    target = objective(evaluator=zeros, finetune=finetune, physical=False)
    assert target(shares(target, a=0.0, b=0.5, c=0.0)).score == 10


def test_model_stays_bit_identical() -> None:
    """An evaluator and a fine-tuning that ruin what they are given do not reach the user's model."""

    def ruin(model: nn.Module) -> float:
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        return 1.0

    model = network().train()
    target = Objective(model, images(2), ruin, budget=gp.Budget(macs=0.5), finetune=ruin)
    before = snapshot(model)
    target(target.project(shares(target, a=0.5, b=0.2, c=0.0)))
    target(dict.fromkeys(target.groups, 0.0))
    assert not changes(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": gp.Budget(macs=0.999)}, "at most"),
        ({"max_sparsity": 1.0}, "max_sparsity"),
        ({"mode": "global"}, "every group by itself"),
        ({"config_list": [{"op_names": ["a"], "sparsity": 0.9}], "max_sparsity": 0.5}, "at most"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """What cannot be met or makes no sense is said before anything runs."""
    with pytest.raises(ConfigError, match=message):
        objective(**options)


def test_unusable_points_and_scores_are_refused() -> None:
    """Unknown groups, sparsities beyond [0, 1) and scores that are no finite numbers."""
    target = objective()
    with pytest.raises(ConfigError, match="no group"):
        target.masks({"nowhere": 0.5})
    with pytest.raises(ConfigError, match="outside"):
        target.cost({target.groups[0]: 1.0})
    for value in (float("nan"), None):
        with pytest.raises(ConfigError, match="trial 3"):
            objective(evaluator=lambda _, value=value: value)({}, 3)


# -- the loop ------------------------------------------------------------------------------------------------------------------------


class Walk:
    """A search that proposes random points around the best one so far; its state is its generator's and that point."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.generator = np.random.default_rng(0)
        self.top: tuple[float, dict[str, float]] = (-1.0, dict.fromkeys(names, 0.5))

    def propose(self) -> Sparsities:
        """Returns a point nearby."""
        return {n: float(np.clip(s + self.generator.uniform(-0.2, 0.2), 0.0, 0.9)) for n, s in self.top[1].items()}

    def tell(self, sparsities: Sparsities, score: float) -> None:
        """Keeps the best."""
        self.top = max(self.top, (score, dict(sparsities)), key=lambda pair: pair[0])

    def state(self) -> dict[str, Any]:
        """Returns generator and point."""
        return {"generator": self.generator.bit_generator.state, "top": self.top}

    def restore(self, state: Any) -> None:
        """Puts them back."""
        self.generator.bit_generator.state = state["generator"]
        self.top = (state["top"][0], state["top"][1])


class Stopped(BaseException):
    """Stands for a process that was killed in the middle of a trial."""


def noisy(stop_at: int | None = None) -> Any:
    """Returns an evaluator that uses torch's random numbers and stops in a trial."""
    calls = []

    def evaluate(model: nn.Module) -> float:
        noise = float(torch.rand(()))
        calls.append(noise)
        if stop_at is not None and len(calls) > stop_at:
            raise Stopped
        return params(model) + noise

    return evaluate


@pytest.mark.parametrize("stop_at", [0, 1, 4])
def test_interrupted_run_ends_as_an_uninterrupted_one(tmp_path: Path, stop_at: int) -> None:
    """Proposals, scores and noise are the same after the process died in the middle of a trial and started again."""

    def go(folder: Path | None, stop: int | None) -> SearchResult:
        torch.manual_seed(3)
        target = objective(evaluator=noisy(stop), budget=gp.Budget(macs=0.5))
        return run(target, Walk(target.groups), 6, folder)

    whole = go(None, None)
    with pytest.raises(Stopped):
        go(tmp_path, stop_at)
    assert go(tmp_path, None) == whole
    assert go(tmp_path, 0) == whole  # finished: nothing is evaluated again
    assert whole.best.score == max(t.score for t in whole.history)
    assert [t.number for t in whole.history] == list(range(6))
    assert whole.last == whole.history[-1]


def test_a_run_of_another_budget_is_refused(tmp_path: Path) -> None:
    """A folder goes on only with the objective that it was made for."""
    target = objective(budget=gp.Budget(macs=0.5))
    run(target, Walk(target.groups), 1, tmp_path)
    other = objective(budget=gp.Budget(macs=0.4))
    with pytest.raises(FileError, match="constraints"):
        run(other, Walk(other.groups), 2, tmp_path)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_terminals_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool) -> None:
    """With progress=True a bar with last and best score and sparsity is on stderr if that is a terminal; stdout stays empty."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    target = objective(budget=gp.Budget(macs=0.5))
    shown = run(target, Walk(target.groups), 3, progress=True)
    seen = capsys.readouterr()
    assert seen.out == ""
    words = f"score {shown.last.score:.4g}, best {shown.best.score:.4g}, sparsity"
    assert (words in seen.err) == ("3/3" in seen.err) == terminal
    assert run(target, Walk(target.groups), 3) == shown
    assert capsys.readouterr().err == ""


def test_history_is_shown_as_a_table_and_drawn(tmp_path: Path) -> None:
    """The table has a row per trial and marks what was better than all before; the plot is a file, and no other is left."""
    target = objective(budget=gp.Budget(macs=0.5))
    trials = [Trial(n, dict.fromkeys(target.groups, 0.5), s, gp.Cost(10, 20), 0.1) for n, s in enumerate((0.1, 0.3, 0.2))]
    result = SearchResult.of(trials)
    assert (result.best, result.last) == (trials[1], trials[2])
    assert list(result.table().columns[2].cells) == ["best so far", "best so far", ""]
    result.plot(tmp_path / "history.png")
    assert [p.name for p in tmp_path.iterdir()] == ["history.png"]
    with pytest.raises(FileError, match="plot"):
        result.plot(tmp_path / "nowhere" / "history.png")
    with pytest.raises(ConfigError, match="without trials"):
        SearchResult.of(())
