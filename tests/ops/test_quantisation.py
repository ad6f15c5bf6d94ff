"""Simulated quantisation: channels pass where one scale serves all; a literal with a number per channel keeps the channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.operators import Case, check, conv, table

A = "a.bias/0 a.weight/0"
PLAIN = [f"8 exact: {A} b.weight/1"]


def quantised(name: str, operator: Any, groups: list[str], **options: Any) -> Case:
    """Returns a case that quantises 8 channels between two convolutions, in float32 as the operators ask for."""
    parts = {"a": conv(3, 8), "b": conv(8, 4), **options.pop("extra", {})}
    return Case(name, lambda m, x: m.b(operator(m, torch.relu(m.a(x)).float()).double()), parts, groups,
                **{"trainable": False, "kind": "module", **options})  # fmt: skip


def literals() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a scale and a zero point per channel."""
    return torch.linspace(0.02, 0.05, 8), torch.zeros(8, dtype=torch.int32)


SCALE = {"scale": torch.full((8,), 0.05), "zero": torch.full((8,), 3, dtype=torch.int32)}

CASES = [
    quantised("one scale", lambda _, x: torch.fake_quantize_per_tensor_affine(x, 0.05, 3, 0, 255), PLAIN),
    quantised("one scale, in tensors", lambda _, x: torch.fake_quantize_per_tensor_affine(x, torch.tensor(0.05), torch.tensor(3).int(), 0,
              255), PLAIN),
    quantised("then a sum", lambda _, x: torch.fake_quantize_per_tensor_affine(x, 0.05, 3, 0, 255).double().sum(1, keepdim=True),
              [f"8 exact: {A}"], extra={"b": conv(1, 4)}),
    quantised("one scale per channel", lambda _, x: torch.fake_quantize_per_channel_affine(x, *literals(), 1, 0, 255), [], kind=None,
              frozen={"a.weight/0": "scale of its own, in a literal"}),
    quantised("one zero point per channel", lambda m, x: torch.fake_quantize_per_channel_affine(x, m.scale.float(), m.zero, 1, 0, 255), [],
              kind=None, frozen={"a.weight/0": "zero point of its own, in a literal"}, extra=SCALE),
    quantised("one scale per row", lambda _, x: torch.fake_quantize_per_channel_affine(x, literals()[0][:6], literals()[1][:6], 2, 0, 255),
              PLAIN),
    quantised("learnt scales and zero points", lambda m, x: torch._fake_quantize_learnable_per_channel_affine(x, m.s.float().abs() + 0.1,  # noqa: SLF001
              m.z.float(), 1, 0, 255), [f"8 exact: {A} b.weight/1 s/0 z/0"], extra={"s": table(8), "z": nn.Parameter(torch.ones(8))}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantisation(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
