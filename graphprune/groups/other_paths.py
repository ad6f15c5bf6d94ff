"""Passes that decide otherwise than the example does, so that every path through a model is labelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from graphprune.torch_private import is_mutable
from graphprune.trace.data_dependent import decision
from graphprune.trace.program import info

if TYPE_CHECKING:
    from torch import fx

_FAR = 1e6  # a number that is beyond any threshold


class RandomBranches:
    """Runs a model's operators, and decides at random: which way Python goes, what is chosen by value, what a comparison gives.

    What such a run computes means nothing. But every path that it takes is one that the model can take, so what it says of channels holds.
    """

    def __init__(self, seed: int) -> None:
        """Takes the seed of the decisions; 0 and 1 turn truth values over, and make all numbers that are read very large, or very low."""
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operator."""
        if info(node).whole:
            return args[0]
        result = func(*args, **kwargs)
        kind = decision(func, args, kwargs, result, constant=info(node).constant)
        if kind == "number":
            return self._number(result)
        if kind != "step" or is_mutable(func):
            return result
        size = self._choices(args, kwargs)
        parts = list(result) if isinstance(result, (list, tuple)) else [result]
        made = [self._chosen(p, size) if isinstance(p, torch.Tensor) else p for p in parts]
        return type(result)(made) if isinstance(result, (list, tuple)) else made[0]

    def _number(self, value: Any) -> Any:
        coin = int(torch.randint(0, 3, (), generator=self.generator)) if self.seed > 1 else self.seed
        if isinstance(value, bool):
            return coin > 0 if self.seed > 1 else not value
        return (_FAR, -_FAR, value)[coin] if isinstance(value, float) else value

    @staticmethod
    def _choices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Returns how many positions an operator that chooses along one dimension chooses from, 0 where it is not of that kind."""
        source = args[0] if args else None
        dims = [d for d in (*args[1:], *kwargs.values()) if isinstance(d, int) and not isinstance(d, bool)]
        if not isinstance(source, torch.Tensor) or not source.ndim:
            return 0
        return min(source.shape[d] for d in [*(d for d in dims if -source.ndim <= d < source.ndim), -1])

    def _chosen(self, part: torch.Tensor, size: int) -> torch.Tensor:
        if part.is_meta:
            return part
        if part.dtype == torch.bool:
            return torch.randint(0, 2, part.shape, generator=self.generator).to(part)
        if part.dtype == torch.int64 and size > 0 and part.numel() and int(part.min()) >= 0 and int(part.max()) < size:
            return torch.randint(0, size, part.shape, generator=self.generator).to(part)
        return part
