"""What a model returned: its tensors, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def output_tensors(output: object) -> list[Tensor]:
    """Returns all tensors of a model's output, in order, through tuples, lists, dicts and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        parts: Iterator[Any] = iter(output.values())
    elif isinstance(output, (list, tuple)):
        parts = iter(output)
    elif hasattr(output, "__dataclass_fields__"):
        parts = (getattr(output, name) for name in output.__dataclass_fields__)
    else:
        return []
    return [t for part in parts for t in output_tensors(part)]
