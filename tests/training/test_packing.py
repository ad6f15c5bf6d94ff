"""Nested values and optimizers go through a run's file and come back bit by bit."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.runs.checkpoint import Run
from graphprune.search.annealing import Move
from graphprune.search.objective import Trial
from graphprune.training.packing import Packer, Unpacker, load, save


def through(value: Any, known: Any = ()) -> Any:
    """Packs a value, takes it through JSON and copies of the tensors, and unpacks it."""
    packer = Packer("a test", known)
    plain = json.loads(json.dumps(packer.pack(value, "value")))
    return Unpacker({name: tensor.detach().cpu().contiguous().clone() for name, tensor in packer.tensors.items()}, known).unpack(plain)


def test_types_strides_and_numbers_come_back() -> None:
    """Tuples stay tuples, numbers of numpy theirs, keys of dicts are no strings, and tensors lie in memory as before."""
    value = {1: (1, 2.5, None), "list": [True, "text", {}], (1, 2): [np.float32(0.1), np.int64(3), np.float64(1 / 3)], None: -0.0}
    found = through(value)
    assert found == value
    assert [type(n) for n in found[1, 2]] == [np.float32, np.int64, np.float64]
    assert type(found[1]) is tuple
    assert math.copysign(1.0, found[None]) == -1.0
    assert math.isnan(through(math.nan))
    assert through(-math.inf) == -math.inf
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (last, last.bfloat16(), last[:, ::2], torch.tensor(3), torch.zeros(0, 2), torch.tensor([math.nan, -0.0])):
        back = through(tensor)
        assert back.dtype == tensor.dtype
        assert back.shape == tensor.shape
        assert back.stride() == tensor.stride()
        assert back.contiguous().view(-1).tolist() == pytest.approx(tensor.contiguous().view(-1).tolist(), rel=0, abs=0, nan_ok=True)
    assert through(torch.ones(3).expand(2, 3)).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_a_tensor_at_two_places_stays_one_and_parameters_are_not_copied() -> None:
    """Writing to one place is seen at the other, as before; what is known is not kept."""
    tensor, parameter = torch.zeros(2), nn.Parameter(torch.ones(2))
    one, (two, three) = through([tensor, (tensor, parameter)], [parameter])
    one.add_(1)
    assert two.tolist() == [1, 1]
    assert three is parameter


@pytest.mark.parametrize("value", [deque([1]), {1, 2}, 1j, torch.float32, torch.eye(2).to_sparse(), [object()]], ids=str)
def test_what_is_of_another_kind_is_refused(value: Any) -> None:
    """Nothing is dropped silently."""
    with pytest.raises(gp.ConfigError, match=r"value.* of a test is a .*which cannot be kept in a folder. Leave folder= out"):
        through(value)


def test_an_optimizer_of_half_precision_weights_keeps_its_own_precision(tmp_path: Any) -> None:
    """State in float32 of weights in bfloat16 is not rounded, as PyTorch's own `load_state_dict` would, and groups stay the same dicts."""
    torch.manual_seed(0)

    def made() -> torch.optim.Adam:
        model = nn.Linear(8, 8).to(torch.bfloat16)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for p in model.parameters():
            optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.rand(p.shape), "exp_avg_sq": torch.rand(p.shape)}
        return optimizer

    optimizer = made()
    save(Run(tmp_path, "r", {}), "a test", {"o": optimizer})
    saved = load(Run(tmp_path, "r", {}))
    assert saved is not None
    again = made()
    (group,) = again.param_groups
    saved["o"].fill(again)
    assert again.param_groups[0] is group
    assert group["betas"] == (0.9, 0.999)
    for p, q in zip(optimizer.param_groups[0]["params"], group["params"], strict=True):
        for key, value in optimizer.state[p].items():
            assert again.state[q][key].dtype == value.dtype == torch.float32
            assert torch.equal(again.state[q][key], value)


class Counting(nn.Module):
    """A module with all that training changes: parameters, one of them frozen, buffers (one that state dicts leave out), an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.notes: dict[Any, Any] = {}

    def get_extra_state(self) -> dict[Any, Any]:
        """Returns the notes."""
        return self.notes

    def set_extra_state(self, state: dict[Any, Any]) -> None:
        """Puts the notes back."""
        self.notes = state


def test_modules_are_filled_in_place(tmp_path: Any) -> None:
    """Values, shapes of buffers, what is frozen and extra states come back; parameters stay the objects that an optimizer holds."""
    one, two = Counting(), Counting()
    one.layer.bias.requires_grad_(False)
    one.seen = torch.arange(4.0)
    one.notes = {1: (torch.ones(2), np.float32(0.1))}
    one.norm(one.layer(torch.randn(5, 2)))
    save(Run(tmp_path, "r", {}), "a test", {"models": [one, None]})
    saved = load(Run(tmp_path, "r", {}))
    assert saved is not None
    before = list(two.parameters())
    packed, nothing = saved["models"]
    packed.fill(two)
    assert nothing is None
    assert all(p is q for p, q in zip(two.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(two.parameters(), one.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(two.buffers(), one.buffers(), strict=True))
    assert [p.requires_grad for p in two.parameters()] == [True, False, True, True]
    assert two.notes[1][0].tolist() == [1, 1]


def test_arrays_and_records_come_back(tmp_path: Any) -> None:
    """Dataclasses of the package are made again, with what is in them; those of others are refused, and so are unknown ones."""
    move = Move(0, 100.0, 0.0, 1.0, accepted=True)
    trial = Trial(3, {"a": 0.5}, np.float64(0.25), gp.Cost(10, 20), 1.5)
    mask = np.array([[True, False], [False, True]])
    assert through({"a": (move, [trial])}) == {"a": (move, [trial])}
    assert type(through(trial).score) is np.float64
    back = through(mask[:, ::-1])
    assert back.dtype == bool
    assert back.tolist() == [[False, True], [True, False]]
    with pytest.raises(gp.ConfigError, match=r"value\['o'\] of a test is a Foreign, which cannot be kept"):
        through({"o": Foreign(1)})
    unknown: dict[str, dict[str, Any]] = {
        "graphprune.search.objective:Nothing": {},
        "graphprune.search.annealing:Move": {"mass": 1},
        "graphprune.errors:nearest": {"name": "a", "known": "a"},  # no dataclass
        f"{__name__}:Foreign": {"number": 1},
    }
    for name, fields in unknown.items():
        Run(tmp_path, "r", {}).save({"a": {"record": name, "fields": fields}})
        with pytest.raises(gp.FileError, match=f"the run holds a {name}, which is unknown"):
            load(Run(tmp_path, "r", {}))


@dataclass
class Foreign:
    """A dataclass of somebody else."""

    number: int


def test_runs_without_a_folder_keep_nothing_and_refuse_nothing() -> None:
    """What cannot be kept is no error where nothing is to be kept."""
    run = Run(None, "r", {})
    save(run, "a test", {"o": object()})
    assert load(run) is None


def test_folders_of_an_older_format_are_refused(tmp_path: Any) -> None:
    """One line says that the file is of another version, and what to do."""
    Run(tmp_path, "r", {}).save({"a": 1})
    path = tmp_path / "r.safetensors"
    path.write_bytes(path.read_bytes().replace(b'format\\": 2', b'format\\": 1'))
    with pytest.raises(gp.FileError, match=r"is of format 1, and this graphprune reads format 2. Choose another folder"):
        Run(tmp_path, "r", {})
