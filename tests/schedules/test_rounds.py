"""Pruning in rounds: sparsities of the original model, masked and physical rounds that agree, and optimizers that go on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.pruners.budgets import kept_count
from graphprune.pruners.norms import L1NormPruner
from graphprune.schedules.functions import agp
from graphprune.schedules.gradual import AGPPruner
from graphprune.schedules.lottery import LotteryTicketPruner
from graphprune.schedules.rounds import LinearPruner
from graphprune.surgery.recipe import recipe_of

Batches = list[tuple[Tensor, Tensor]]
EVERYTHING = [{"sparsity": 0.6, "op_types": ["default"]}]


class Net(nn.Module):
    """A residual block with batch norm, and a head behind activations of both signs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.inner = nn.Conv2d(10, 10, 3, padding=1, bias=False)
        self.hidden = nn.Linear(10, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 6, 6) to logits (n, 3)."""
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(y + self.inner(y)).mean((2, 3))
        out: Tensor = self.head(torch.tanh(self.hidden(y)))
        return out


def network() -> tuple[Net, Tensor, Batches]:
    """Returns a model, example inputs and data, in double precision."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (24,))
    return Net().double(), x[:1], [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]


def trainer_of(batches: Batches) -> Any:
    """Returns a trainer(model, optimizer, criterion) over batches."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    return train


def training(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """Returns the arguments that train with momentum and weight decay."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return {"trainer": trainer_of(batches), "optimizer": optimizer, "criterion": F.cross_entropy}


