"""The reference for norms that take statistics across channels: the same norms over the kept channels only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class KeptStatistics(TorchFunctionMode):
    """Within this context, layer_norm, rms_norm and group_norm of the given weights ignore removed channels, and give 0 there.

    Norms are recognised by the identity of their weight: one without a weight, or written out in other operators, is not seen.

    Args:
        weights: pairs of a norm's weight and a boolean tensor of its shape, True = kept. Weights of other layers do no harm.
    """

    def __init__(self, weights: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Remembers the weights by identity."""
        super().__init__()
        self._weights = list(weights)  # keeps the tensors alive, and their identities valid
        self._kept = {id(weight): kept for weight, kept in self._weights}

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Replaces a norm of a known weight, and calls everything else as it is."""
        del types
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        weight = kwargs["weight"] if "weight" in kwargs else args[2] if len(args) > 2 else None
        if replacement is None or not isinstance(weight, torch.Tensor) or id(weight) not in self._kept:
            return func(*args, **kwargs)
        return replacement(self._kept[id(weight)].to(weight.device), *args, **kwargs)


def _layer_norm(
    kept: torch.Tensor,
    input: torch.Tensor,  # noqa: A002 (the name that callers may use)
    normalized_shape: list[int],
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    """layer_norm over the kept positions of the normalised dimensions, flattened into one."""
    values = input.flatten(input.ndim - len(normalized_shape))
    alive = kept.flatten().nonzero().squeeze(1)
    normed = functional.layer_norm(
        values.index_select(-1, alive),
        [len(alive)],
        weight.flatten()[alive],
        None if bias is None else bias.flatten()[alive],
        eps,
    )
    return torch.zeros_like(values).index_copy(-1, alive, normed).reshape(input.shape)


def _rms_norm(
    kept: torch.Tensor,
    input: torch.Tensor,  # noqa: A002 (as above)
    normalized_shape: list[int],
    weight: torch.Tensor,
    eps: float | None = None,
) -> torch.Tensor:
    """rms_norm over the kept positions of the normalised dimensions, flattened into one."""
    values = input.flatten(input.ndim - len(normalized_shape))
    alive = kept.flatten().nonzero().squeeze(1)
    normed = functional.rms_norm(values.index_select(-1, alive), [len(alive)], weight.flatten()[alive], eps)
    return torch.zeros_like(values).index_copy(-1, alive, normed).reshape(input.shape)


def _group_norm(
    kept: torch.Tensor,
    input: torch.Tensor,  # noqa: A002 (as above)
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> torch.Tensor:
    """group_norm over the kept channels of each group; groups without any are 0."""
    output = torch.zeros_like(input)
    for block in torch.arange(len(kept), device=kept.device).chunk(num_groups):
        alive = block[kept[block]]
        if len(alive):
            part_bias = None if bias is None else bias[alive]
            normed = functional.group_norm(input.index_select(1, alive), 1, weight[alive], part_bias, eps)
            output = output.index_copy(1, alive, normed)
    return output


_REPLACEMENTS: Final[dict[Any, Callable[..., torch.Tensor]]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
