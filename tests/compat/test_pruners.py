"""Schedules and searches under their first names: results are today's, lottery tickets are rewound, and files hold what was trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune import compat
from tests.support.handmade import Residual, residual
from tests.support.noise import score, trainer
from tests.support.untouched import changes, snapshot

CONVS = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
DEFAULT = [{"sparsity": 0.5, "op_types": ["default"]}]
PLACES = [{"op_types": ["Conv2d"]}]
TICKETS = [{"sparsity": 0.75, "prune_iterations": 3, "op_types": ["Conv2d"]}]
ENTROPY = nn.CrossEntropyLoss()


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """Returns an optimizer that remembers more than the weights."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adam(parameters: Any) -> torch.optim.Optimizer:
    """Returns the optimizer that ADMM made for itself."""
    return torch.optim.Adam(parameters, lr=1e-3, weight_decay=5e-5)


def equal(one: tuple[nn.Module, Any], two: tuple[nn.Module, Any]) -> bool:
    """Returns whether models and masks are equal."""
    (a, masks), (b, others) = one, two
    states = a.state_dict(), b.state_dict()
    same = masks.keys() == others.keys() and all(np.array_equal(masks[n], others[n]) for n in masks)
    return same and states[0].keys() == states[1].keys() and all(torch.equal(t, states[1][n]) for n, t in states[0].items())