def unchanged(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Returns whether a model is bit-identical to what it was."""
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("algorithm", ["l1", "l2", "fpgm", "apoz", "mean_activation", "taylorfo"])
@pytest.mark.parametrize("trained", [False, True])
def test_masked_and_physical_rounds_agree(algorithm: str, trained: bool) -> None:
    """With speedup or without, the same channels go in every round, and the trained results compute the same."""
    model, x, batches = network()
    before = copy.deepcopy(model.state_dict())
    found = []
    for physical in (False, True):
        epochs = 3 if trained else 0
        extra = {"example_inputs": x, "training_epochs": epochs, **training(model, batches)}
        pruner = LinearPruner(model, EVERYTHING, algorithm, 4, speedup=physical, **extra)
        found.append((*pruner.compress(), pruner.history))
    (masked, masks, history), (small, small_masks, small_history) = found
    assert isinstance(masks, gp.Masks)
    assert isinstance(small_masks, gp.Masks)
    assert {n: masks[n].tolist() for n in masks} == {n: small_masks[n].tolist() for n in small_masks}
    assert history == small_history
    assert sum(p.numel() for p in small.parameters()) == history[-1].params < sum(p.numel() for p in model.parameters())
    data = torch.cat([images for images, _ in batches])
    masked.eval()
    small.eval()
    assert torch.allclose(masked(data), small(data), rtol=1e-8, atol=1e-10)
    assert unchanged(before, model)


@pytest.mark.parametrize("make", [LinearPruner, AGPPruner, LotteryTicketPruner])
def test_sparsities_are_of_the_original_channels(make: Any) -> None:
    """In every physical round each group keeps what the schedule leaves of its ORIGINAL channels, rounded once and not once per round."""
    model, x, _ = network()
    widths = []

    def finetune(now: nn.Module) -> None:
        named = dict(now.named_parameters())
        widths.append((named["stem.weight"].shape[0], named["hidden.weight"].shape[0]))

    pruner = make(model, EVERYTHING, "l1", 5, speedup=True, example_inputs=x, finetune=finetune)
    pruner.compress()
    formulas: dict[Any, Callable[[int], float]] = {
        LinearPruner: lambda t: 0.6 * t / 5,
        AGPPruner: lambda t: 0.6 - 0.6 * (1 - t / 5) ** 3,
        LotteryTicketPruner: lambda t: 1 - 0.4 ** (t / 5),
    }
    start = 0 if make is LotteryTicketPruner else 1
    asked = [formulas[make](t) for t in range(start, 6)]
    assert [r.asked[0] for r in pruner.history] == pytest.approx(asked, abs=1e-12)
    assert widths == [(kept_count(10, s), kept_count(16, s)) for s in asked]


def test_totals_and_maxima_are_of_the_original_channels() -> None:
    """A total sparsity removes its share of all channels of the entry together, round by round, and no layer more than its maximum."""
    model, x, _ = network()
    entries = [{"total_sparsity": 0.5, "max_sparsity_per_layer": {"hidden": 0.25}, "op_names": ["stem", "inner", "hidden"]}]
    results = []
    for physical in (False, True):
        pruner = LinearPruner(model, entries, "l1", 3, speedup=physical, example_inputs=x)
        _, masks = pruner.compress()
        assert [round(26 * (1 - r.sparsity)) for r in pruner.history] == [kept_count(26, 0.5 * t / 3) for t in (1, 2, 3)]
        assert isinstance(masks, gp.Masks)
        results.append({n: int(masks[n].sum()) for n in masks})
    assert results[0] == results[1]
    assert min(results[1].values()) == 1 or sum(results[1].values()) == 13
    assert dict(results[1])["hidden"] >= 12


def test_a_function_trains_and_other_arguments_feed_the_criterion() -> None:
    """With finetune=, an optimizer in pruning_params follows the smaller model, and the user's own stays as it is."""
    model, x, batches = network()
    before = copy.deepcopy(model.state_dict())
    trained: list[nn.Module] = []
    pruner = LinearPruner(
        model, EVERYTHING, "taylorfo", 3, speedup=True, example_inputs=x, pruning_params=training(model, batches), finetune=trained.append
    )
    small, _ = pruner.compress()
    assert len(trained) == 3
    assert trained[-1] is small
    assert dict(small.named_parameters())["stem.weight"].shape[0] == 4
    assert unchanged(before, model)
    with pytest.raises(gp.ConfigError, match="finetune returned another Linear"):
        LinearPruner(model, EVERYTHING, "l1", 2, example_inputs=x, finetune=lambda _: nn.Linear(1, 1)).compress()
    other = {"pruning_params": training(model, batches), **training(model, batches)}
    with pytest.raises(gp.ConfigError, match="pruning_params of LinearPruner has another optimizer"):
        LinearPruner(model, EVERYTHING, "taylorfo", 3, example_inputs=x, **other)


def test_a_round_that_failed_is_done_again() -> None:
    """After an exception in the middle of a round, compress begins anew and ends as if it had not happened."""
    model, x, batches = network()
    calls = []

    def finetune(now: nn.Module) -> None:
        trainer_of(batches)(now, torch.optim.SGD(now.parameters(), lr=0.1), F.cross_entropy)
        calls.append(now)
        if len(calls) == 2:
            raise KeyboardInterrupt

    pruner = LinearPruner(model, EVERYTHING, "l1", 3, example_inputs=x, finetune=finetune)
    with pytest.raises(KeyboardInterrupt):
        pruner.compress()
    result, _ = pruner.compress()
    expected, _ = LinearPruner(model, EVERYTHING, "l1", 3, example_inputs=x, finetune=finetune).compress()
    assert unchanged(expected.state_dict(), result)
    assert len(pruner.history) == 3


def test_layers_are_found_again_in_a_recorded_program() -> None:
    """Where a forward has sizes of its own, the smaller model is a recorded program, and the next round prunes that one on."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x)).reshape(-1, 12) * (12**0.5)
            out: Tensor = self.b(y)
            return out

    torch.manual_seed(0)
    model, x = Sized(), torch.randn(3, 4)
    pruner = LinearPruner(model, [{"sparsity": 0.75, "op_types": ["Linear"]}], "l1", 3, speedup=True, example_inputs=x)
    small, masks = pruner.compress()
    assert [r.sparsity for r in pruner.history] == pytest.approx([0.25, 0.5, 0.75])
    assert recipe_of(small).kind == "graph"
    one_shot, _ = gp.speedup(model, masks)
    assert torch.allclose(small(x), one_shot(x), atol=1e-6)


@pytest.mark.parametrize("algorithm", ["level", "l1", "l2", "fpgm", "slim", "apoz", "mean_activation", "taylorfo", "admm", L1NormPruner])
@pytest.mark.parametrize("physical", [False, True])
def test_every_algorithm_can_be_driven(algorithm: Any, physical: bool) -> None:
    """By name or class, masked and physical, each round removes more, and the last what was asked for."""
    if algorithm == "level" and physical:
        return
    model, x, batches = network()
    before = copy.deepcopy(model.state_dict())
    entries = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"] if algorithm == "slim" else ["Conv2d"]}]
    params = {"iterations": 2, "training_epochs": 1, "granularity": "coarse-grained"} if algorithm == "admm" else {}
    pruner = LinearPruner(
        model, entries, algorithm, 2, speedup=physical, pruning_params=params, example_inputs=x, **training(model, batches)
    )
    result, masks = pruner.compress()
    assert [r.number for r in pruner.history] == [1, 2]
    assert 0 < pruner.history[0].sparsity < pruner.history[1].sparsity
    if algorithm == "level":
        assert masks.sparsity == pytest.approx((45 + 450) / 990)
    else:
        assert int(masks["stem"].sum()) == 5
        assert bool(masks["hidden"].all())
    assert torch.isfinite(result(batches[0][0])).all()
    assert unchanged(before, model)


def test_plain_data_serves_rounds_and_criteria() -> None:
    """Batches and a loss in place of a trainer train between rounds and feed a criterion that looks at gradients."""
    model, x, batches = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    extra: dict[str, Any] = {"data": batches, "loss": F.cross_entropy, "optimizer": optimizer, "example_inputs": x}
    for algorithm in ("taylorfo", "apoz", "slim"):
        entries = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"] if algorithm == "slim" else ["Conv2d"]}]
        pruner = LinearPruner(model, entries, algorithm, 2, speedup=True, **extra)
        small, masks = pruner.compress()
        assert int(masks["stem"].sum()) == 5
        assert not torch.equal(dict(small.named_parameters())["head.bias"], model.head.bias)
    assert not optimizer.state


def test_masked_weights_stay_zero_while_training() -> None:
    """In every forward pass of every round exactly the masked weights are zero, although momentum moves them."""
    model, x, batches = network()
    zeros: list[int] = []

    def train(now: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any) -> None:
        for images, labels in batches:
            optimizer.zero_grad()
            criterion(now(images), labels).backward()
            zeros.append(sum(int((p == 0).sum()) for n, p in now.named_parameters() if n in {"hidden.weight", "head.weight"}))
            optimizer.step()

    entries = [{"sparsity": 0.5, "op_names": ["hidden", "head"]}]
    pruner = LinearPruner(model, entries, "level", 2, **{**training(model, batches), "trainer": train})
    result, masks = pruner.compress()
    assert zeros == [40 + 12] * 3 + [80 + 24] * 3
    assert isinstance(masks, gp.ElementMasks)
    assert sum(int((p == 0).sum()) for n, p in result.named_parameters() if n in masks) == 104
    assert not result._forward_pre_hooks  # noqa: SLF001 (there is no other way to see them)
    del x


def test_agp_inside_the_users_own_loop() -> None:
    """The seed's ten epochs from 0 to 80 %: after update_epoch(e) the layers are as sparse as the formula says, and training keeps them."""
    model, _, batches = network()
    before = copy.deepcopy(model.state_dict())
    times = {"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 10, "frequency": 1, "op_types": ["default"]}
    pruner = AGPPruner(model, [times], "level")
    net = pruner.begin()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(12):
        pruner.update_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            for name, parameter in net.named_parameters():
                if name in pruner.masks():
                    gone = int(parameter.numel() * agp(epoch, 1, 10, 0.0, 0.8) + 1e-9)
                    assert int((parameter == 0).sum()) == gone, (epoch, name)
            optimizer.step()
    result, masks = pruner.finish()
    assert result is net
    assert masks.sparsity == pytest.approx(0.8, abs=0.01)
    assert not net._forward_pre_hooks  # noqa: SLF001 (there is no other way to see them)
    assert unchanged(before, model)


def test_the_seeds_entries_serve_rounds_and_admm_single_weights() -> None:
    """Entries with schedules of their own make as many rounds as they last; ADMM prunes single weights by them, masked."""
    model, _, batches = network()
    times = {"initial_sparsity": 0.2, "final_sparsity": 0.8, "start_epoch": 2, "end_epoch": 5, "frequency": 2, "op_names": ["hidden"]}
    params = {"iterations": 2, "training_epochs": 1}
    pruner = AGPPruner(model, [times], "admm", pruning_params=params, **training(model, batches))
    result, masks = pruner.compress()
    asked = [agp(t, 2, 5, 0.2, 0.8, 2) for t in range(1, 6)]
    assert [r.asked for r in pruner.history] == [(a,) for a in asked]
    assert [r.sparsity for r in pruner.history] == pytest.approx([int(160 * a + 1e-9) / 160 for a in asked])
    assert [r.params for r in pruner.history] == [sum(p.numel() for p in model.parameters()) - int(160 * a + 1e-9) for a in asked]
    assert isinstance(masks, gp.ElementMasks)
    assert bool((dict(result.named_parameters())["hidden.weight"][~masks["hidden.weight"]] == 0).all())


def test_step_counts_by_itself_and_any_criterion_can_be_used() -> None:
    """step() goes one step further each time; with a criterion of channels the masks are of groups, and speedup removes them."""
    model, x, batches = network()
    pruner = AGPPruner(model, EVERYTHING, "l1", 4, example_inputs=x)
    net = pruner.begin()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    widths = []
    for _ in range(5):
        trainer_of(batches)(net, optimizer, F.cross_entropy)
        pruner.step()
        masks = pruner.masks()
        widths.append(int(masks["stem"].sum()))
    assert widths == [kept_count(10, 0.6 - 0.6 * (1 - t / 4) ** 3) for t in (1, 2, 3, 4, 4)]
    result, masks = pruner.finish()
    assert isinstance(masks, gp.Masks)
    small, report = gp.speedup(result, masks)
    assert report.verified
    assert dict(small.named_parameters())["stem.weight"].shape[0] == 4


def test_best_and_last_history_csv_and_plot(tmp_path: Path) -> None:
    """The best round is the one with the highest score, the sparser of equal ones; all rounds are in the table, the CSV and the plot."""
    model, x, _ = network()
    scores = iter([0.5, 0.9, 0.9, 0.7])
    pruner = LinearPruner(
        model, EVERYTHING, "l1", 4, None, True, lambda _: next(scores), True, example_inputs=x, folder=tmp_path, progress=True
    )
    with pytest.raises(gp.ConfigError, match="no result yet"):
        _ = pruner.best
    small, _ = pruner.compress()
    assert pruner.compress()[0] is small
    assert (pruner.best.round.number, pruner.last.round.number) == (3, 4)
    number, best, masks, score, entries = pruner.get_best_result()
    assert (number, score) == (3, 0.9)
    assert entries[0]["sparsity"] == pytest.approx(0.45)
    assert dict(best.named_parameters())["stem.weight"].shape[0] == int(masks["stem"].sum()) == kept_count(10, 0.45)
    lines = (tmp_path / "linear.csv").read_text().splitlines()
    assert lines[0] == "number,asked,sparsity,params,macs,score,seconds"
    assert [line.split(",")[5] for line in lines[1:]] == ["0.5", "0.9", "0.9", "0.7"]
    text = str(pruner.history)
    assert text.count("best") == 1
    assert "60.0%" in text
    assert (tmp_path / "linear.png").stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "rounds").iterdir()) == [f"linear-00{n}.safetensors" for n in (1, 2, 3, 4)]


