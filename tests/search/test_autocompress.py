"""AutoCompress: rounds on the closed formula, exactly what was allocated goes, and no interruption changes what comes out."""

from __future__ import annotations

import copy
import csv
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.cost.predict import Forecast
from graphprune.errors import ConfigError, FileError, InputError
from graphprune.pruners.budgets import kept_count
from graphprune.schedules.state import narrowed
from graphprune.search.allocation import Projection, Remaining
from graphprune.search.autocompress import AutoCompressPruner
from graphprune.search.scattering import scattered
from tests.support.analytic import Stopped
from tests.support.killing import FORKS, kill
from tests.support.searches import TRAINING, accuracy, digits
from tests.support.untouched import changes, snapshot

CONVS: dict[str, Any] = {"op_types": ["Conv2d"]}


def network() -> nn.Sequential:
    """Returns three convolutions of 12, 16 and 20 channels and a classifier, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 20, 3), nn.ReLU())
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 3))


def samples() -> tuple[Tensor, Tensor]:
    """Returns images (48, 1, 8, 8) and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(48, 1, 8, 8, generator=generator), torch.randint(0, 3, (48,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., Tensor]) -> None:
    """Trains for one epoch, in an order from the global generators; its arguments must belong together."""
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert all(value.shape == parameter.shape for value in state.values() if torch.is_tensor(value) and value.numel() > 1)
    x, y = samples()
    order = torch.tensor(random.sample(range(48), 48))[torch.randperm(48)]
    for batch in order.split(16):
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()


def score(model: nn.Module) -> float:
    """Returns minus the loss."""
    assert not model.training
    x, y = samples()
    with torch.no_grad():
        return -float(F.cross_entropy(model(x), y))


def pruner(config: list[dict[str, Any]] | None = None, rounds: int = 3, **options: Any) -> AutoCompressPruner:
    """Returns a pruner of the network, with short training."""
    model = options.pop("model", None) or network()
    torch.manual_seed(2)
    random.seed(2)
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    admm = {"iterations": 2, "training_epochs": 1, **options.pop("admm", {})}
    sa = {"trials": 5, **options.pop("sa", {})}
    given: dict[str, Any] = {"trainer": train, "criterion": F.cross_entropy, "evaluator": score, "example_inputs": samples()[0][:1]}
    return AutoCompressPruner(model, config or [CONVS], rounds, admm, sa, optimizer=optimizer, **{**given, **options})


def one_more(forecast: Forecast, masks: gp.Masks, names: list[str], unit: str) -> float:
    """Returns the most that the model costs with one channel more of one group."""
    costs = []
    for name in names:
        kept = {n: m.copy() for n, m in masks.items()}
        kept[name][np.flatnonzero(~kept[name])[:1]] = True
        costs.append(float(getattr(forecast.cost(kept), unit)))
    return max(costs)


# -- how much goes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "speedup"), [("macs", True), ("params", False)])
def test_rounds_meet_the_closed_formula_to_within_one_channel(unit: str, speedup: bool, tmp_path: Path) -> None:
    """After round i of N the cost is at most dense (1 - P)^(i/N), and above it with one channel more."""
    made = pruner(rounds=4, budget=gp.Budget(**{unit: 0.7}), speedup=speedup, folder=tmp_path, keep_intermediate_result=True)
    model, masks = made.compress()
    cost = gp.Cost(0, 0)
    dense = float(getattr(gp.count(network(), samples()[0][:1]), unit))
    forecast = Forecast(network(), made.graph)
    assert [record.number for record in made.history] == [1, 2, 3, 4]
    for record in made.history:
        share = 0.3 ** (record.number / 4)
        target = dense * share
        assert record.targets == pytest.approx((target,))
        assert record.asked == pytest.approx((1 - share,))
        sizes = {g.name: g.channels for g in made.graph.groups}
        kept = {n: np.arange(size) >= round(size * record.sparsities[n]) for n, size in sizes.items()}
        cost = forecast.cost(kept)
        assert cost == gp.Cost(record.params, record.macs or 0)
        assert getattr(cost, unit) <= target < one_more(forecast, gp.Masks(made.graph, kept), list(sizes), unit)
    assert gp.count(gp.speedup(network(), masks)[0], samples()[0][:1]) == cost
    assert gp.count(model, samples()[0][:1]).params == (record.params if speedup else gp.count(network(), samples()[0][:1]).params)
    assert len(list((tmp_path / "rounds").glob("autocompress-*.safetensors"))) == 4