def pairs(model: nn.Module, x: Tensor) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Returns name -> (the pruner as it was called then, and as it is called today)."""
    sgd, data = momentum(model), [(x, torch.zeros(2, dtype=torch.long))]
    rho = [{**CONVS[0], "rho": 0.1}]
    admm = {"trainer": trainer, "optimizer": adam, "criterion": ENTROPY, "iterations": 2, "training_epochs": 1}
    norms = [{"total_sparsity": 0.3, "op_types": ["BatchNorm2d"]}]
    heat = {"start_temperature": 100, "stop_temperature": 20, "cool_down_rate": 0.5}
    return {
        "agp": (
            lambda: compat.AGPPruner(model, DEFAULT, sgd, trainer, ENTROPY, 3, 2),
            lambda: gp.AGPPruner(model, DEFAULT, "level", 3, trainer=trainer, optimizer=sgd, criterion=ENTROPY, training_epochs=2),
        ),
        "admm": (
            lambda: compat.ADMMPruner(model, CONVS, trainer, num_iterations=2, epochs_per_iteration=1, row=0.1, base_algo="level"),
            lambda: gp.ADMMPruner(model, rho, trainer, adam, ENTROPY, 2, 1),
        ),
        "admm of channels": (
            lambda: compat.ADMMPruner(model, CONVS, trainer, ENTROPY, 2, 1, 0.1, dummy_input=x),
            lambda: gp.ADMMPruner(model, rho, trainer, adam, ENTROPY, 2, 1, "coarse-grained", example_inputs=x),
        ),
        "slim": (
            lambda: compat.SlimPruner(model, [{"sparsity": 0.3, "op_types": ["BatchNorm2d"]}], sgd, trainer, ENTROPY, 2, 0.1),
            lambda: gp.SlimPruner(model, norms, trainer, sgd, ENTROPY, 2, 0.1, example_inputs=x),
        ),
        "annealing": (
            lambda: compat.SimulatedAnnealingPruner(model, CONVS, score, cool_down_rate=0.5, dummy_input=x),
            lambda: gp.SimulatedAnnealingPruner(model, CONVS, score, cool_down_rate=0.5, example_inputs=x),
        ),
        "netadapt": (
            lambda: compat.NetAdaptPruner(model, CONVS, None, score, sparsity_per_iteration=0.2, dummy_input=x),
            lambda: gp.NetAdaptPruner(model, CONVS, None, score, sparsity_per_iteration=0.2, example_inputs=x),
        ),
        "sensitivity": (
            lambda: compat.SensitivityPruner(model, CONVS, score, sparsity_per_iter=0.3, acc_drop_threshold=1e9, dummy_input=x),
            lambda: gp.SensitivityPruner(model, CONVS, score, sparsity_per_iter=0.3, acc_drop_threshold=1e9, example_inputs=x),
        ),
        "amc": (
            lambda: compat.AMCPruner(
                model, PLACES, lambda _, m: score(m), data, flops_ratio=0.6, n_points_per_layer=5, channel_round=2, train_episode=4,
                warmup=2, bsize=4, seed=3,
            ),
            lambda: gp.AMCPruner(
                4, model, PLACES, score, example_inputs=x, budget=gp.Budget(macs=0.4), round_to=2, max_sparsity=0.8, seed=3,
                ddpg_params={"warm_up": 2, "batch": 4}, reconstruct=gp.Reconstruction(data, 5, 60),
            ),
        ),
        "autocompress": (
            lambda: compat.AutoCompressPruner(
                model, CONVS, trainer, score, x, num_iterations=2, cool_down_rate=0.5, admm_num_iterations=2,
                admm_epochs_per_iteration=1, row=0.1,
            ),
            lambda: gp.AutoCompressPruner(model, rho, 2, admm, heat, evaluator=score, example_inputs=x),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(pairs(*residual())))
def test_results_are_those_of_today(name: str) -> None:
    """The arguments of that time give the model and the masks that today's give, bit for bit; the user's model is as it was."""
    model, x = residual()
    before = snapshot(model)
    then, now = pairs(model, x)[name]
    assert equal(then().compress(), now().compress())
    assert changes(before, snapshot(model)) == []


# -- trainers ------------------------------------------------------------------------------------------------------------------------


def test_trainers_are_told_the_epoch() -> None:
    """Epochs are counted from 0: by AGP through all iterations, by ADMM within each; a callback can be called."""
    model, x = residual()
    seen: list[int] = []

    def counting(model: nn.Module, criterion: Any, optimizer: Any, epoch: int, callback: Callable[[], None]) -> None:
        trainer(model, optimizer, criterion)
        callback()
        seen.append(epoch)

    compat.AGPPruner(model, DEFAULT, momentum(model), counting, ENTROPY, 2, 3).compress()
    assert seen == [0, 1, 2, 3, 4, 5]
    seen.clear()
    compat.ADMMPruner(model, CONVS, counting, None, 2, 3).compress()  # looks at one batch first, to find the groups
    assert seen == [0, 1, 2, 0, 1, 2]
    seen.clear()
    pruner = compat.TaylorFOWeightFilterPruner(model, CONVS, momentum(model), counting, ENTROPY, 2, dummy_input=x)
    assert equal(pruner.compress(), gp.TaylorFOWeightPruner(model, CONVS, trainer, momentum(model), ENTROPY, 2).compress())


def test_sensitivity_calls_with_the_arguments_of_compress() -> None:
    """The user's model among the arguments stands for the one at hand; where it is not among them, that comes first."""
    model, x = residual()
    how: dict[str, Any] = {"sparsity_per_iter": 0.3, "acc_drop_threshold": 1e9, "dummy_input": x}
    plain = compat.SensitivityPruner(model, CONVS, lambda m: 2 * score(m), **how)
    expected = plain.compress()
    tuned: list[nn.Module] = []

    def evaluator(factor: float, model: nn.Module, shift: float = 1.0) -> float:
        return factor * score(model) + shift

    pruner = compat.SensitivityPruner(model, CONVS, evaluator, lambda m, times: tuned.extend([m] * times), **how)
    found = pruner.compress(eval_args=[2.0, model], eval_kwargs={"shift": 0.0}, finetune_args=[3])
    assert equal(found, expected)
    assert [r.score for r in pruner.history] == [r.score for r in plain.history]
    assert len(tuned) == 3 * len(pruner.history)
    assert all(m is not model for m in tuned)
    assert pruner.evaluator is evaluator
    with pytest.raises(gp.ConfigError, match=r"resume_sensitivity.*Pass checkpoint_dir="):
        pruner.compress(resume_sensitivity="scores.csv")


