"""Options are the same ones everywhere: one spelling, one check, and a suggestion for what is misspelt."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.pruners import options
from tests.support.handmade import residual

CONVS = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
NORMS = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
PRUNERS = [name for name in gp.__all__ if name.endswith("Pruner") and name != "Pruner"]


def trainer(model: nn.Module, optimizer: Any, criterion: Any) -> None:
    """Trains for one step."""
    optimizer.zero_grad()
    criterion(model(residual()[1]), torch.zeros(2, dtype=torch.long)).backward()
    optimizer.step()


def make(name: str, **given: Any) -> Any:
    """Makes a pruner with as little as it needs, and options."""
    model, _ = residual()
    training = (trainer, lambda p: torch.optim.SGD(p, lr=0.01), nn.CrossEntropyLoss())
    own: dict[str, tuple[Any, ...]] = {
        "ADMMPruner": training,
        "ActivationAPoZRankPruner": training,
        "ActivationMeanRankPruner": training,
        "AutoCompressPruner": (1, dict(zip(("trainer", "optimizer", "criterion"), training, strict=True)), {"evaluator": len}),
        "MovementPruner": (*training, 0, 1),
        "NetAdaptPruner": (None, lambda _: 0.0),
        "SensitivityPruner": (lambda _: 0.0,),
        "SimulatedAnnealingPruner": (lambda _: 0.0,),
        "SlimPruner": training,
        "TaylorFOWeightPruner": training,
    }
    entries = NORMS if name == "SlimPruner" else CONVS
    if name == "AMCPruner":
        return gp.AMCPruner(1, model, entries, lambda _: 0.0, **given)
    return getattr(gp, name)(model, entries, *own.get(name, ()), **given)


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_takes_example_inputs(name: str) -> None:
    """All take them by that name, and one that is misspelt is told so."""
    with pytest.raises(gp.ConfigError, match=f"{name} has no argument example_input=; did you mean 'example_inputs'"):
        make(name, example_input=residual()[1])
    with pytest.raises(gp.GraphPruneError, match=r"Residual cannot|example inputs"):
        make(name, example_inputs=torch.zeros(1, 99))


@pytest.mark.parametrize("name", PRUNERS)
def test_what_other_versions_call_otherwise_is_named(name: str) -> None:
    """`dummy_input` is refused by every pruner, in words that say what to write."""
    with pytest.raises(gp.ConfigError, match=f"{name} has no argument dummy_input=. Write example_inputs="):
        make(name, dummy_input=residual()[1])


def test_every_option_is_described_once() -> None:
    """Each stands in the docstring of one record of `pruners.options`, the one that it belongs to."""
    records: list[Any] = [found for found in vars(options).values() if typing.is_typeddict(found)]
    texts = "".join(record.__doc__ for record in records)
    names = {name for record in records for name in record.__annotations__}
    assert {name: texts.count(f"\n        {name}: ") for name in names} == dict.fromkeys(names, 1)


def test_functions_suggest_the_nearest_name_too() -> None:
    """What takes the same options without being a pruner checks them alike, its own parameters included."""
    model, x = residual()
    with pytest.raises(gp.ConfigError, match="prune has no argument sparsty=; did you mean 'sparsity'"):
        gp.prune(model, x, sparsty=0.5)  # type: ignore[call-arg]  # misspelt on purpose
    with pytest.raises(gp.ConfigError, match="Objective has no argument max_sparsty=; did you mean 'max_sparsity'"):
        gp.Objective(model, x, lambda _: 0.0, max_sparsty=0.5)  # type: ignore[call-arg]  # likewise
    with pytest.raises(gp.ConfigError, match="sensitivity has no argument proceses=; did you mean 'processes'"):
        gp.sensitivity(model, x, lambda _: 0.0, proceses=2)  # type: ignore[call-arg]  # likewise
    with pytest.raises(gp.ConfigError, match=r"sensitivity has no argument mode=. Leave it out: an analysis prunes one group at a time"):
        gp.sensitivity(model, x, lambda _: 0.0, mode="global")  # type: ignore[call-arg]  # likewise


def test_names_are_suggested_and_former_ones_explained() -> None:
    """A sentence is said as it is, anything else after "Write"; where nothing is near, all options are listed."""

    def caller(model: object, *, sparsity: float) -> None:
        del model, sparsity

    options.check_names(caller, ["data", "loss"], options.DataOptions)
    for name, fix in (("dta", "; did you mean 'data'"), ("zzz", "Use data, loss"), ("old", "Write new="), ("gone", "Leave it out")):
        with pytest.raises(gp.ConfigError, match=f"caller has no argument {name}={fix if fix[0] == ';' else f'. {fix}'}"):
            options.check_names(caller, [name], options.DataOptions, {"old": "new=", "gone": "Leave it out"})
    with pytest.raises(gp.ConfigError, match=r"caller has no argument data=. Write nothing"):
        options.check_names(caller, ["data"], options.DataOptions, {"data": "nothing"})
    with pytest.raises(gp.ConfigError, match=r"caller is given 2 positional arguments more than it takes. Write options by name"):
        options.check_names(caller, [], options.DataOptions, surplus=(1, 2))
    with pytest.raises(gp.ConfigError, match=r"caller has no argument old=. Write new="):
        options.check_names(caller, [], options.DataOptions, {"old": "new="}, surplus=(1,), order=("old",))