@pytest.mark.parametrize("speedup", [True, False])
def test_every_config_entry_counts(speedup: bool) -> None:
    """Each entry's channels, all its layers together, are those of its own sparsity's formula in every round; others stay."""
    config = [{"op_names": ["0", "2"], "sparsity": 0.6}, {"op_names": ["5"], "total_sparsity": 0.3}]
    made = pruner(config, speedup=speedup)
    _, masks = made.compress()
    for record in made.history:
        left = {n: round(masks[n].size * (1 - s)) for n, s in record.sparsities.items()}
        first, second = (kept_count(n, 1 - (1 - s) ** (record.number / 3)) for n, s in ((28, 0.6), (20, 0.3)))
        assert record.targets == (first, second)
        assert (left["0"] + left["2"], left["5"]) == (first, second)
    only = pruner([{"op_names": ["5"], "sparsity": 0.3}]).compress()[1]
    assert {n: int((~m).sum()) for n, m in only.items()} == {"0": 0, "2": 0, "5": 6}


@pytest.mark.parametrize("speedup", [True, False])
def test_what_is_removed_is_what_was_allocated_and_what_has_gone_stays_gone(speedup: bool) -> None:
    """Round by round, each group is left with the share that the annealing's best trial says, of the channels that were left."""
    seen: list[list[Tensor]] = []

    def scored(model: nn.Module) -> float:
        seen.append([(m.weight.detach().flatten(1) == 0).all(dim=1) for m in model.modules() if isinstance(m, nn.Conv2d)])
        return score(model)

    made = pruner(budget=gp.Budget(macs=0.7), speedup=speedup, evaluator=scored, sa={"evaluator": score})
    _, masks = made.compress()
    left = {n: m.size for n, m in masks.items()}
    for record in made.history:
        assert record.trial is not None
        left = {n: round(k * (1 - record.trial.sparsities[n])) for n, k in left.items()}
        assert {n: round(masks[n].size * (1 - s)) for n, s in record.sparsities.items()} == left
        assert (record.trial.cost.params, record.trial.cost.macs) == (record.params, record.macs)
    assert {n: int(m.sum()) for n, m in masks.items()} == left
    assert len(seen) == 3
    if not speedup:
        for before, after in itertools.pairwise(seen):
            assert all(bool((b <= a).all()) for b, a in zip(before, after, strict=True))
        assert [g.tolist() for g in seen[-1]] == [(~masks[n]).tolist() for n in ("0", "2", "5")]


def test_limits_are_shares_of_the_original_model() -> None:
    """No group loses more of its original channels than max_sparsity, however many rounds there are; what cannot be met is said first."""
    made = pruner(budget=gp.Budget(macs=0.6), max_sparsity=0.5, rounds=4)
    made.compress()
    assert max(made.history[-1].sparsities.values()) <= 0.5
    assert sorted(made.history[-1].sparsities.values())[1] > 0.3
    with pytest.raises(ConfigError, match="at most"):
        pruner(budget=gp.Budget(macs=0.9), max_sparsity=0.5)


def test_rounds_that_need_nothing_train_on() -> None:
    """Where one channel is more than several rounds ask for, the next ones remove none."""
    made = pruner(budget=gp.Budget(macs=0.1), rounds=12, finetune_epochs=1)
    made.compress()
    idle = [r for r in made.history if r.trial is None]
    assert 0 < len(idle) < 12
    assert all(r.convergence is None for r in idle)
    assert all((r.macs or 0) <= t for r in made.history for t in r.targets)
    assert len({r.score for r in made.history}) == 12


# -- what goes, and what is left -----------------------------------------------------------------------------------------------------


def test_shrunk_model_computes_what_the_masked_one_does(tmp_path: Path) -> None:
    """Put back into the original shapes and masked, the weights give the same outputs; so does the recipe."""
    made = pruner(budget=gp.Budget(macs=0.6), rounds=1, admm={"iterations": 5})
    small, masks = made.compress()
    assert isinstance(small, nn.Sequential)
    full = network()
    full.load_state_dict(scattered(full, small, masks))
    masks.apply(full)
    x = samples()[0]
    assert torch.allclose(full.eval()(x), small.eval()(x), atol=1e-6)
    assert score(small) > score(masks.masked(network()).eval()) + 0.1
    assert small[0].out_channels == int(masks["0"].sum()) < 12
    gp.save(small, tmp_path / "small.safetensors")
    assert torch.equal(gp.load(network(), tmp_path / "small.safetensors").eval()(x), small(x))


