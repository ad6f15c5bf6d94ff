"""Tensors that are tied by memory alone: two parameters, or a parameter and a buffer, which are views of one storage under two names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.speedup import speedup as surgery
from tests.support.invariants import evaluate, train_step
from tests.support.untouched import changes, snapshot

TIED = {"two.weight": "one.weight", "seen": "one.bias"}


class Tied(nn.Module):
    """Two layers whose weights are different Parameter objects in the same memory, and a buffer in the memory of a bias."""

    def __init__(self) -> None:
        """Makes the layers in double precision, then the ties: converting them afterwards would undo these."""
        super().__init__()
        self.stem = nn.Linear(3, 8, dtype=torch.float64)
        self.one = nn.Linear(8, 8, dtype=torch.float64)
        self.two = nn.Linear(8, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 4, dtype=torch.float64)
        self.seen: Tensor
        self.register_buffer("seen", self.one.bias.data)
        self.two.weight = nn.Parameter(self.one.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 3) to (n, 4)."""
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.one(x))
        x = x + torch.tanh(self.two(x))
        result: Tensor = self.head(x * self.seen)
        return result


def built(seed: int = 0) -> Tied:
    """Returns a new network."""
    torch.manual_seed(seed)
    return Tied().eval()


def inputs() -> Tensor:
    """Returns five rows."""
    return torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masks_of(model: nn.Module) -> gp.Masks:
    """Returns masks that remove three of the eight channels, by position, so that no weights of another network matter."""
    graph = gp.trace(model, inputs())
    (group,) = graph.groups
    keep = torch.tensor([True, False, True, True, False, True, False, True]).numpy()
    return gp.Masks(graph, {group.name: keep})


def place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Returns where a tensor lies."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and buffers under all their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def assert_tied(model: nn.Module, width: int) -> None:
    """Each pair has one memory, of this width, and is still two objects; what is written through one is read through the other."""
    held = tensors(model)
    for name, other in TIED.items():
        assert held[name] is not held[other]
        assert place(held[name]) == place(held[other])
        assert set(held[name].shape) == {width}
        with torch.no_grad():
            values = held[other].clone()
            held[name].zero_()
            assert not held[other].any()
            held[name].copy_(values)
    assert isinstance(held["two.weight"], nn.Parameter)
    assert "seen" in dict(model.named_buffers())


def test_memory_is_found() -> None:
    """One graph speaks of each memory under one name: all layers are one group, whose slices name no alias."""
    graph = gp.trace(built(), inputs())
    assert dict(graph.aliases) == TIED
    (group,) = graph.groups
    assert group.channels == 8
    assert not {s.parameter for s in group.slices} & set(TIED)
    assert {(s.parameter, s.dim) for s in group.slices} >= {("one.weight", 0), ("one.weight", 1), ("one.bias", 0), ("stem.weight", 0)}


def test_the_copy_is_tied_and_the_original_too() -> None:
    """The small network has one memory per pair, computes what the masked one computes, and shares nothing with the given one."""
    model = built()
    before, masks = snapshot(model), masks_of(model)
    small, report = gp.speedup(model, masks, result="module")
    assert report.error < 1e-12 < report.effect
    torch.testing.assert_close(evaluate(small, inputs())[0], evaluate(masks.masked(model), inputs())[0], rtol=0, atol=1e-12)
    assert changes(before, snapshot(model)) == []
    assert not {place(t)[0] for t in tensors(small).values()} & {place(t)[0] for t in tensors(model).values()}
    assert_tied(small, 5)
    assert_tied(model, 8)
    train_step(small, inputs())


def test_in_place_they_stay_tied() -> None:
    """The parameters are the same objects, smaller, and still in one memory."""
    model = built()
    held = tensors(model)
    small, _ = gp.speedup(model, masks_of(model), inplace=True)
    assert small is model
    assert all(held[name] is tensor for name, tensor in tensors(model).items())
    assert_tied(model, 5)


def test_in_place_they_are_tied_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong after slicing, each pair is back in the memory that it had."""
    model = built()
    before, places = snapshot(model), {name: place(tensor) for name, tensor in tensors(model).items()}

    def failing(*_: Any) -> None:
        raise RuntimeError("forced")

    monkeypatch.setattr(surgery, "set_attributes", failing)
    with pytest.raises(RuntimeError, match="forced"):
        gp.speedup(model, masks_of(model), inplace=True)
    assert changes(before, snapshot(model)) == []
    assert {name: place(tensor) for name, tensor in tensors(model).items()} == places
    assert_tied(model, 8)


def test_a_graph_holds_each_memory_once() -> None:
    """A GraphModule reads one tensor in all the places."""
    model = built()
    masks = masks_of(model)
    small, report = gp.speedup(model, masks, result="graph")
    assert report.error < 1e-12
    assert not set(tensors(small)) & set(TIED)
    torch.testing.assert_close(evaluate(small, inputs())[0], evaluate(masks.masked(model), inputs())[0], rtol=0, atol=1e-12)


def test_two_prunings_in_a_row() -> None:
    """The second pruning finds the ties that the first one left."""
    first, _ = gp.speedup(built(), masks_of(built()))
    second, report = gp.prune(first, inputs(), sparsity=0.4)
    assert report.error < 1e-12
    assert_tied(second, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_file_keeps_the_ties(dtype: torch.dtype, tmp_path: Path) -> None:
    """Loaded onto a new network that is tied by memory, the pruned one is as well, also where the file has another dtype."""
    model = built()
    small, _ = gp.speedup(model, masks_of(model))
    for name, tensor in tensors(small).items():
        if name not in TIED:
            tensor.data = tensor.data.to(dtype)
    for name, other in TIED.items():
        tensors(small)[name].data = tensors(small)[other].data
    gp.save(small, tmp_path / "small.safetensors")
    back = gp.load(built(1), tmp_path / "small.safetensors")
    assert {tensor.dtype for tensor in tensors(back).values()} == {dtype}
    assert_tied(back, 5)
    assert all(torch.equal(tensor, tensors(small)[name]) for name, tensor in tensors(back).items())


def test_a_file_of_tied_tensors_fits_a_network_without_ties(tmp_path: Path) -> None:
    """Where the new network holds them apart, each gets the values, and a memory of its own."""
    model = built()
    small, _ = gp.speedup(model, masks_of(model))
    gp.save(small, tmp_path / "small.safetensors")
    fresh = built(1)
    fresh.two.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    fresh.seen = torch.zeros(8, dtype=torch.float64)
    back = gp.load(fresh, tmp_path / "small.safetensors")
    assert len({place(tensor)[0] for tensor in tensors(back).values()}) == len(tensors(back))
    torch.testing.assert_close(evaluate(back, inputs())[0], evaluate(small, inputs())[0], rtol=0, atol=0)
