"""MACs read off a recording are those that are counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from graphprune.cost.count import count
from graphprune.cost.predict import macs_of, may_multiply
from graphprune.trace.recorder import record
from tests.support.operators import filled, normal
from tests.support.torchvision_shim import import_torchvision

SMALL = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet")


@pytest.mark.parametrize("name", SMALL)
def test_macs_of_networks(name: str) -> None:
    """Recorded and counted MACs are the same number, in a batch of two."""
    options = {"init_weights": False} if name == "googlenet" else {}
    model = import_torchvision().models.get_model(name, weights=None, **options).double().eval()
    inputs = normal(2, 3, 96, 96)
    counted = count(model, inputs).macs
    assert counted > 0
    assert macs_of(record(model, inputs)) == counted


class Calls(nn.Module):
    """Calls one function on two square matrices."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 6))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the function makes of input and weight."""
        made: Tensor = self.function(x, self.weight)  # type: ignore[operator]
        return made


COVERED = {
    "matmul": lambda x, w: x @ w,
    "linear": nn.functional.linear,
    "einsum": lambda x, w: torch.einsum("ij,jk->ik", x, w),
    "addmm": lambda x, w: torch.addmm(w, x, w),
    "attention": lambda x, w: nn.functional.scaled_dot_product_attention(x[None], w[None], w[None]),
    "vector": lambda x, w: x @ w[0],
    "interpolation": lambda x, w: nn.functional.interpolate((x + w)[None, None], scale_factor=2, mode="bilinear"),
    "nothing": lambda x, w: (x * w).softmax(1).reshape(-1).sum(),
}
COUNTED = {
    "einsum of three": lambda x, w: torch.einsum("ij,jk,kl->il", x, w, w),
    "multi_dot": lambda x, w: torch.linalg.multi_dot([x, w, w]),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=1),
    "matrix_power": lambda x, w: torch.linalg.matrix_power(x + w, 3),
    "inner": torch.inner,
}


@pytest.mark.parametrize("name", COVERED)
def test_macs_of_operators(name: str) -> None:
    """Operators with a formula, and those that multiply nothing, are read off the recording."""
    model, inputs = filled(Calls(COVERED[name])), normal(6, 6)
    assert macs_of(record(model, inputs)) == count(model, inputs).macs


@pytest.mark.parametrize("name", COUNTED)
def test_what_no_formula_covers_is_told(name: str) -> None:
    """A recording with an operator that PyTorch takes apart into products, and that has no formula, says that it must be counted."""
    model, inputs = filled(Calls(COUNTED[name])), normal(6, 6)
    found = macs_of(record(model, inputs))
    assert count(model, inputs).macs > 0
    assert found is None or found == count(model, inputs).macs


def test_which_operators_may_multiply() -> None:
    """Those with a formula here or in PyTorch, and those of ATen whose decomposition has products; not those that only move values."""
    aten = torch.ops.aten
    assert all(map(may_multiply, (aten.mm.default, aten.linear.default, aten.tensordot.default, aten.linalg_multi_dot.default)))
    assert not any(map(may_multiply, (aten.relu.default, aten.reshape.default, aten.softmax.int, aten.layer_norm.default)))
    assert not may_multiply(aten.upsample_bilinear2d.vec)
