"""Showing that a call left its input alone, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tests.support.protocols import named_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns what a call that leaves its input alone may not change: tensors, gradients, flags, plain attributes, random state."""
    plain = (bool, int, float, str, tuple, type(None))
    tensors = named_tensors(model)
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "requires_grad": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "gradients": {name: tensor.grad is None for name, tensor in tensors.items()},
        "attributes": {
            name: {key: value for key, value in vars(module).items() if isinstance(value, plain)} for name, module in model.named_modules()
        },
        "hooks": {
            name: [len(value) for key, value in vars(module).items() if key.endswith("_hooks")] for name, module in model.named_modules()
        },
        "random state": torch.get_rng_state(),
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any], path: str = "") -> list[str]:
    """Returns the paths at which two snapshots differ."""
    differences = []
    for key in {**before, **after}:
        where = f"{path}/{key}"
        if (key in before) != (key in after):
            differences.append(where)
            continue
        one, two = before[key], after[key]
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            differences += changes(one, two, where)
        elif isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
            if not same_bits(one, two):
                differences.append(where)
        elif type(one) is not type(two) or (one != two and one == one):  # noqa: PLR0124 (NaN equals NaN here)
            differences.append(where)
    return differences


def same_bits(one: object, two: object) -> bool:
    """Returns whether two values are tensors of one type and shape with equal entries; NaN equals NaN."""
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor) or one.dtype != two.dtype or one.shape != two.shape:
        return False
    return bool(torch.equal(one, two) or ((one == two) | (one.isnan() & two.isnan())).all())


def assert_same(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor], message: str) -> None:
    """Asserts that two lists of tensors are equal bit for bit."""
    assert len(one) == len(two), message
    assert all(same_bits(a, b) for a, b in zip(one, two, strict=True)), message
