"""`assert_invariants` passes on a tiny engine that is right, and fails on each way in which an engine can be wrong."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.handmade import Graph, Residual, residual, residual_graph, shrink_by_hand, without_slice
from tests.support.invariants import assert_invariants

if TYPE_CHECKING:
    from collections.abc import Callable

Engine = SimpleNamespace
STREAM, BLOCK = [0, 2, 5], [1, 2]


def engine() -> Engine:
    """Returns a stand-in for graphprune that knows the one network, and keeps the same channels whatever is asked."""

    class Pruner:
        """Gives the masks."""

        def __init__(self, *_: object, **__: object) -> None:
            """Takes anything."""

        def masks(self) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
            """Returns the masks."""
            return {"stem": np.isin(np.arange(6), STREAM), "inner": np.isin(np.arange(4), BLOCK)}

    def trace(_model: nn.Module, _inputs: object) -> Graph:
        return residual_graph()

    def prune(model: Residual, _inputs: object, sparsity: float) -> tuple[nn.Module, SimpleNamespace]:
        small = shrink_by_hand(model, STREAM, BLOCK) if sparsity else copy.deepcopy(model)
        return small, SimpleNamespace(error=1e-15, effect=0.5)

    return Engine(trace=trace, prune=prune, L1NormPruner=Pruner)


def after_prune(right: Engine, change: Callable[[Residual, Any], object]) -> Engine:
    """Returns the engine whose `prune` does something more to (the input model, the pruned model)."""

    def prune(model: Residual, inputs: object, sparsity: float) -> tuple[nn.Module, SimpleNamespace]:
        small, report = right.prune(model, inputs, sparsity)
        change(model, small)
        return small, report

    return Engine(trace=right.trace, prune=prune, L1NormPruner=right.L1NormPruner)


def test_right_engine_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every invariant holds, and the findings say by how much."""
    monkeypatch.setitem(sys.modules, "graphprune", engine())
    findings = assert_invariants(*residual())
    assert findings.permutation_error < 1e-13
    assert findings.reference_error < 1e-13
    assert findings.control > 1e-3
    assert isinstance(findings.small, Residual)


def scale_head(small: nn.Module, factor: float) -> None:
    """Multiplies the classifier's weight."""
    with torch.no_grad():
        small.get_parameter("head.weight").mul_(factor)


def cut_head(small: Any) -> None:
    """Gives the classifier four outputs."""
    small.head = nn.Linear(small.head.in_features, 4).double()


def break_training(small: nn.Module) -> None:
    """Lets the forward fail in train mode only."""

    def refuse(module: nn.Module, _arguments: object) -> None:
        if module.training:
            message = "no training"
            raise RuntimeError(message)

    small.register_forward_pre_hook(refuse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, small: scale_head(small, 1 + 1e-12), "removing nothing changes"),
        (lambda _, small: scale_head(small, 1 + 1e-6) if small.stem.out_channels < 6 else None, "differs from the reference"),
        (lambda _, small: cut_head(small) if small.stem.out_channels < 6 else None, "output shapes"),
        (lambda model, _: model.stem_norm.train(), "was changed at /attributes/stem_norm/training"),
        (lambda model, _: model.head.weight.requires_grad_(False), "was changed at /requires_grad/head.weight"),
        (lambda *_: torch.rand(1), "was changed at /random state"),
    ],
)
def test_wrong_pruning_fails(monkeypatch: pytest.MonkeyPatch, change: Callable[[Residual, Any], object], message: str) -> None:
    """A pruned network that is off, of another shape, or not left alone is found."""
    monkeypatch.setitem(sys.modules, "graphprune", after_prune(engine(), change))
    with pytest.raises(AssertionError, match=message):
        assert_invariants(*residual())


def test_network_that_cannot_be_trained_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of the train-mode forward is passed on."""
    monkeypatch.setitem(sys.modules, "graphprune", after_prune(engine(), lambda _, small: break_training(small)))
    with pytest.raises(RuntimeError, match="no training"):
        assert_invariants(*residual())


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (without_slice(residual_graph(), 0, 0), "permuting channels"),
        (Graph(residual_graph().groups, residual_graph().frozen[1:]), "stem.weight dim 1: 3 of 3 positions"),
        (Graph((), residual_graph().frozen), "permutation test is blind"),
    ],
)
def test_wrong_graph_fails(monkeypatch: pytest.MonkeyPatch, graph: Graph, message: str) -> None:
    """A slice left out, a position that is in nothing, and a graph without groups are found."""
    wrong = engine()
    wrong.trace = lambda *_: graph
    monkeypatch.setitem(sys.modules, "graphprune", wrong)
    with pytest.raises(AssertionError, match=message):
        assert_invariants(*residual())


@pytest.mark.parametrize(("report", "message"), [({"error": 1e-8}, "masked one"), ({"effect": 1e-4}, "no effect")])
def test_bad_report_fails(monkeypatch: pytest.MonkeyPatch, report: dict[str, float], message: str) -> None:
    """What the engine's own report admits is taken at its word."""
    right = engine()

    def prune(model: Residual, inputs: object, sparsity: float) -> tuple[nn.Module, SimpleNamespace]:
        small, good = right.prune(model, inputs, sparsity)
        return small, SimpleNamespace(**{**vars(good), **report})

    monkeypatch.setitem(sys.modules, "graphprune", Engine(trace=right.trace, prune=prune, L1NormPruner=right.L1NormPruner))
    with pytest.raises(AssertionError, match=message):
        assert_invariants(*residual())
