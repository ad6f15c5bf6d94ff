"""Outputs of any structure are compared tensor by tensor."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.support.outputs import flatten_outputs, relative_error
from tests.support.untouched import assert_same


def test_flatten_outputs_opens_every_structure() -> None:
    """Tensors come out of nested tuples, dicts and dataclasses in order; other leaves are dropped."""

    @dataclasses.dataclass
    class Output:
        """Two fields."""

        logits: torch.Tensor
        extra: tuple[torch.Tensor | None, int]

    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert_same(flatten_outputs([{"x": a}, Output(b, (None, 3)), (c, "text")]), [a, b, c], "wrong order")


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([4.0, -8.0], [4.0, -6.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, 2.0], [1.0, 2.0, 3.0], math.inf),
    ],
)
def test_relative_error(expected: list[float], actual: list[float], error: float) -> None:
    """The largest difference over the largest expected value; infinite where shapes or finiteness differ."""
    assert relative_error([torch.tensor(expected)], [torch.tensor(actual)]) == error


def test_relative_error_takes_the_worst_tensor() -> None:
    """A small tensor that is wrong is not hidden by a large one that is right."""
    large, small = torch.full((3,), 1e6), torch.full((2,), 1e-3)
    assert relative_error([large, small], [large, small * 1.5]) == pytest.approx(0.5)