def test_without_an_evaluator_the_last_is_the_best() -> None:
    """There is nothing to compare by then."""
    model, x, _ = network()
    pruner = LinearPruner(model, EVERYTHING, "l1", 2, example_inputs=x)
    pruner.compress()
    assert pruner.best.round is pruner.last.round
    assert pruner.get_best_result()[3] is None


def _refusals(model: nn.Module, batches: Batches) -> list[tuple[dict[str, Any], str]]:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    return [
        ({"pruning_algorithm": "l3"}, "pruning_algorithm of AGPPruner is 'l3'; did you mean 'l2'"),
        ({"pruning_algorithm": nn.Linear}, "pruning_algorithm of AGPPruner is <class"),
        ({"pruning_algorithm": "level", "speedup": True}, "LevelPruner masks single weights"),
        ({"total_iteration": 0}, "total_iteration is 0"),
        ({"evaluator": 3}, "evaluator of AGPPruner is a int"),
        ({"keep_intermediate_result": True}, "has no folder"),
        ({"pruning_params": {"graph": 1}}, "pruning_params of AGPPruner gives 'graph'"),
        ({"config_list": [{"op_types": ["Conv2d"]}]}, r"config_list\[0\] of AGPPruner gives no sparsity"),
        ({"config_list": [{"final_sparsity": 0.5}]}, "has no 'end_epoch'"),
        ({"config_list": [{"final_sparsity": 0.5, "end_epoch": 3, "sparsity": 0.2}]}, "gives 'sparsity' besides a schedule"),
        ({"config_list": [{"sparsity": 1.5}]}, r"config_list\[0\] of AGPPruner cannot be followed: final of the schedule is 1.5"),
        ({"config_list": {"sparsity": 0.5}}, "is not a list of dicts"),
        ({"finetune": 3}, "finetune of AGPPruner is a int"),
        ({"trainer": trainer_of(batches)}, "has no optimizer"),
        ({"data": iter(batches), "optimizer": opt}, "gives every batch only once"),
        ({"finetune": lambda _: None, "lr_scheduler": lambda o: o}, "has a lr_scheduler and finetune"),
    ]


