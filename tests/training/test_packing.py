"""Nested values and optimizers go through a run's file and come back bit by bit."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.runs.checkpoint import Run
from graphprune.training.packing import Packer, Unpacker, packed_optimizer, restore_optimizer


def through(value: Any, known: Any = ()) -> Any:
    """Packs a value, takes it through JSON and copies of the tensors, and unpacks it."""
    packer = Packer("x/", "a test", known)
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
    plain, tensors = packed_optimizer(optimizer, "o/")
    Run(tmp_path, "r", {}).save({"o": plain}, tensors)
    saved = Run(tmp_path, "r", {}).load()
    assert saved is not None
    again = made()
    (group,) = again.param_groups
    restore_optimizer(again, saved.state["o"], saved.tensors)
    assert again.param_groups[0] is group
    assert group["betas"] == (0.9, 0.999)
    for p, q in zip(optimizer.param_groups[0]["params"], group["params"], strict=True):
        for key, value in optimizer.state[p].items():
            assert again.state[q][key].dtype == value.dtype == torch.float32
            assert torch.equal(again.state[q][key], value)
