"""Numbers that modules hold are found, compared and put back, wherever they hold them."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import graphprune as gp
from graphprune.surgery.numbers import changed_numbers, numbers_of, put_number


class Holder(nn.Module):
    """Holds numbers in every way that a recipe knows."""

    depth = 3

    def __init__(self) -> None:
        """Sets the numbers."""
        super().__init__()
        self.width, self.ratio, self.sizes, self.nested = 4, 0.5, (2, 5), [(1, 2), (3, 4)]
        self.config = SimpleNamespace(heads=2, inner=SimpleNamespace(width=7), name="x")
        self.table = {"groups": 6}
        self.made = functools.partial(torch.sum, dim=1)


class Heads(nn.Module):
    """Scores per head, whose number only a configuration object knows; the class knows a factor that scales nothing."""

    def __init__(self) -> None:
        """Builds the layers."""
        super().__init__()
        self.config = SimpleNamespace(heads=4, width=3)
        self.query, self.key, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns two numbers per place."""
        q, k = (layer(x).view(*x.shape[:2], self.config.heads, self.config.width) for layer in (self.query, self.key))
        scores: torch.Tensor = self.out((q * k).sum(-1))
        return scores


def test_numbers_are_found_by_their_way() -> None:
    """Attributes, sequences, configuration objects, dicts and partials; no text, and nothing of PyTorch's own but `training`."""
    found = numbers_of(Holder())[""]
    attributes = {"training": True, "width": 4, "ratio": 0.5, "sizes": [2, 5], "nested": [[1, 2], [3, 4]]}
    held = {"config.heads": 2, "config.inner.width": 7, "table.groups": 6, "made.dim": 1}
    assert {name: value for name, value in found.items() if not name.startswith("_")} == {**attributes, **held}
    json.dumps(found)


def test_changed_numbers_come_back() -> None:
    """What was changed in one module is found by comparison, survives JSON, and makes an untouched one equal, types included."""
    one, other = Holder(), Holder()
    before = numbers_of(one)
    one.width, one.sizes, one.nested, one.depth = 3, (1, 5), [(1, 1), (3, 4)], 2
    one.config.heads, one.config.inner.width, one.table["groups"], one.made.keywords["dim"] = 1, 5, 2, 0
    found = json.loads(json.dumps(changed_numbers(before, one)))
    assert set(found[""]) == {"width", "sizes", "nested", "depth", "config.heads", "config.inner.width", "table.groups", "made.dim"}
    assert all(put_number(other, way, value) for way, value in found[""].items())
    assert numbers_of(other) == numbers_of(one)
    assert (type(other.sizes), type(other.nested[0])) == (tuple, tuple)
    assert changed_numbers(numbers_of(one), one) == {}


def test_unknown_numbers_are_refused() -> None:
    """A way that leads nowhere changes nothing."""
    module = Holder()
    before: Any = copy.deepcopy(numbers_of(module))
    assert not any(put_number(module, way, 1) for way in ("height", "config.height", "settings.width"))
    assert numbers_of(module) == before


def test_configuration_objects_survive_the_way_to_disk(tmp_path: Path) -> None:
    """A model that kept its class because a configuration object was set right is loaded with that object set right."""
    torch.manual_seed(0)
    model, x = Heads().double(), torch.randn(2, 6, 5, dtype=torch.float64)
    small, report = gp.prune(model, x, 0.5)
    assert report.kind == "module"
    assert (small.config.heads, model.config.heads) == (2, 4)  # type: ignore[union-attr]
    gp.save(small, tmp_path / "small.safetensors")
    dense = Heads()
    loaded = gp.load(dense, tmp_path / "small.safetensors")
    assert (loaded.config.heads, dense.config.heads) == (2, 4)  # type: ignore[union-attr]
    assert torch.allclose(small(x), loaded(x), rtol=1e-12, atol=0)
