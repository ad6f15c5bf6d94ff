"""Randomised networks have nothing that cancels by accident, and keep their activations in range."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.invariants import evaluate
from tests.support.measure import lifeless
from tests.support.networks import build, call, cast, load, load_randomised, randomise
from tests.support.outputs import relative_error
from tests.support.untouched import changes, snapshot
from tests.support.zoo_sources import Blueprint, images


def values(model: nn.Module) -> list[list[float]]:
    """Returns the entries of every tensor."""
    return [tensor.flatten().tolist() for tensor in model.state_dict().values()]


class Layers(nn.Module):
    """One layer of each kind that has degenerate initial values."""

    def __init__(self) -> None:
        """Builds the layers, a layer scale and a zeroed matrix."""
        super().__init__()
        self.conv, self.batch = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.group, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.decay = nn.Parameter(torch.arange(1.0, 5.0).repeat(8, 1))
        self.scale, self.token = nn.Parameter(torch.full((8, 1, 1), 1e-6)), nn.Parameter(torch.zeros(1, 1, 8))
        self.head = nn.Linear(8, 4)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns four logits per image."""
        x = self.group(self.batch(self.conv(images))) * self.scale
        logits: torch.Tensor = self.head(self.layer(x.mean((2, 3))) + self.token[0])
        return logits


def test_randomise_leaves_no_tensor_degenerate() -> None:
    """Every tensor has spread entries, scales are away from 0, and statistics follow the activations without being them."""
    torch.manual_seed(0)
    model, images = Layers().double(), 5 + 3 * torch.randn(16, 3, 8, 8, dtype=torch.float64)
    randomise(model, 0, images)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            assert tensor.std() > 1e-2, name
    assert model.scale.abs().min() >= 0.5
    assert float(model.decay.detach().std(dim=0).min()) > 1e-2, "rows that are all the same look the same under any permutation"
    seen = model.conv(images).detach().transpose(0, 1).flatten(1)
    assert model.batch.running_mean is not None
    assert model.batch.running_var is not None
    factor = model.batch.running_var / seen.var(1)
    assert bool(((factor > 0.69) & (factor < 1.31)).all())
    assert float((factor - 1).abs().max()) > 0.05
    shift = (model.batch.running_mean - seen.mean(1)).abs()
    assert bool((shift < 0.3 * seen.mean(1).abs() + 0.5 * seen.std(1)).all())


def test_randomise_keeps_default_initialisation_where_it_is_random() -> None:
    """Convolution weights stay as they were built."""
    model = Layers()
    before = model.conv.weight.detach().clone()
    randomise(model, 0)
    assert torch.equal(model.conv.weight, before)


def test_randomise_is_reproducible_and_leaves_flags_and_random_state() -> None:
    """The same seed gives the same tensors, another seed others; training flags, hooks and the global random state stay."""
    torch.manual_seed(0)
    fresh, images = Layers(), torch.randn(2, 3, 8, 8)
    fresh.group.eval()
    model, again, other = copy.deepcopy(fresh), copy.deepcopy(fresh), copy.deepcopy(fresh)
    before = snapshot(model)
    randomise(model, 1, images)
    assert all(path.startswith("/tensors/") for path in changes(before, snapshot(model)))
    assert values(randomise(again, 1, images)) == values(model)
    assert values(randomise(other, 2, images)) != values(model)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_built_network_depends_on_its_input_within_range(name: str) -> None:
    """The output spread lies between 1e-3 and 1e3 and differs from image to image; the same seed builds the same network."""
    network = load_randomised(f"torchvision:{name}")
    (output,) = evaluate(network.model, network.make_inputs(2))
    assert output.dtype == torch.float64
    assert 1e-3 < float(output.std()) < 1e3
    assert relative_error([output[:1]], [output[1:]]) > 1e-2
    again = load_randomised(f"torchvision:{name}").model
    assert torch.equal(output, evaluate(again, network.make_inputs(2))[0])