def test_scores_are_kept_in_checkpoint_dir(tmp_path: Path) -> None:
    """A pruner that is made again with the same folder evaluates nothing again."""
    model, x = residual()
    calls: list[int] = []

    def evaluator(model: nn.Module) -> float:
        calls.append(1)
        return score(model)

    how: dict[str, Any] = {"sparsity_per_iter": 0.5, "acc_drop_threshold": 1e9, "checkpoint_dir": tmp_path, "dummy_input": x}
    first = compat.SensitivityPruner(model, CONVS, evaluator, **how).compress()
    count = len(calls)
    assert count > 3
    assert equal(compat.SensitivityPruner(model, CONVS, evaluator, **how).compress(), first)
    assert len(calls) == count


def test_annealing_returns_its_config_list() -> None:
    """`return_config_list` gives entries by which a one-shot pruner prunes alike."""
    model, x = residual()
    pruner = compat.SimulatedAnnealingPruner(model, CONVS, score, cool_down_rate=0.5, dummy_input=x)
    entries = pruner.compress(return_config_list=True)
    _, masks = gp.L1NormPruner(model, entries, x).compress()
    assert all(np.array_equal(masks[n], pruner.compress()[1][n]) for n in masks)


# -- lottery tickets -----------------------------------------------------------------------------------------------------------------


def test_a_ticket_is_rewound_in_place() -> None:
    """Before every round, weights are the first ones bit for bit where kept and 0 elsewhere; masks are nested, 1 - (1 - P)^(i/n)."""
    model, x = residual()
    start = copy.deepcopy(model.state_dict())
    optimizer = momentum(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    pruner = compat.LotteryTicketPruner(model, TICKETS, optimizer, scheduler)
    assert pruner.compress()[0] is model
    found = []
    for number in pruner.get_prune_iterations():
        pruner.prune_iteration_start()
        masks = pruner.compress()[1]
        for name, tensor in model.state_dict().items():
            kept = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
            assert torch.equal(tensor, start[name] * kept)
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.05
        sizes = {name: [int(round(mask.numel() * (1 - 0.25 ** (number / 3)), 9)), int((~mask).sum())] for name, mask in masks.items()}
        assert all(asked == gone for asked, gone in sizes.values())
        found.append(masks)
        trainer(model, optimizer, ENTROPY)
        scheduler.step()
        assert any((model.get_parameter(n)[mask] != start[n][mask]).any() for n, mask in masks.items()) or not number
        model(x)
        assert all(not model.get_parameter(n)[~mask].any() for n, mask in masks.items())
    assert [len(masks) for masks in found] == [0, 3, 3, 3]
    assert all(not (two[n] & ~one[n]).any() for one, two in itertools.pairwise(found[1:]) for n in two)
    with pytest.raises(gp.ConfigError, match=r"has had its 3 rounds.*get_prune_iterations"):
        pruner.prune_iteration_start()


def test_a_ticket_without_rewinding_goes_on(tmp_path: Path) -> None:
    """With reset_weights=False nothing is put back; what is exported is what was trained last, zero where masked, without hooks."""
    model, _ = residual()
    start = copy.deepcopy(model.state_dict())
    pruner = compat.LotteryTicketPruner(model, TICKETS, None, None, False)
    optimizer = momentum(model)
    with pytest.raises(gp.ConfigError, match=r"nothing to export yet.*prune_iteration_start"):
        pruner.export_model(tmp_path / "model.pth")
    for _ in pruner.get_prune_iterations():
        before = copy.deepcopy(model.state_dict())
        pruner.prune_iteration_start()
        _, masks = pruner.compress()
        assert all(torch.equal(t, before[n] * masks.get(n, torch.tensor(True))) for n, t in model.state_dict().items())
        trainer(model, optimizer, ENTROPY)
    pruner.export_model(tmp_path / "model.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert (state["stem.weight"] != start["stem.weight"]).all()
    assert all(not state[name][~mask].any() for name, mask in pruner.compress()[1].items())
    assert not any(module._forward_pre_hooks for module in model.modules())  # noqa: SLF001 (nothing public lists hooks)


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (CONVS, {}, r"config_list\[0\] .* has no 'prune_iterations'.*total_iteration="),
        ([{"prune_iterations": 3}], {}, "has no 'sparsity'|has no sparsity"),
        ([*TICKETS, {**TICKETS[0], "prune_iterations": 4}], {}, "2 values of prune_iterations.*all the same"),
        ([{**TICKETS[0], "prune_iterations": 0}], {}, "prune_iterations is 0"),
        ([{**TICKETS[0], "sparsity": 1.5}], {}, "1.5"),
        (3, {}, "is not a list of dicts"),
        (TICKETS, {"optimizer": None}, "to put the optimizer back, and has none.*reset_weights=False"),
    ],
)
def test_wrong_tickets_are_refused(config: Any, options: dict[str, Any], words: str) -> None:
    """A config list without rounds, and rewinding without an optimizer, are refused, and the model stays as it was."""
    model, _ = residual()
    before = snapshot(model)
    with pytest.raises(gp.ConfigError, match=words):
        compat.LotteryTicketPruner(model, config, **{"optimizer": momentum(model), **options})
    assert changes(before, snapshot(model)) == []


