"""Statistics of gradients: what the loss would change by, to first order, if a weight or a channel went.

Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771, section 3: I_s = (g_s w_s)^2, averaged over batches.
A channel's score is their sum, or, for all of its weights jointly, (sum_s g_s w_s)^2.

`torch.autograd.grad` is used throughout: no `.grad` field is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphprune.data.distributed import all_reduce_sum
from graphprune.errors import ConfigError, nearest
from graphprune.trace.turns import turn

if TYPE_CHECKING:
    from graphprune.data.sources import Source
    from graphprune.groups.graph import Slice


def observe_products(model: nn.Module, parameters: Iterable[str], source: Source) -> dict[str, Tensor]:
    """Returns parameter name -> the mean over batches of (g w)^2 per element, in the parameter's shape and at least float32.

    Elements that the loss does not depend on count zero. Under `torch.distributed` the batches of all processes count.

    Args:
        model: left as it was.
        parameters: qualified names.
        source: the losses.

    Raises:
        ConfigError: the model has no parameter of a name, or there is no loss.
        InputError: there are no batches, or a loss cannot be used.
    """
    tensors = named(model, parameters)
    sums = {name: torch.zeros_like(t, dtype=precise(t), requires_grad=False) for name, t in tensors.items()}

    def add(products: Mapping[str, Tensor]) -> None:
        for name, product in products.items():
            sums[name] += product * product

    return averaged(sums, _products(model, tensors, source, add))


def observe_joint(model: nn.Module, slices: Mapping[str, tuple[Slice, ...]], source: Source) -> dict[str, Tensor]:
    """Returns group name -> the mean over batches of (sum of g w over all that the slices own)^2, of shape (channels,).

    Args:
        model: left as it was.
        slices: group name -> the slices that take part; at least one each.
        source: the losses.

    Raises:
        ConfigError: the model has no parameter of a name, or there is no loss.
        InputError: there are no batches, or a loss cannot be used.
    """
    tensors = named(model, dict.fromkeys(s.parameter for owned in slices.values() for s in owned))
    index = {id(s): torch.from_numpy(s.index).to(tensors[s.parameter].device) for owned in slices.values() for s in owned}
    sums: dict[str, Tensor] = {}
    for name, owned in slices.items():
        first = tensors[owned[0].parameter]
        sums[name] = torch.zeros(owned[0].index.shape[0], dtype=precise(first), device=first.device)

    def add(products: Mapping[str, Tensor]) -> None:
        along: dict[tuple[str, int], Tensor] = {}
        for name, owned in slices.items():
            channels = torch.zeros_like(sums[name])
            for s in owned:
                if s.parameter in products:
                    if (s.parameter, s.dim) not in along:
                        along[s.parameter, s.dim] = _along(products[s.parameter], s.dim)
                    channels += along[s.parameter, s.dim][index[id(s)]].sum(1)
            sums[name] += channels * channels

    return averaged(sums, _products(model, tensors, source, add))


def named(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns a model's parameters (or buffers) by name.

    Raises:
        ConfigError: it has none of a name.
    """
    known: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    out = {}
    for name in names:
        if name not in known:
            raise ConfigError(f"{type(model).__name__} has no parameter called {name!r}", nearest(name, known) or "See graph.shapes")
        out[name] = known[name]
    return out


@contextmanager
def differentiable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Lets gradients be taken with respect to parameters inside the block, frozen ones included (but not of whole numbers, or buffers)."""
    frozen = [t for t in tensors if isinstance(t, nn.Parameter) and t.is_floating_point() and not t.requires_grad]
    try:
        for t in frozen:
            t.requires_grad_(True)  # noqa: FBT003 (positional only)
        yield
    finally:
        for t in frozen:
            t.requires_grad_(False)  # noqa: FBT003


def precise(tensor: Tensor) -> torch.dtype:
    """Returns the type to add up in: the tensor's own, but never less than single precision."""
    return torch.promote_types(tensor.dtype, torch.float32)


def gradients(scalar: Tensor, tensors: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    """Returns the gradient of a scalar for each tensor that it depends on; its graph stays, as another loss may share it."""
    wanted = {name: t for name, t in tensors.items() if t.requires_grad}
    if not wanted:
        return {}
    take: Any = torch.autograd.grad
    found = take(scalar, list(wanted.values()), retain_graph=True, create_graph=create_graph, allow_unused=True)
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None}


def averaged(sums: Mapping[str, Tensor], batches: int) -> dict[str, Tensor]:
    """Returns sums over the batches of all processes, divided by how many there were."""
    count = torch.tensor(float(batches), dtype=torch.float64)
    *totals, batch_total = all_reduce_sum([*sums.values(), count])
    return {name: total / batch_total.item() for name, total in zip(sums, totals, strict=True)}


def _products(model: nn.Module, tensors: Mapping[str, Tensor], source: Source, add: Callable[[Mapping[str, Tensor]], None]) -> int:
    """Calls `add` with g w of every batch, for the tensors that its loss depends on; returns how many batches there were."""
    batches = 0

    def visit(loss: Tensor) -> None:
        nonlocal batches
        batches += 1
        found = gradients(loss, tensors)
        with torch.no_grad():
            add({name: g.to(precise(g)) * tensors[name] for name, g in found.items()})

    with turn(model), differentiable(tensors.values()):
        source.losses(model, visit)
    return batches


def _along(product: Tensor, dim: int) -> Tensor:
    """Returns the sums over all dimensions but one."""
    others = [d for d in range(product.ndim) if d != dim]
    return product.sum(others) if others else product