@pytest.mark.parametrize("number", range(16))
def test_what_cannot_be_done_is_refused(number: int) -> None:
    """Each wrong argument is one clear error."""
    model, x, batches = network()
    given, words = _refusals(model, batches)[number]
    with pytest.raises(gp.GraphPruneError, match=words):
        AGPPruner(**{"model": model, "config_list": EVERYTHING, "pruning_algorithm": "l1", "example_inputs": x, **given})


def test_loops_and_evaluators_that_cannot_work_are_refused() -> None:
    """A loop that has not begun, one that is to speed up, and scores that are no numbers are clear errors."""
    model, x, _ = network()
    with pytest.raises(gp.ConfigError, match="at work in no training loop"):
        AGPPruner(model, EVERYTHING, "l1", example_inputs=x).step()
    started = AGPPruner(model, EVERYTHING, "l1", example_inputs=x)
    started.begin()
    for again in (started.begin, started.compress):
        with pytest.raises(gp.ConfigError, match=r"AGPPruner (has begun already|is at work in a training loop)"):
            again()
    with pytest.raises(gp.ConfigError, match="to speed up inside a training loop"):
        AGPPruner(model, EVERYTHING, "l1", speedup=True, example_inputs=x).begin()
    for score, words in ((None, "returned a NoneType"), (float("nan"), "returned NaN")):
        evaluator: Any = lambda _, score=score: score  # noqa: E731 (one value each)
        with pytest.raises(gp.ConfigError, match=words):
            LinearPruner(model, EVERYTHING, "l1", 2, evaluator=evaluator, example_inputs=x).compress()
    with pytest.raises(gp.ConfigError, match="gives 'final_sparsity', and LinearPruner has one schedule"):
        LinearPruner(model, [{"final_sparsity": 0.5, "end_epoch": 3}], "l1", example_inputs=x)