# -- files ---------------------------------------------------------------------------------------------------------------------------


def test_speedup_reads_what_was_exported(tmp_path: Path) -> None:
    """A fresh model with the exported weights and masks is shrunk in place to what `graphprune.speedup` makes of the masked one."""
    model, x = residual()
    pruner = compat.L1FilterPruner(model, CONVS, dummy_input=x)
    masked, masks = pruner.compress()
    pruner.export_model(tmp_path / "model.pth", tmp_path / "mask.pth")
    small, _ = gp.speedup(masked, masks)
    contents = torch.load(tmp_path / "mask.pth", weights_only=True)
    contents["inner"]["bias"] = None  # as NNI writes what has no bias
    for found in (tmp_path / "mask.pth", contents, masks):
        fresh = Residual(6, 4).double().eval()
        fresh.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
        first = fresh.stem.weight
        report = compat.ModelSpeedup(fresh, x, found, None, 0, 8).speedup_model()
        assert fresh.stem.weight is first
        assert fresh.stem.out_channels == 3
        assert report.error is not None
        assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in fresh.state_dict().items())


def test_speedup_of_single_weights_zeroes_them() -> None:
    """Channels go that have no weight left; other masked weights become zero, and the outputs are those of the masked model."""
    model, x = residual()
    flags = {"stem": {"weight": torch.ones_like(model.stem.weight)}}
    flags["stem"]["weight"][1] = 0
    flags["stem"]["weight"][2, 0] = 0
    masked = copy.deepcopy(model)
    masked.stem.weight.data *= flags["stem"]["weight"]
    flags["outer"] = {"weight": torch.ones_like(model.outer.weight)}
    flags["outer"]["weight"][1] = 0  # on one stream with the stem
    compat.ModelSpeedup(model, x, flags).speedup_model()
    assert model.stem.weight.shape[0] == 5
    assert torch.equal(model.stem.weight, masked.stem.weight[[0, 2, 3, 4, 5]])


