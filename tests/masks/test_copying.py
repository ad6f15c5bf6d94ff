"""Copies of modules are what `copy.deepcopy` makes."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from graphprune.masks.copying import copied
from tests.support.operators import filled, normal


class Odd(nn.Module):
    """Holds what modules may hold: shared and nested containers, itself, its parent, hooks, slots of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Softmax(1), nn.MultiheadAttention(4, 2))
        self.again = self.inner[0]
        self.weight = self.inner[0].weight
        self.shared: dict[str, Any] = {}
        self.other = self.shared
        self.config = SimpleNamespace(width=4, owner=self, table={"a": [1, 2]})
        self.listed = [self.inner[1], "text", (1, 2.5)]
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.state: Tensor | None = None
        self.inner[0].register_forward_hook(_note)

    def forward(self, x: Tensor) -> Tensor:
        """Returns scores."""
        made: Tensor = self.inner[1](self.inner[0](x)) * self.scale
        self.state = made
        return made


def _note(module: nn.Module, _args: object, output: Tensor) -> Tensor:
    """Changes nothing much."""
    return output + module.weight.sum() * 0  # type: ignore[operator]


class Closed(nn.Linear):
    """Says how it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Closed:
        made = Closed(self.in_features, self.out_features, dtype=self.weight.dtype)
        made.load_state_dict(self.state_dict())
        made.copies = getattr(self, "copies", 0) + 1  # type: ignore[assignment]
        return made


class Stated(nn.Linear):
    """Says what of it is kept."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": True}


def network() -> Any:
    """Returns a network of all of these."""
    parts = [Odd(), Closed(4, 4), Stated(4, 4), parametrizations.orthogonal(nn.Linear(4, 4))]
    return filled(nn.Sequential(OrderedDict((f"part{i}", part) for i, part in enumerate(parts))).double()).eval()


def same(a: Any, b: Any, pairs: dict[int, int]) -> bool:
    """Returns whether two values have one structure, with the same sharing, and share no tensor or module."""
    if id(a) in pairs or type(a) is not type(b):
        return pairs.get(id(a)) == id(b)
    if isinstance(a, Tensor):
        pairs[id(a)] = id(b)
        return a is not b and torch.equal(a, b) and a.requires_grad == b.requires_grad
    if isinstance(a, (nn.Module, SimpleNamespace)):
        pairs[id(a)] = id(b)
        return a is not b and same(vars(a), vars(b), pairs)
    if isinstance(a, dict):
        pairs[id(a)] = id(b)
        return list(a) == list(b) and all(same(a[key], b[key], pairs) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, pairs) for x, y in zip(a, b, strict=True))
    return a is b or a == b or type(a).__module__.startswith("torch")


def test_a_copy_is_a_deep_copy() -> None:
    """Attributes, containers, hooks, shared and tied parts are as in the original; classes that copy themselves do so, once."""
    model = network()
    mine: Any = copied(model, {})
    theirs = copy.deepcopy(model)
    assert same(theirs, mine, {})
    assert mine.part0.weight is not model.part0.weight
    assert mine.part0.inner is not model.part0.inner
    assert mine.part1.copies == theirs.part1.copies == 1
    assert mine.part2.kept
    assert mine.part0.again is mine.part0.inner[0]
    assert mine.part0.weight is mine.part0.again.weight
    assert mine.part0.shared is mine.part0.other
    assert mine.part0.config.owner is mine.part0
    assert mine.part0.listed[0] is mine.part0.inner[1]
    inputs = normal(3, 4)
    assert torch.equal(mine(inputs), model(inputs))
    mine.part0.shared["x"] = 1
    assert not model.part0.shared
    pickle.loads(pickle.dumps(mine.part0.inner))  # noqa: S301 (our own bytes)


def test_given_tensors_stand_in_the_copy() -> None:
    """A parameter that stands in several places is replaced in all of them."""
    model = network()
    instead = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    made: Any = copied(model, {id(model.part0.weight): instead})
    assert made.part0.weight is made.part0.inner[0].weight is made.part0.again.weight is instead


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_results_of_computations_are_detached() -> None:
    """What a model kept from its last run is copied by value; `copy.deepcopy` refuses it."""
    model = network()
    model.part0(normal(3, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    made: Any = copied(model, {})
    assert torch.equal(made.part0.state, model.part0.state)
    assert made.part0.state.is_leaf
    old: Any = weight_norm(nn.Linear(4, 4))
    pruned: Any = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    for layer in (old, pruned):
        layer(torch.ones(1, 4))
        again: Any = copied(layer, {})
        assert torch.equal(again.weight, layer.weight)
        assert torch.equal(again(torch.ones(1, 4)), layer(torch.ones(1, 4)))