def test_build_takes_size_and_dtype() -> None:
    """Images have the size that was asked for, and the same batch size gives the same images."""
    model, make_inputs = build("torchvision:squeezenet1_1", size=64, dtype=torch.float64)
    assert make_inputs(3).shape == (3, 3, 64, 64)
    assert torch.equal(make_inputs(3), make_inputs(3))
    assert next(model.parameters()).dtype == torch.float64
    assert not model.training


def test_the_smallest_size_that_a_network_accepts_is_taken() -> None:
    """Sizes are tried in order, a refusal leads to the next, and the last is taken unseen; training inputs may differ."""
    seen: list[int] = []

    class Picky(nn.Module):
        """Takes images of 24 pixels and more."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns its input."""
            seen.append(x.shape[-1])
            if x.shape[-1] < 24:
                message = "too small"
                raise ValueError(message)
            return x

    plan = Blueprint(Picky, tuple((3, size, size) for size in (8, 16, 24, 32)), images, lambda *_: "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.networks.blueprint", lambda *_: plan)
        network = load("any:name", dtype=torch.float64)
    assert seen == [8, 16, 24]
    assert network.make_inputs(2).shape == (2, 3, 24, 24)
    assert network.make_inputs(2).dtype == torch.float64
    assert network.make_training_inputs(2) == "other"


def test_cast_changes_nested_doubles_only() -> None:
    """Lists, tuples and dicts keep their form, integers and narrower numbers their type."""
    ids, mask = torch.arange(3), torch.ones(2, dtype=torch.float64)
    (first, more), options = cast((([mask], mask), {"ids": ids, "scale": 2.0, "half": mask.half()}), torch.float32)
    assert first[0].dtype == more.dtype == torch.float32
    assert options["half"].dtype == torch.float16
    assert options["ids"].dtype == torch.int64
    assert options["scale"] == 2.0


@pytest.mark.parametrize("name", ["timm:test_vit", "transformers:swin", "transformers:mamba", "torchvision:ssdlite320_mobilenet_v3_large"])
def test_outputs_of_every_source_are_alive(name: str) -> None:
    """No output is empty, constant or without end, and it depends on the input: a detector has boxes to compare."""
    network = load_randomised(name)
    outputs, others = evaluate(network.model, network.make_inputs(2)), evaluate(network.model, network.make_inputs(3))
    assert not any(map(lifeless, outputs))
    assert relative_error(outputs[:1], [others[0][: len(outputs[0])]]) > 1e-2


@pytest.mark.parametrize("output", [torch.ones(0, 4), torch.full((3,), torch.nan), torch.ones(2, 2)])
def test_lifeless_outputs_are_known(output: torch.Tensor) -> None:
    """Nothing, no number, and the same number everywhere say nothing."""
    assert lifeless(output)
    assert not lifeless(torch.arange(4.0))


@pytest.mark.parametrize(
    "name", ["resnet18", "torchvision:", "torchvision:no_such_network", "other:resnet18", "timm:none", "transformers:x"]
)
def test_build_rejects_unknown_names(name: str) -> None:
    """A name of another form, or of no network, is a ValueError."""
    with pytest.raises(ValueError, match=r"names look like|Unknown model"):
        build(name)


def test_call_takes_every_form_of_inputs() -> None:
    """A tensor, a tuple, a dict and (args, kwargs) all arrive as the forward's arguments."""

    class Difference(nn.Module):
        """Subtracts its arguments."""

        def forward(self, a: torch.Tensor, b: torch.Tensor | float = 1.0) -> torch.Tensor:
            """Returns a - b."""
            return a - b

    one, two = torch.ones(1), torch.full((1,), 2.0)
    forms = [one, (one,), (one, two), {"a": one, "b": two}, ((one,), {"b": two}), ((), {"a": two, "b": one})]
    results = [call(Difference(), form) for form in forms]
    assert [float(r) for r in results if isinstance(r, torch.Tensor)] == [0.0, 0.0, -1.0, -1.0, -1.0, 1.0]