def test_wrong_masks_are_refused(tmp_path: Path) -> None:
    """Files that hold no masks, masks of another model and replaced layers are refused, and the model stays as it was."""
    model, x = residual()
    before = snapshot(model)
    (tmp_path / "broken.pth").write_bytes(b"no masks")
    torch.save(torch.ones(1), tmp_path / "tensor.pth")
    for file in ("broken", "missing", "tensor"):
        with pytest.raises(gp.FileError, match="export_model"):
            compat.ModelSpeedup(model, x, tmp_path / f"{file}.pth")
    for found in ({"stem": 3}, {"stem": {"weight": torch.ones(3)}}, {"steam": {"weight": torch.ones(3)}}):
        with pytest.raises(gp.MaskError, match="ste"):
            compat.ModelSpeedup(model, x, found)
    with pytest.raises(gp.ConfigError, match=r"no use for customized_replace_func=.*Register a rule"):
        compat.ModelSpeedup(model, x, {}, customized_replace_func={})
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("single", [False, True], ids=["channels", "single weights"])
def test_what_was_trained_since_is_exported(tmp_path: Path, single: bool) -> None:
    """Files hold the weights of now, zero where masked, and ones and zeros per layer; both can be loaded without pickled code."""
    model, x = residual()
    pruner: Any = compat.LevelPruner(model, DEFAULT) if single else compat.L1FilterPruner(model, CONVS, dummy_input=x)
    with pytest.raises(gp.ConfigError, match=r"Pruner has nothing to export yet.*Call pruner.compress\(\) first"):
        pruner.export_model(tmp_path / "model.pth")
    masked, masks = pruner.compress()
    trainer(masked, momentum(masked), ENTROPY)
    trained = copy.deepcopy(masked.state_dict())
    pruner.export_model(tmp_path / "model.pth", tmp_path / "mask.pth")
    state, saved = (torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("model", "mask"))
    norms = {"stem_norm", "inner_norm", "outer_norm"}
    assert set(saved) == {"stem", "inner", "outer", "head"} | (set() if single else norms)
    for layer, own in saved.items():
        for name, mask in own.items():
            assert name in ("weight", "bias")
            assert torch.equal(mask, masks.for_module(layer)[name].float())
            assert torch.equal(state[f"{layer}.{name}"], trained[f"{layer}.{name}"] * mask)
            moved = bool((trained[f"{layer}.{name}"] * (1 - mask)).any())
            assert moved == (single and name == "weight")  # a channel without any weights takes no part in the training
    fresh = Residual(6, 4).double()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.eval()(x), masked.eval()(x))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mask.pth", "model.pth"]
    with pytest.raises(gp.FileError, match="cannot write"):
        pruner.export_model(tmp_path / "missing" / "model.pth")


def test_onnx_is_exported(tmp_path: Path) -> None:
    """With an input_shape there is an ONNX file that computes what the model does; without, an error."""
    model = Residual(6, 4)
    pruner = compat.LevelPruner(model, DEFAULT)
    pruner.compress()
    with pytest.raises(gp.ConfigError, match=r"onnx_path and no input_shape.*Pass input_shape="):
        pruner.export_model(tmp_path / "model.pth", onnx_path=tmp_path / "model.onnx")
    pruner.export_model(tmp_path / "model.pth", None, tmp_path / "model.onnx", (2, 3, 4, 4))
    session = pytest.importorskip("onnxruntime").InferenceSession(str(tmp_path / "model.onnx"))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = pruner.compress()[0].eval()(x)
    assert torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]).allclose(expected, atol=1e-5)


def test_a_shrunk_model_is_exported_as_it_is(tmp_path: Path) -> None:
    """AutoCompress returns a smaller model, whose state dict is written; the masks are those of the original one."""
    model, x = residual()
    pruner = compat.AutoCompressPruner(
        model, CONVS, trainer, score, x, num_iterations=1, cool_down_rate=0.3, admm_num_iterations=1, admm_epochs_per_iteration=1
    )
    small, masks = pruner.compress()
    pruner.export_model(tmp_path / "model.pth", tmp_path / "mask.pth")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in small.state_dict().items())
    assert state["stem.weight"].shape[0] == int(masks["stem"].sum()) < 6
    assert torch.load(tmp_path / "mask.pth", weights_only=True)["stem"]["weight"].shape == model.stem.weight.shape
