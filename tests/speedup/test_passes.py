"""How often one `gp.prune` runs a network: every pass is counted, also those that go along a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import graphprune as gp
from graphprune.verify.replay import MaskedModel
from tests.support.operators import filled, normal
from tests.support.torchvision_shim import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Auxiliary(nn.Module):
    """A network with a head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head, self.auxiliary = (nn.Conv2d(*n, 1) for n in ((3, 8), (8, 6), (6, 4), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns scores, with those of the other head in training."""
        x = self.stem(x).relu()
        scores: Tensor = self.head(self.middle(x).relu()).mean((2, 3))
        return scores + self.auxiliary(x).mean((2, 3)) if self.training else scores


class Cached(nn.Module):
    """A network that keeps a table that it computes from its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.bias = nn.Parameter(torch.zeros(8))
        self.tables: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Returns scores."""
        if "bias" not in self.tables:
            self.tables["bias"] = self.bias * 2
        scores: Tensor = self.head((self.stem(x) + self.tables["bias"]).relu())
        return scores


def warm(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """Returns a model that has run once."""
    with torch.no_grad():
        model(*inputs)
    return model


def vision_transformer() -> nn.Module:
    """Returns a small transformer whose code computes the width of heads."""
    kind: Any = import_torchvision().models.VisionTransformer
    return filled(kind(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4).double())


def convolutions() -> nn.Module:
    """Returns a residual network."""
    return filled(import_torchvision().models.resnet18(weights=None).double())


PASSES: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any], int]] = {
    "convolutions": (convolutions, normal(1, 3, 32, 32), {}, 4),
    "a budget": (convolutions, normal(1, 3, 32, 32), {"budget": gp.Budget(macs=0.5)}, 4),
    "a ranking under a budget": (convolutions, normal(1, 3, 32, 32), {"budget": gp.Budget(params=0.5), "mode": "global"}, 4),
    "arithmetic on sizes": (vision_transformer, normal(1, 3, 16, 16), {}, 5),
    "the class kept": (vision_transformer, normal(1, 3, 16, 16), {"keep_class": True}, 5),
    "a head in training only": (lambda: filled(Auxiliary()), normal(2, 3, 5, 5), {}, 5),
    "a cache": (lambda: warm(filled(Cached()), normal(3, 6)), normal(3, 6), {}, 5),
    "no verification": (convolutions, normal(1, 3, 32, 32), {"verify": False}, 2),
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields what is appended to at every pass: the class of the outermost module, or "masked" for one along a recording."""
    seen: list[str] = []
    roots: set[type] = set()

    def entered(module: nn.Module, _args: object) -> None:
        if not roots:
            roots.add(type(module))
        if type(module) in roots:
            seen.append(type(module).__name__)

    original = MaskedModel.outputs

    def masked(*args: Any, **kwargs: Any) -> list[Tensor]:
        seen.append("masked")
        return original(*args, **kwargs)

    monkeypatch.setattr(MaskedModel, "outputs", masked)
    handle = register_module_forward_pre_hook(entered)
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", PASSES)
def test_passes_of_one_pruning(name: str, passes: list[str]) -> None:
    """The original is recorded, run masked, and the result is run and recorded; whatever else is needed is one pass each."""
    make, inputs, options, expected = PASSES[name]
    model = make().eval()
    passes.clear()
    small, report = gp.prune(model, inputs, **options)
    assert len(passes) == expected, passes
    assert passes.count("masked") == (1 if options.get("verify", True) else 0)
    assert type(small) is type(model)
    if options.get("verify", True):
        assert report.error < 1e-9 < report.effect
        assert report.before == gp.count(model, inputs)
        assert report.after == gp.count(small, inputs)


def test_speedup_of_a_model_that_changed_runs_it_again(passes: list[str]) -> None:
    """What the recording gave counts for `prune` alone: between `trace` and `speedup` anything may have happened to the weights."""
    model, inputs = convolutions().eval(), normal(1, 3, 32, 32)
    graph = gp.trace(model, inputs)
    masks = gp.Masks(graph, {graph.groups[0].name: torch.arange(graph.groups[0].channels).numpy() % 2 == 0})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
    passes.clear()
    _, report = gp.speedup(model, masks)
    assert len(passes) == 4
    assert report.error < 1e-9 < report.effect
