"""The little that the oracles ask of a dependency graph, so that a hand-made one will do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

IntArray: TypeAlias = NDArray[np.int64]
Keep: TypeAlias = Mapping[str, NDArray[np.bool_]]


class SliceLike(Protocol):
    """What one group owns of one tensor: channel c owns the positions index[c] along `dim`."""

    @property
    def parameter(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def index(self) -> IntArray: ...  # noqa: D102


class GroupLike(Protocol):
    """Channels that are interchangeable with each other."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def channels(self) -> int: ...  # noqa: D102
    @property
    def slices(self) -> Sequence[SliceLike]: ...  # noqa: D102


class FrozenLike(Protocol):
    """Positions (1-D index) of one tensor dimension that stay."""

    @property
    def parameter(self) -> str: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def index(self) -> IntArray: ...  # noqa: D102


class GraphLike(Protocol):
    """The groups of a network."""

    @property
    def groups(self) -> Sequence[GroupLike]: ...  # noqa: D102


class CoveredGraphLike(GraphLike, Protocol):
    """The groups of a network, and what is in none of them."""

    @property
    def frozen(self) -> Sequence[FrozenLike]: ...  # noqa: D102


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns every parameter and buffer by each of its qualified names (tied ones under several)."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
