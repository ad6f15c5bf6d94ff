"""Numbers that a network leaves to a default or computes from a width: a change of them is noticed also where no output shows it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import graphprune as gp

TINY = 1e-9


class Attending(nn.Module):
    """Two heads of attention whose scale of 1 / sqrt(width of a head) is left to PyTorch, or stated."""

    def __init__(self, scale: float | None) -> None:
        """Makes the layers; queries and keys are so small that all weights of the attention are equal, whatever the scale."""
        super().__init__()
        self.scale = scale
        self.query, self.key, self.value = (nn.Linear(6, 16, dtype=torch.float64) for _ in range(3))
        self.out = nn.Linear(16, 3, dtype=torch.float64)
        with torch.no_grad():
            for parameter in (*self.query.parameters(), *self.key.parameters()):
                parameter.mul_(TINY)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, tokens, 6) to (n, tokens, 3)."""
        query, key, value = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
        result: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return result


class Scaled(nn.Module):
    """Scales by a number that its code computes from the width that it meets, next to what is much larger."""

    def __init__(self) -> None:
        """Makes the layers; what is scaled is too small to be seen in the outputs."""
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(*sizes, dtype=torch.float64) for sizes in ((4, 8), (8, 3), (4, 3)))
        with torch.no_grad():
            self.b.weight.mul_(TINY)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 4) to (n, 3)."""
        y = self.a(x)
        result: Tensor = self.c(x) + self.b(torch.sigmoid(y * y.shape[1] ** -0.5))
        return result


def pruned(model: nn.Module, x: Tensor, *, verify: bool, **options: Any) -> tuple[nn.Module, gp.SpeedupReport]:
    """Returns the model without half of what may go."""
    return gp.prune(model.eval(), x, 0.5, verify=verify, **options)


def attention(scale: float | None) -> tuple[nn.Module, Tensor]:
    """Returns a network with attention, and its inputs."""
    torch.manual_seed(0)
    return Attending(scale), torch.randn(2, 5, 6, dtype=torch.float64)


def scales(model: nn.Module, x: Tensor) -> list[Any]:
    """Returns the scale of every call of attention in a forward pass, as it was passed."""
    seen: list[Any] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            if "scaled_dot_product_attention" in str(func):
                seen.append((kwargs or {}).get("scale"))
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        model(x)
    return seen


@pytest.mark.parametrize("verify", [True, False])
def test_a_default_scale_that_no_output_shows(verify: bool) -> None:
    """Narrower heads would change the scale; the outputs are the same to the last digits, but the class is not returned."""
    model, x = attention(None)
    small, report = pruned(model, x, verify=verify, cut="query_key")
    assert report.kind == "graph"
    assert ("goes by the sizes that it meets" if verify else "to a default") in report.reason
    assert scales(small, x) == [pytest.approx(8**-0.5)]
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=x, cut="query_key").masks()
    with torch.no_grad():  # what makes this hard to notice: another scale gives the same outputs
        loud: Any = masks.masked(model)
        loud.scale = 4**-0.5
        torch.testing.assert_close(loud(x), masks.masked(model)(x), rtol=1e-12, atol=0)
    with pytest.raises(gp.VerificationError, match="own class cannot be kept"):
        gp.speedup(model, masks, verify=verify, result="module")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("scale", "cut"), [(8**-0.5, "query_key"), (8**-0.5, "value"), (None, "value")])
def test_a_scale_that_stays_keeps_the_class(scale: float | None, cut: Literal["query_key", "value"], verify: bool) -> None:
    """A stated scale does not change, nor does the default where the width of queries and keys stays."""
    model, x = attention(scale)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=x, cut=cut).masks()
    assert masks.sparsity > 0
    small, _ = gp.speedup(model, masks, verify=verify)
    assert type(small) is Attending
    assert scales(small, x) == [scale]


@pytest.mark.parametrize("verify", [True, False])
def test_a_computed_scale_that_no_output_shows(verify: bool) -> None:
    """The same for a number that the code computes from a shape: the operators are compared with the fractions that they get."""
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 4, dtype=torch.float64)
    _, report = pruned(model, x, verify=verify)
    assert report.kind == "graph"
    assert "goes by the sizes that it meets" in report.reason
