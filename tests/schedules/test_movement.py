"""Movement pruning: scores, masks and weights are those of the paper's method in plain loops, and what channels lose can be removed."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import graphprune as gp
from graphprune.schedules.functions import agp
from graphprune.schedules.movement import MovementPruner
from tests.support.bytes import Batches, ByteTransformer, next_byte
from tests.support.untouched import changes, snapshot

LR, WARM, COOL, STEPS = 0.05, 4, 14, 20
SIZES = (6, 8, 4)
Array = NDArray[np.float64]
Unit = tuple[str, int, int]


def mlp(seed: int = 0) -> nn.Sequential:
    """Returns two linear layers with a ReLU between, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIZES[0], SIZES[1]), nn.ReLU(), nn.Linear(SIZES[1], SIZES[2])).double()


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of ten inputs with targets that a random linear map makes."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(count, 10, SIZES[0], generator=generator, dtype=torch.float64)
    return [(x, y) for x, y in zip(inputs, inputs @ torch.randn(SIZES[0], SIZES[2], generator=generator, dtype=torch.float64), strict=True)]


def train(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """One epoch, as users write it."""
    for inputs, target in batches():
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Returns plain SGD, of weights or of scores."""
    return torch.optim.SGD(parameters, lr=LR)


def config_of(amount: float = 0.6) -> list[dict[str, Any]]:
    """Returns a config list for both layers."""
    return [{"sparsity": amount, "op_types": ["Linear"]}]


# -- the paper's method in plain loops -------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """Movement pruning of the two layers, by numpy's matrix products for the gradients and loops for everything else.

    Args:
        unit: from a weight (0 or 1) and a position in it to the unit that has its score, or None where it has none.
        soft: the regulariser's strength, None for hard masks.
        amount: sparsity, or the threshold of soft masks.
        whole: channels: hidden neurons go as a whole, and at least one stays.
        adam: train scores by Adam in place of SGD.
    """

    unit: Callable[[int, int, int], Unit | None]
    soft: float | None
    amount: float
    whole: bool = False
    adam: bool = False
    scores: dict[Unit, float] = field(default_factory=dict)
    masks: list[Array] = field(default_factory=list)
    trace: list[list[Array]] = field(default_factory=list)
    moments: dict[Unit, tuple[float, float]] = field(default_factory=dict)
    kept: dict[Unit, bool] = field(default_factory=dict)

    def run(self, model: nn.Sequential) -> dict[str, Array]:
        """Returns the weights after all steps."""
        w: dict[str, Array] = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
        names = ["0.weight", "2.weight"]
        self.masks = [np.ones_like(w[name]) for name in names]
        places = [(k, i, j) for k in (0, 1) for i in range(self.masks[k].shape[0]) for j in range(self.masks[k].shape[1])]
        units = {place: unit for place in places if (unit := self.unit(*place)) is not None}
        self.scores = dict.fromkeys(units.values(), 0.0)
        self.kept = dict.fromkeys(self.scores, True)
        for step, (x, y) in enumerate((x.numpy(), y.numpy()) for x, y in batches()):
            masked = [w[name] * mask for name, mask in zip(names, self.masks, strict=True)]
            before = x @ masked[0].T + w["0.bias"]
            hidden = np.maximum(before, 0.0)
            error = 2.0 * (hidden @ masked[1].T + w["2.bias"] - y) / y.size
            back = (error @ masked[1]) * (before > 0)
            slopes = [back.T @ x, error.T @ hidden]  # dL/dW' of both layers
            if step < COOL:
                gradient = dict.fromkeys(self.scores, 0.0)
                for (k, i, j), unit in units.items():
                    gradient[unit] += slopes[k][i, j] * w[names[k]][i, j]
                self._learn(gradient, step)
            for k, name in enumerate(names):
                w[name] = w[name] - LR * slopes[k] * self.masks[k]
            w["0.bias"] = w["0.bias"] - LR * back.sum(0)
            w["2.bias"] = w["2.bias"] - LR * error.sum(0)
            if step + 1 <= COOL:
                self._choose(self.stage(step + 1))
                for (k, i, j), unit in units.items():
                    self.masks[k][i, j] = float(self.kept[unit])
            if step + 1 >= COOL:
                for k, name in enumerate(names):
                    w[name] = w[name] * self.masks[k]
                for (_, i, _), kept in self.kept.items() if self.whole else ():
                    w["0.bias"][i] *= kept
                    w["2.weight"][:, i] *= kept
            self.trace.append([mask.copy() for mask in self.masks])
        return w

    @staticmethod
    def stage(t: int) -> float:
        """Returns the paper's cubic schedule, as the part of the final sparsity."""
        if t < WARM:
            return 0.0
        return 1.0 if t >= COOL else 1.0 - (1.0 - (t - WARM) / (COOL - WARM)) ** 3

    def _learn(self, gradient: dict[Unit, float], step: int) -> None:
        counts = {name: sum(unit[0] == name for unit in self.scores) for name, _, _ in self.scores}
        for unit, value in self.scores.items():
            slope = gradient[unit]
            if self.soft is not None:
                sigma = 1.0 / (1.0 + math.exp(-value))
                slope += self.stage(step) * self.soft / len(counts) / counts[unit[0]] * sigma * (1.0 - sigma)
            if not self.adam:
                self.scores[unit] = value - LR * slope
                continue
            m, v = self.moments.get(unit, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope * slope
            self.moments[unit] = (m, v)
            n = step + 1
            self.scores[unit] = value - 0.01 * (m / (1 - 0.9**n)) / (math.sqrt(v / (1 - 0.999**n)) + 1e-8)

    def _choose(self, stage: float) -> None:
        for name in {unit[0] for unit in self.scores}:
            members = [unit for unit in self.scores if unit[0] == name]
            if self.soft is None:
                exact = round(len(members) * self.amount * stage, 9)
                gone = math.ceil(exact) if self.whole else math.floor(exact)
            else:
                gone = sum(1.0 / (1.0 + math.exp(-self.scores[unit])) <= stage * self.amount for unit in members)
            ordered = sorted(members, key=lambda unit: self.scores[unit])
            for rank, unit in enumerate(ordered):
                self.kept[unit] = rank >= min(gone, len(members) - 1)


# name -> (the granularity, which score a weight has, a strength of the regulariser at which some scores end below the threshold)
UNITS: dict[str, tuple[Any, Callable[[int, int, int], Unit | None], float]] = {
    "single weights": ("finegrained", lambda k, i, j: (f"{2 * k}.weight", i, j), 30.0),
    "rows": ("rows", lambda k, i, _: (f"{2 * k}.weight", i, 0), 12.0),
    "blocks": ((2, 2), lambda k, i, j: (f"{2 * k}.weight", i // 2, j // 2), 8.0),
    "channels": ("channels", lambda k, i, _: ("0", i, 0) if k == 0 else None, 6.0),
}


def pruner_of(model: nn.Module, granularity: Any, soft: float | None, amount: float, **options: Any) -> MovementPruner:
    """Returns the pruner that does what the reference does."""
    mode: dict[str, Any] = {} if soft is None else {"movement_mode": "soft", "regular_scale": soft}
    chosen = {"optimizer": sgd(model.parameters()), "score_optimizer": sgd, **mode, **options}
    return MovementPruner(
        model, config_of(amount), train, criterion=F.mse_loss, warm_up_step=WARM, cool_down_beginning_step=COOL,
        sparse_granularity=granularity, **chosen,
    )  # fmt: skip


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("kind", UNITS)
def test_scores_masks_and_weights_are_those_of_the_paper(kind: str, mode: str, adam: bool) -> None:
    """After 20 steps scores, masks and weights equal those of plain loops."""
    model, (granularity, unit, strength) = mlp(), UNITS[kind]
    soft, amount = (strength, 0.49) if mode == "soft" else (None, 0.6)
    reference = Reference(unit, soft, amount, whole=kind == "channels", adam=adam)
    weights = reference.run(model)
    pruner = pruner_of(model, granularity, soft, amount, **({"score_optimizer": None} if adam else {}))
    masked, masks = pruner.compress()
    for (name, i, j), score in reference.scores.items():
        found = pruner.scores[name]
        assert float(found[i] if found.dim() == 1 else found[i, j]) == pytest.approx(score, rel=1e-6, abs=1e-9)
    for name, weight in pruner.model.named_parameters():
        np.testing.assert_allclose(weight.detach().numpy(), weights[name], rtol=1e-6, atol=1e-10, err_msg=name)
    if isinstance(masks, gp.ElementMasks):
        assert all(np.array_equal(masks[f"{2 * k}.weight"].numpy(), reference.masks[k]) for k in (0, 1))
    else:
        assert masks["0"].tolist() == [reference.kept["0", i, 0] for i in range(SIZES[1])]
    assert 0.2 < np.mean(list(reference.kept.values())) < 0.8  # else there was little to compare
    assert all(bool((masked.get_parameter(f"{2 * k}.weight").detach().numpy()[reference.masks[k] == 0] == 0).all()) for k in (0, 1))


# -- the schedule ----------------------------------------------------------------------------------------------------------------------


def seen_masks(pruner_options: dict[str, Any]) -> list[Tensor]:
    """Returns which weights of the first layer are not zero in the forward pass of every step, as a trainer sees them."""
    seen = []

    def watching(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        for inputs, target in batches():
            weight: Any = model.get_submodule("0").weight
            seen.append(weight.detach() != 0)
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            optimizer.step()

    model = mlp()
    options: dict[str, Any] = {"warm_up_step": WARM, "cool_down_beginning_step": COOL, **pruner_options}
    MovementPruner(model, config_of(), watching, sgd(model.parameters()), F.mse_loss, **options).masks()
    return seen


def test_sparsity_follows_the_cubic_schedule_and_masks_stay_in_the_cool_down() -> None:
    """Step by step floor(n s_t) weights are masked, s_t = s (1 - (1 - (t - t_i) / (t_f - t_i))^3); some return, none in the cool-down."""
    seen = seen_masks({})
    numel = SIZES[0] * SIZES[1]
    for t, kept in enumerate(seen):
        expected = 0.0 if t < WARM else 0.6 * (1.0 - (1.0 - min((t - WARM) / (COOL - WARM), 1.0)) ** 3)
        assert int((~kept).sum()) == math.floor(round(numel * expected, 9)), t
    assert any(bool((after & ~before).any()) for before, after in itertools.pairwise(seen))
    assert all(torch.equal(seen[COOL], kept) for kept in seen[COOL:])


def test_the_schedule_is_agp_from_zero() -> None:
    """The stage of every step, times the sparsity, is that of automated gradual pruning."""
    pruner = pruner_of(mlp(), "finegrained", None, 0.6)
    for t in range(STEPS):
        assert 0.6 * pruner.stage(t) == pytest.approx(agp(t, WARM, COOL, 0.0, 0.6), abs=1e-12)
    pruner.masks()
    assert [(r.epoch, r.steps, r.stage) for r in pruner.history] == [(1, STEPS, 1.0)]


# -- how much goes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("granularity", "entry", "expected"),
    [
        ("finegrained", {"sparsity": 0.37}, {"0.weight": 17, "2.weight": 11}),
        ("rows", {"sparsity": 0.5}, {"0.weight": 4, "2.weight": 2}),
        ([4, 2], {"sparsity": 0.5}, {"0.weight": 3, "2.weight": 2}),
        ("finegrained", {"sparsity": 0.9, "max_sparsity_per_layer": 0.95}, {"0.weight": 43, "2.weight": 28}),
    ],
)
def test_hard_masks_remove_exactly_what_is_asked(granularity: Any, entry: dict[str, Any], expected: dict[str, int]) -> None:
    """Of n scores floor(n s) lose their weights, layer by layer."""
    model = mlp()
    options: dict[str, Any] = {"warm_up_step": 2, "cool_down_beginning_step": 10, "sparse_granularity": granularity}
    pruner = MovementPruner(model, [{**entry, "op_types": ["Linear"]}], train, sgd(model.parameters()), F.mse_loss, **options)
    pruner.masks()
    sizes = {name: score.numel() for name, score in pruner.scores.items()}
    assert {name: round(share * sizes[name]) for name, share in pruner.achieved.items()} == expected
    assert pruner.history[-1].sparsity == pytest.approx(sum(expected.values()) / sum(sizes.values()))


def test_a_total_sparsity_ranks_all_layers_together() -> None:
    """What goes are the lowest scores of both layers in one order, and no layer loses more than it may."""
    model = mlp()
    options: dict[str, Any] = {"warm_up_step": 2, "cool_down_beginning_step": 10}
    entry = {"total_sparsity": 0.5, "max_sparsity_per_layer": {"2": 0.25}, "op_types": ["Linear"]}
    pruner = MovementPruner(model, [entry], train, sgd(model.parameters()), F.mse_loss, **options)
    masks = pruner.masks()
    assert isinstance(masks, gp.ElementMasks)
    assert masks.sparsity == 0.5
    assert int((~masks["2.weight"]).sum()) <= 8
    for name, score in pruner.scores.items():
        assert float(score[masks[name]].min()) >= float(score[~masks[name]].max())


def test_soft_masks_follow_the_threshold_and_report_what_went() -> None:
    """Soft masks keep sigmoid(S) > threshold; a stronger regulariser removes more, and `achieved` says how much."""
    shares = []
    for scale in (1.0, 25.0):
        pruner = pruner_of(mlp(), "finegrained", scale, 0.49)
        masks = pruner.masks()
        for name, score in pruner.scores.items():
            assert torch.equal(torch.as_tensor(masks[name]), score.sigmoid() > 0.49)
            assert pruner.achieved[name] == pytest.approx(float((score.sigmoid() <= 0.49).double().mean()))
        shares.append(pruner.history[-1].sparsity)
    assert shares[0] < shares[1]


# -- channels --------------------------------------------------------------------------------------------------------------------------

PARTS = [{"sparsity": 0.5, "op_partial_names": ["attention.q", "attention.k", "attention.v", ".up"]}]


def small_transformer() -> ByteTransformer:
    """Returns two blocks of width 16 with four heads."""
    torch.manual_seed(0)
    return ByteTransformer(layers=2, width=16, heads=4, context=12)


def pieces(steps: int = 12) -> Batches:
    """Returns batches of a text that can be learned."""
    return Batches(torch.arange(400) * 7 % 50, steps, seed=1, size=4, context=12)


def test_heads_and_neurons_of_a_transformer_are_removed_physically() -> None:
    """Half of the heads and neurons go, those with the lowest scores, and the small model computes what the masked one does."""
    model = small_transformer()
    shape: dict[str, Any] = {"warm_up_step": 2, "cool_down_beginning_step": 8, "sparse_granularity": "auto"}
    pruner = MovementPruner(model, PARTS, optimizer=sgd(model.parameters()), data=pieces(), loss=next_byte, **shape)
    masked, masks = pruner.compress()
    small, report = gp.speedup(masked, masks, plan=pruner.plan)
    assert report.verified
    text = torch.arange(24).reshape(2, 12)
    torch.testing.assert_close(small(text), masked(text), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pruner.model(text), masked(text), rtol=1e-4, atol=1e-5)  # the cool-down trained that very function
    assert isinstance(small, ByteTransformer)
    assert isinstance(masks, gp.Masks)
    heads = [group for group in masks.graph if group.role == "block"]
    for group, block in zip(heads, small.blocks, strict=True):
        assert np.flatnonzero(masks[group.name]).tolist() == pruner.scores[group.name].topk(2).indices.sort().values.tolist()
        assert block.get_parameter("attention.q.weight").shape == (8, 16)
        assert block.get_parameter("up.weight").shape == (32, 16)
    asked = {group.name: group.requested for group in report.groups}
    assert asked["blocks.0.up"] == 0.5


def test_the_score_of_a_head_learns_from_all_weights_that_produce_it() -> None:
    """After one step the scores are -lr times the sums of gradient times weight over the rows of queries, keys and values of each head."""
    model, data = small_transformer(), pieces(1)
    shape: dict[str, Any] = {"cool_down_beginning_step": 1, "sparse_granularity": "channels", "score_optimizer": sgd}
    pruner = MovementPruner(model, PARTS, optimizer=sgd(model.parameters()), data=data, loss=next_byte, **shape)
    masks = pruner.masks()
    assert isinstance(masks, gp.Masks)
    plain = copy.deepcopy(model)
    text, following = next(iter(data))
    next_byte(plain(text), following).backward()
    products = {name: (p.grad * p).detach() for name, p in plain.named_parameters() if p.grad is not None}
    for number, group in enumerate(g for g in masks.graph if g.role == "block"):
        rows = [products[f"blocks.{number}.attention.{name}.weight"].reshape(4, -1).sum(1) for name in "qkv"]
        torch.testing.assert_close(pruner.scores[group.name], -LR * (rows[0] + rows[1] + rows[2]), rtol=1e-4, atol=1e-8)
        assert masks[group.name].tolist() == two_highest(pruner.scores[group.name])


def two_highest(scores: Tensor) -> list[bool]:
    """Returns which of four scores are the two highest."""
    return [bool(score >= scores.sort(descending=True).values[1]) for score in scores]


def test_a_masked_head_is_masked_in_all_weights_that_produce_it() -> None:
    """While masks still move, the rows of queries, keys and values of the same heads are zero, and biases and readers are not."""
    seen = []

    def watching(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        for text, following in pieces(8):
            layer: Any = model.get_submodule("blocks.0.attention")
            gone = [(part.weight == 0).reshape(4, -1).all(1).tolist() for part in (layer.q, layer.k, layer.v)]
            seen.append((gone, bool((layer.v.bias != 0).all() and (layer.o.weight != 0).all())))
            optimizer.zero_grad()
            criterion(model(text), following).backward()
            optimizer.step()

    model = small_transformer()
    shape: dict[str, Any] = {"sparse_granularity": "channels", "example_inputs": torch.zeros(1, 12, dtype=torch.int64)}
    MovementPruner(model, PARTS, watching, sgd(model.parameters()), next_byte, 2, 8, **shape).masks()
    assert all(q == k == v and rest for (q, k, v), rest in seen)
    assert sum(seen[-1][0][0]) == 2


def test_scores_in_front_of_a_batch_norm_learn_from_its_scales() -> None:
    """Gradient times weight of a row in front of a batch norm sums up to nothing, so scores come from the norm's scales."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)).double()
    with torch.no_grad():
        model.get_parameter("1.weight").uniform_(0.5, 1.5)
    images, target = torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    shape: dict[str, Any] = {"cool_down_beginning_step": 1, "sparse_granularity": "channels", "score_optimizer": sgd}
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    pruner = MovementPruner(model, config, optimizer=sgd(model.parameters()), data=[(images, target)], loss=F.mse_loss, **shape)
    masked, masks = pruner.compress()
    plain = copy.deepcopy(model).train()
    F.mse_loss(plain(images), target).backward()
    products = {name: (p.grad * p).detach() for name, p in plain.named_parameters() if p.grad is not None}
    assert products["0.weight"].sum((1, 2, 3)).abs().max() < 1e-3 * products["1.weight"].abs().max()
    torch.testing.assert_close(pruner.scores["0"], -LR * products["1.weight"])
    _, report = gp.speedup(masked, masks, images)
    assert report.verified


def test_counts_are_those_of_the_other_pruners() -> None:
    """With rounding and a total sparsity, groups are left with what the same config list gives other pruners."""
    model = small_transformer()
    shape: dict[str, Any] = {"warm_up_step": 0, "cool_down_beginning_step": 3, "sparse_granularity": "channels", "round_to": 8}
    config = [{"sparsity": 0.3, "op_partial_names": [".up"]}]
    pruner = MovementPruner(model, config, optimizer=sgd(model.parameters()), data=pieces(4), loss=next_byte, **shape)
    other = gp.L1NormPruner(model, config, example_inputs=torch.zeros(1, 12, dtype=torch.int64), round_to=8)
    masks = pruner.masks()
    assert {name: int(np.asarray(mask).sum()) for name, mask in masks.items()} == {n: int(m.sum()) for n, m in other.masks().items()}


def test_rows_that_went_in_all_coupled_layers_can_be_removed() -> None:
    """Masks of rows become those of channels, and the small model computes what the masked one does."""
    model = mlp()
    config = [{"sparsity": 0.5, "op_names": ["0"]}]
    options: dict[str, Any] = {"warm_up_step": 2, "cool_down_beginning_step": 10, "sparse_granularity": "rows"}
    masked, masks = MovementPruner(model, config, train, sgd(model.parameters()), F.mse_loss, **options).compress()
    small, report = gp.speedup(masked, masks, batches()[0][0])
    assert report.verified
    assert small.get_parameter("0.weight").shape == (4, 6)


# -- the user's model, optimizer and trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["finegrained", "channels"])
def test_the_users_model_and_optimizer_stay_as_they_are(granularity: str) -> None:
    """Nothing of the model or of the optimizer changes, and the trained copy has its classes and its order of parameters."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, F.mse_loss)
    optimizer.zero_grad()
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    pruner = pruner_of(model, granularity, None, 0.5, optimizer=optimizer)
    masked, _ = pruner.compress()
    assert not changes(before, snapshot(model))
    assert str(optimizer.state_dict()) == str(state)
    assert [name for name, _ in masked.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [type(module) for module in pruner.model.modules()] == [type(module) for module in model.modules()]


def accumulating(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """Two backward passes per step, each of half of the batch, behind one whose gradients are thrown away."""
    for inputs, target in batches():
        criterion(model(inputs * 3), target).backward()
        optimizer.zero_grad()
        for half in (slice(0, 5), slice(5, 10)):
            (criterion(model(inputs[half]), target[half]) / 2).backward()
        optimizer.step()


def scaling(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """Losses scaled as for half precision."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for inputs, target in batches():
        optimizer.zero_grad()
        scaler.scale(criterion(model(inputs), target)).backward()
        scaler.step(optimizer)
        scaler.update()


def closing(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """Steps that are given a closure."""
    for inputs, target in batches():

        def closure(inputs: Tensor = inputs, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(inputs), target)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("trainer", [accumulating, scaling, closing])
def test_scores_do_not_depend_on_how_the_trainer_is_written(trainer: Any) -> None:
    """Accumulated, scaled and closure-made gradients give the scores of the plain loop."""
    plain, other = (pruner_of(mlp(), "finegrained", None, 0.6) for _ in range(2))
    model = mlp()
    other = MovementPruner(
        model, config_of(), trainer, sgd(model.parameters()), F.mse_loss, WARM, COOL, score_optimizer=sgd
    )  # fmt: skip
    plain.masks()
    other.masks()
    for name, score in plain.scores.items():
        torch.testing.assert_close(other.scores[name], score, rtol=1e-9, atol=1e-12)


def test_line_searches_train_weights_and_scores() -> None:
    """LBFGS, which evaluates its closure several times per step, ends with exact masks and a lower loss."""
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=3)
    masked, masks = MovementPruner(model, config_of(0.25), closing, optimizer, F.mse_loss, 2, 10).compress()
    assert isinstance(masks, gp.ElementMasks)
    assert masks.sparsity == 0.25
    x, y = batches()[0]
    assert F.mse_loss(masked(x), y) < F.mse_loss(model(x), y) / 2


class Tied(nn.Module):
    """One weight that two layers share, the second transposed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 6) to the same shape."""
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def test_a_tied_weight_is_masked_wherever_it_is_used() -> None:
    """Both layers compute with the masked weight in training, and the masked copy has one weight still."""
    model = Tied().double()
    equal = []

    def watching(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        for inputs, _ in batches():
            first: Any = model.get_submodule("first").weight
            second: Any = model.get_submodule("second").weight
            equal.append((bool((first == second).all()), int((first == 0).sum())))
            optimizer.zero_grad()
            criterion(model(inputs), inputs).backward()
            optimizer.step()

    pruner = MovementPruner(model, config_of(0.5), watching, sgd(model.parameters()), F.mse_loss, 2, 8)
    masked, _ = pruner.compress()
    assert all(same for same, _ in equal)
    assert equal[-1][1] == 18
    assert masked.get_submodule("first").weight is masked.get_submodule("second").weight


# -- what cannot be used ---------------------------------------------------------------------------------------------------------------

SOUND: dict[str, Any] = {"trainer": train, "criterion": F.mse_loss, "warm_up_step": 2, "cool_down_beginning_step": 10}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cool_down_beginning_step": None}, "cool_down_beginning_step is None"),
        ({"cool_down_beginning_step": 2}, "cool_down_beginning_step is 2.*at least 3"),
        ({"warm_up_step": -1}, "warm_up_step is -1"),
        ({"movement_mode": "medium"}, "movement_mode is 'medium'"),
        ({"movement_mode": "soft"}, "regular_scale is None"),
        ({"regular_scale": 3.0}, "'hard' has no regulariser"),
        ({"movement_mode": "soft", "regular_scale": 1.0, "config_list": [{"total_sparsity": 0.1}]}, "compares every score"),
        ({"sparse_granularity": "row"}, "sparse_granularity is 'row'; did you mean 'rows'"),
        ({"sparse_granularity": (3, 4)}, "do not divide the weight of '0', which is"),
        ({"sparse_granularity": (0, 4)}, r"sparse_granularity is \(0, 4\)"),
        ({"round_to": 8}, "has no argument round_to="),
        ({"sparse_granularity": "channels", "aggregation": "sum"}, "has no argument aggregation="),
        ({"sparse_granularity": "channels", "mode": "normal"}, "has no mode 'normal'"),
        ({"training_steps": 3}, "has no argument training_steps="),
        ({"data": [1]}, "both a trainer and data"),
        ({"optimizer": None}, "has no optimizer"),
        ({"cool_down_beginning_step": 21}, "took 20 steps, but masks are final at step 21"),
        ({"score_optimizer": list}, "score_optimizer of MovementPruner returned a list"),
        ({"optimizer": lambda parameters: torch.optim.SGD(list(parameters)[:1])}, "masks '2.weight', which its optimizer does not hold"),
    ],
)
def test_unusable_arguments_are_refused_with_what_to_do(change: dict[str, Any], words: str) -> None:
    """Each error names the argument and what is wrong with it."""
    model = mlp()
    given = {"optimizer": sgd(model.parameters()), "config_list": config_of(), **SOUND, **change}
    with pytest.raises(gp.ConfigError, match=words):
        MovementPruner(model, given.pop("config_list"), **given).masks()


def test_epochs_that_end_too_early_are_warned_of_at_once() -> None:
    """Behind the first of several epochs a warning says that the cool-down will not be reached."""
    model = mlp()
    pruner = MovementPruner(model, config_of(), train, sgd(model.parameters()), F.mse_loss, 2, 41, training_epochs=2)
    with pytest.warns(UserWarning, match="the first of 2 epochs.*took 20 steps"), pytest.raises(gp.ConfigError, match="took 40 steps"):
        pruner.masks()


class Unused(nn.Module):
    """A layer whose output nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 6) to (n, 4)."""
        out: Tensor = self.used(x)
        return out


def test_weights_that_nothing_is_known_of_are_refused() -> None:
    """A weight without gradients, and one that its module reads past the mask, cannot be scored."""
    model = Unused().double()
    with pytest.raises(gp.ConfigError, match=r"no gradient reached 'idle\.weight'"):
        MovementPruner(model, config_of(), train, sgd(model.parameters()), F.mse_loss, 2, 10).masks()


def test_diverging_scores_are_reported() -> None:
    """Scores that are no longer finite end in an error that says so."""
    model = mlp()

    def infinite(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.SGD(parameters, lr=math.inf)

    with pytest.raises(gp.InputError, match=r"scores of '0\.weight' are not finite"):
        MovementPruner(model, config_of(), train, sgd(model.parameters()), F.mse_loss, 2, 10, score_optimizer=infinite).masks()


def test_the_text_is_the_same_every_time_and_predictions_follow_only_what_came_before() -> None:
    """Batches repeat, targets are inputs moved by one, and a later byte changes no earlier prediction."""
    one, two = list(pieces(3)), list(pieces(3))
    assert all(torch.equal(a, b) for first, second in zip(one, two, strict=True) for a, b in zip(first, second, strict=True))
    x, y = one[0]
    assert torch.equal(x[:, 1:], y[:, :-1])
    model, changed = small_transformer(), x.clone()
    changed[:, 6] = 255
    torch.testing.assert_close(model(changed)[:, :6], model(x)[:, :6])
    assert not torch.allclose(model(changed)[:, 6:], model(x)[:, 6:])
