"""An outline sees what a recording sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from graphprune.cost.predict import MacCounter, macs_of
from graphprune.trace.inputs import normalise
from graphprune.trace.outline import calls_of, outline
from graphprune.trace.recorder import record
from tests.support.operators import filled, normal
from tests.support.torchvision_shim import import_torchvision

if TYPE_CHECKING:
    from collections.abc import Callable


class Reading(nn.Module):
    """Reads a number, a list and an array, takes pieces out of a list, and multiplies by what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Returns scores."""
        scores = self.layer(x)
        first, second = scores.chunk(2, dim=1)
        scale = torch.arange(3).tolist()[1] + int(torch.arange(4).numpy()[2])
        made: Tensor = (first + second) * 0.5 * scale if bool(scores.sum() < 1e9) else first
        return made


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "convolutions": (lambda: import_torchvision().models.mobilenet_v3_small(weights=None).double(), normal(1, 3, 32, 32)),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double(), normal(2, 3, 8)),
    "recurrent": (lambda: nn.LSTM(4, 5, batch_first=True).double(), normal(2, 3, 4)),
    "values": (lambda: Reading().double(), normal(2, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_outline_is_that_of_the_recording(name: str) -> None:
    """Operators, fractions, outputs and MACs are those of the recording; the model and the inputs are as they were."""
    make, given = NETWORKS[name]
    model, inputs = filled(make()).eval(), normalise(given)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    program, counter = record(model, inputs), MacCounter()
    found = outline(model, inputs, observe=counter)
    assert found.calls == calls_of(program)
    assert any(fractions for _, fractions in found.calls)
    assert [t.shape for t in found.outputs] == [t.shape for t in program.outputs]
    assert all(torch.equal(a, b) for a, b in zip(found.outputs, program.outputs, strict=True))
    assert counter.macs == macs_of(program)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_another_fraction_is_another_outline() -> None:
    """Calls differ where a number is another one, though the operators are the same."""
    inputs = normalise(normal(2, 4))
    a, b = (outline(nn.Sequential(nn.LayerNorm(4, eps=eps).double(), nn.Linear(4, 2).double()), inputs) for eps in (1e-5, 1e-6))
    assert [target for target, _ in a.calls] == [target for target, _ in b.calls]
    assert a.calls != b.calls