class Attention(nn.Module):
    """Four heads, whose channels are owned by heads and by widths jointly."""

    def __init__(self) -> None:
        """Makes the layers, the same every time."""
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.q, self.k, self.v = (nn.Linear(8, 24) for _ in range(3))
            self.o, self.f, self.g = nn.Linear(24, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Attends and classifies; `x` is (n, 8, 8)."""
        x = x[:, 0]
        q, k, v = (y.view(*x.shape[:2], 4, 6).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], 24)
        y: Tensor = self.g(F.sigmoid(self.f(x + self.o(a)))).mean(1)
        return y


@pytest.mark.parametrize(("made_by", "cut"), [(Attention, "blocks"), (Attention, "within"), (Attention, "both"), (network, "blocks")])
def test_masks_and_removal_come_to_the_same(made_by: Callable[[], nn.Module], cut: str) -> None:
    """With the same random numbers, masked and shrunk rounds allocate, train and remove alike, also where groups overlap."""
    options: dict[str, Any] = {"budget": gp.Budget(params=0.5), "cut": cut, "scope": "group", "finetune_epochs": 1}
    config = [{"op_types": ["Linear"] if made_by is Attention else ["Conv2d"], "rho": 0.05}]
    made = [pruner(config, model=made_by(), speedup=speedup, **options) for speedup in (True, False)]
    for one in made:
        torch.manual_seed(4)
        random.seed(4)
        one.compress()
    (small, masks), (masked, same) = (one.compress() for one in made)
    assert {n: m.tolist() for n, m in masks.items()} == {n: m.tolist() for n, m in same.items()}
    x = samples()[0]
    assert torch.allclose(small.eval()(x), masked.eval()(x), atol=1e-5)
    assert [r.params for r in made[0].history] == [r.params for r in made[1].history]
    assert sum(p.numel() for p in small.parameters()) == made[0].history[-1].params


@pytest.mark.parametrize("speedup", [True, False])
def test_projection_is_that_of_a_plain_loop(speedup: bool) -> None:
    """Of the channels that are left, those of the smallest sum of squares go, and are zero."""
    full = network()
    graph = gp.trace(full, samples()[0][:1])
    alive = gp.Masks(graph, {"2": np.arange(16) % 3 > 0})
    small = gp.speedup(full, alive)[0] if speedup else alive.masked(full)
    present = alive.positions() if speedup else {}
    weights = dict(small.named_parameters())
    projection = Projection(graph, {"0": 12, "2": 4, "5": 13}, alive, present, set(weights))
    assert set(projection.entries()) == {"2.weight", "5.weight"}
    generator = torch.Generator().manual_seed(5)
    values = {n: torch.randn(weights[n].shape, generator=generator) for n in projection.entries()}
    if not speedup:
        values["2.weight"][torch.from_numpy(~alive["2"])] *= 10.0  # what optimizers have made of zeros does not count
    found, masks = projection.project(values)
    for name, count in (("2", 4), ("5", 13)):
        energy = [float(w.square().sum()) for w in values[f"{name}.weight"]]
        places = np.flatnonzero(alive[name]) if speedup else np.arange(alive[name].size)
        order = sorted((i for i, place in enumerate(places) if alive[name][place]), key=lambda i: -energy[i])
        kept = set(order[:count])
        assert set(np.flatnonzero(masks[name])) == {places[i] for i in kept}
        for i in range(len(energy)):
            wanted = values[f"{name}.weight"][i] if i in kept else torch.zeros(())
            assert torch.equal(found[f"{name}.weight"][i], wanted.expand_as(found[f"{name}.weight"][i]))
    assert masks["0"].all()
    if speedup:
        again = gp.trace(small, samples()[0][:1])
        now = narrowed(again, graph, present, masks.positions())
        smaller = gp.speedup(small, now)[0]
        once = gp.speedup(full, masks)[0]
        assert all(torch.equal(a, b) for a, b in zip(smaller.state_dict().values(), once.state_dict().values(), strict=True))


def test_candidates_choose_among_what_is_left_by_the_criterion() -> None:
    """The scores of a round are the criterion's of the present weights; FPGM measures distances to channels that are left alone."""
    model = network()
    x = samples()[0][:1]
    graph = gp.trace(model, x)
    alive = gp.Masks(graph, {"0": np.arange(12) < 8})
    found = Remaining(alive.masked(model), score, alive, example_inputs=x, budget=gp.Budget(macs=0.6), criterion="fpgm")
    rows = model.get_parameter("0.weight").detach().flatten(1)[:8]
    assert found.scores["0"] == pytest.approx(torch.cdist(rows.double(), rows.double()).sum(1).numpy(), rel=1e-5)
    assert found.project({"0": 0.5, "2": 0.5, "5": 0.5})["0"] * 8 == pytest.approx(
        round(found.project({"0": 0.5, "2": 0.5, "5": 0.5})["0"] * 8)
    )
    masks = found.masks({"0": 0.25})
    assert not masks["0"][8:].any()
    assert masks["0"].sum() == 6
    assert found.cost({"0": 0.25}) == gp.count(gp.speedup(model, masks)[0], x)


def test_criteria_see_the_data() -> None:
    """A criterion of activations is computed on the data that the training is by; without any, it says what is missing."""
    x, y = samples()
    data: dict[str, Any] = {"data": list(zip(x.split(16), y.split(16), strict=True)), "loss": F.cross_entropy, "trainer": None}
    made = pruner(rounds=1, budget=gp.Budget(macs=0.5), sa={"base_algo": "apoz"}, **data)
    made.compress()
    assert made.history[-1].trial is not None
    with pytest.raises(ConfigError, match="APoZ needs data"):
        pruner(budget=gp.Budget(macs=0.5), sa={"base_algo": "apoz"})


def test_a_strong_penalty_converges() -> None:
    """The residual of ADMM's last iteration is recorded: below a hundredth with a strong penalty, far above with a weak one."""
    last = []
    for rho, iterations in ((8.0, 60), (1e-6, 5)):
        model = network()
        admm = {"iterations": iterations, "training_epochs": 2, "optimizer": torch.optim.SGD(model.parameters(), lr=0.05)}
        made = pruner([{**CONVS, "rho": rho}], 1, model=model, optimizer=admm["optimizer"], budget=gp.Budget(macs=0.5), admm=admm)
        made.compress()
        last.append(made.history[-1].convergence)
    assert [c.iteration for c in last] == [60, 5]
    assert last[0].primal < 1e-2
    assert last[1].primal > 0.1


# -- around it -----------------------------------------------------------------------------------------------------------------------


def test_model_and_optimizer_are_left_alone() -> None:
    """Tensors, flags and gradients of the model, and groups and state of the optimizer, are bit-identical afterwards."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, F.cross_entropy)
    optimizer.zero_grad()
    made = pruner(model=model, optimizer=optimizer, budget=gp.Budget(macs=0.5), finetune_epochs=1)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    made.compress()
    after = snapshot(model)
    assert not changes({**before, "random state": 0}, {**after, "random state": 0})
    assert not changes(
        {"groups": str(state["param_groups"]), **state["state"]},
        {"groups": str(optimizer.state_dict()["param_groups"]), **optimizer.state_dict()["state"]},
    )


def test_results_are_in_the_words_of_the_seeds(tmp_path: Path) -> None:
    """Best and last round, get_best_result and its config list, table and CSV; data in place of a trainer, in admm_params."""
    x, y = samples()
    data = {
        "data": list(zip(x.split(16), y.split(16), strict=True)),
        "loss": F.cross_entropy,
        "optimizer": lambda p: torch.optim.SGD(p, 0.05),
    }
    given: dict[str, Any] = {"evaluator": score, "example_inputs": x[:1], "budget": gp.Budget(macs=0.6), "folder": tmp_path}
    made = AutoCompressPruner(network(), [CONVS], 3, {**data, "iterations": 2, "training_epochs": 1}, {"trials": 4}, **given)
    with pytest.raises(ConfigError, match="no result yet"):
        _ = made.last
    small, masks = made.compress()
    assert made.compress()[0] is small is made.last.model
    number, best, best_masks, top, entries = made.get_best_result()
    assert top == max(r.score for r in made.history if r.score is not None) == made.best.round.score
    assert score(best.eval()) == pytest.approx(top)
    assert made.history[number - 1] == made.best.round
    _, other = gp.L1NormPruner(network(), entries, example_inputs=x[:1]).compress()
    assert isinstance(other, gp.Masks)
    assert {n: int(m.sum()) for n, m in other.items()} == {n: int(m.sum()) for n, m in best_masks.items()}
    assert "AutoCompressPruner" in str(made.history)
    with (tmp_path / "autocompress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["macs"]) for r in rows] == [r.macs for r in made.history]
    assert float(rows[-1]["primal"]) == made.history[-1].convergence.primal
    assert float(rows[-1]["5"]) == pytest.approx(float((~masks["5"]).mean()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_iterations": 3}, "Write total_iteration="),
        ({"optimize_mode": "minimize"}, "higher is better"),
        ({"base_algo": "l1"}, "sa_params="),
        ({"cool_down_rate": 0.9}, "sa_params="),
        ({"admm_num_iterations": 30}, "admm_params={'iterations'"),
        ({"admm_epochs_per_iteration": 5}, "admm_params={'training_epochs'"),
        ({"row": 1e-4}, "'rho' in the entries"),
        ({"dummy_input": 0}, "example_inputs="),
        ({"aggregaton": "sum"}, "did you mean 'aggregation'"),
        ({"admm": {"iteration": 3}}, "admm_params of AutoCompressPruner has no argument 'iteration'; did you mean 'iterations'"),
        ({"admm": {"evaluator": score}}, "Write trainer="),
        ({"admm": {"trainer": score}}, "another 'trainer'"),
        ({"admm": {"iterations": 0}}, "iterations is 0"),
        ({"sa": {"start_temprature": 3}}, "did you mean 'start_temperature'"),
        ({"sa": {"pruning_algorithm": "l1"}}, "Write 'base_algo'"),
        ({"sa": {"trials": 1}}, "trials is 1"),
        ({"sa": {"perturbation_magnitude": 2.0}}, "perturbation_magnitude"),
        ({"sa": {"base_algo": "l3"}}, "l3"),
        ({"sa": {"finetune": 3}}, "a int"),
        ({"evaluator": None}, "no evaluator"),
        ({"rounds": 0}, "total_iteration is 0"),
        ({"finetune": 3}, "finetune"),
        ({"finetune": score, "finetune_epochs": 1}, "finetune_epochs="),
        ({"trainer": None}, "neither a trainer nor data"),
        ({"keep_intermediate_result": True}, "no folder"),
        ({"budget": None}, "neither a budget nor sparsities"),
        ({"mode": "global"}, "Leave mode= out"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is trained, with what to write instead."""
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        pruner(**{"budget": gp.Budget(macs=0.5), **options})


def test_what_is_missing_is_said() -> None:
    """Example inputs; an optimizer's own parameters that a folder could not keep; a params argument that is no dict."""
    with pytest.raises(InputError, match="example_inputs"):
        pruner(budget=gp.Budget(macs=0.5), example_inputs=None)
    model, extra = network(), nn.Parameter(torch.zeros(1))
    with pytest.raises(ConfigError, match="besides the model's"):
        pruner(
            model=model, optimizer=torch.optim.SGD([*model.parameters(), extra], 0.1), budget=gp.Budget(macs=0.5), folder="unused"
        ).compress()
    with pytest.raises(ConfigError, match="sa_params of AutoCompressPruner is a list"):
        AutoCompressPruner(network(), [CONVS], 3, None, [], trainer=train, optimizer=torch.optim.SGD, criterion=None)  # type: ignore[arg-type]  # on purpose


# -- interrupted work ----------------------------------------------------------------------------------------------------------------


def _draw(*_: object) -> None:
    """Makes every forward pass draw a random number, also those that find the groups."""
    random.random()  # noqa: S311 (no secrets)


def outcome(made: AutoCompressPruner) -> dict[str, Any]:
    """Returns all that must be the same, however often the run was interrupted."""
    model, masks = made.compress()
    best = made.best
    assert isinstance(best.masks, gp.Masks)
    return {
        "model": dict(model.state_dict()),
        "masks": {n: torch.from_numpy(m) for n, m in masks.items()},
        "best": dict(best.model.state_dict()),
        "best masks": {n: torch.from_numpy(m) for n, m in best.masks.items()},
        "history": made.history,
        "best round": best.round,
    }


@pytest.mark.parametrize("speedup", [True, False])
def test_interrupted_anywhere_ends_as_uninterrupted(speedup: bool, tmp_path: Path) -> None:
    """Stopped in candidates, in ADMM, in fine-tuning and in the evaluation of a round, the run ends bit-identically."""
    options: dict[str, Any] = {"budget": gp.Budget(macs=0.6), "speedup": speedup, "finetune_epochs": 1}
    calls, stop = [0], [-1]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            calls[0] += 1
            if calls[0] == stop[0]:
                raise Stopped
            return function(*given)

        return called

    def run(folder: Path | None) -> dict[str, Any]:
        calls[0] = 0
        model = network()
        model.register_forward_pre_hook(_draw)
        return outcome(pruner(model=model, trainer=counted(train), evaluator=counted(score), folder=folder, **options))

    whole = run(None)
    total = calls[0]
    assert total == 3 * (5 + 2 + 1 + 1)
    for after in (1, 3, 6, 5, 3, 2, 5, 4, 6, 8):
        stop[0] = after
        with pytest.raises(Stopped):
            run(tmp_path)
    stop[0] = -1
    again = run(tmp_path)
    assert calls[0] == 2 + 1 + 1  # the last round's training and its score
    assert not changes(whole, again)
    assert not changes(whole, run(tmp_path))
    assert calls[0] == 0
    with pytest.raises(FileError, match="other settings: total_iteration was 3 and is 4 now"):
        pruner(rounds=4, folder=tmp_path, **options).compress()
    with pytest.raises(FileError, match="other settings: admm"):
        pruner(admm={"iterations": 3}, folder=tmp_path, **options).compress()


def run_of(folder: Path | None, speedup: str) -> dict[str, Any]:
    """Returns what four rounds with every kind of work in them come to."""
    options: dict[str, Any] = {"budget": gp.Budget(macs=0.6), "finetune_epochs": 1, "admm": {"iterations": 4}}
    return outcome(pruner(rounds=4, speedup=speedup == "removal", folder=folder, **options))


@pytest.mark.slow
@FORKS
@pytest.mark.parametrize("speedup", ["removal", "masks"])
def test_killed_runs_end_like_uninterrupted_ones(speedup: str, tmp_path: Path) -> None:
    """After ten SIGKILLs at random moments weights, masks, records and the best round are bit-identical to an uninterrupted run's."""
    kill("tests.search.test_autocompress", "run_of", tmp_path, speedup)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_better_than_uniform_where_layers_differ(seed: int) -> None:
    """At a fifth of the MACs of a network with one wide and two narrow layers: more accurate than uniform L1 with as many epochs."""
    images, labels = digits()

    def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., Tensor]) -> None:
        for batch in torch.randperm(TRAINING).split(64):
            optimizer.zero_grad()
            criterion(model(images[batch]), labels[batch]).backward()
            optimizer.step()

    def trained(model: nn.Module, epochs: int, optimizer: torch.optim.Optimizer) -> nn.Module:
        for _ in range(epochs):
            epoch(model.train(), optimizer, F.cross_entropy)
        return model.eval()

    def evaluator(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(F.cross_entropy(model(images[:TRAINING]), labels[:TRAINING]))

    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 6, 2), (6, 48, 1), (48, 10, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 10))
    trained(model, 8, torch.optim.Adam(model.parameters(), lr=5e-3))
    given: dict[str, Any] = {"budget": gp.Budget(macs=0.8), "example_inputs": images[:1]}

    _, masks = gp.L1NormPruner(model, [CONVS], **given).compress()
    uniform = gp.speedup(model, masks)[0]
    trained(uniform, 2 * (3 + 5), torch.optim.SGD(uniform.parameters(), lr=0.05, momentum=0.9))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    admm = {"iterations": 3, "training_epochs": 1, "trainer": epoch, "optimizer": optimizer, "criterion": F.cross_entropy}
    sa = {"trials": 25, "finetune": lambda small: trained(small, 1, torch.optim.Adam(small.parameters(), lr=5e-3))}
    made = AutoCompressPruner(model, [{**CONVS, "rho": 0.3}], 2, admm, sa, evaluator=evaluator, finetune_epochs=5, seed=seed, **given)
    small, _ = made.compress()
    assert gp.count(small, images[:1]).macs <= 0.2 * gp.count(model, images[:1]).macs
    assert accuracy(small.eval()) > accuracy(uniform)
