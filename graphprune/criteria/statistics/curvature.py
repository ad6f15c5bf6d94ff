"""The diagonal of the Hessian of the loss, estimated with random vectors.

Hutchinson's estimator in the form of Bekas, Kokiopoulou and Saad (An estimator for the diagonal of a matrix, 2007): diag(H) = E[v * (H v)]
for v of independent signs. H v is a second backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphprune.criteria.statistics.gradients import averaged, differentiable, gradients, named, precise
from graphprune.data.distributed import rank
from graphprune.errors import ConfigError, InputError

if TYPE_CHECKING:
    from graphprune.data.sources import Source

_RANKS_APART = 1_000_003  # processes draw different vectors for their different batches


def observe_curvature(model: nn.Module, parameters: Iterable[str], source: Source, probes: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Returns parameter name -> the mean over batches of the Hessian's diagonal, in the parameter's shape and at least float32.

    Each batch is given new vectors, over all the parameters together. The estimate is exact where the Hessian is diagonal; otherwise its
    variance falls with the number of batches times probes. Elements that the loss does not depend on count zero.

    Args:
        model: left as it was.
        parameters: qualified names.
        source: the losses.
        probes: vectors per batch.
        seed: of the vectors; PyTorch's global random numbers are not used.

    Raises:
        ConfigError: the model has no parameter of a name, there is no loss, or `probes` is below 1.
        InputError: there are no batches, a loss cannot be used, or an operator of the model has no second derivative.
    """
    if probes < 1:
        raise ConfigError(f"the number of probes of the Hessian diagonal is {probes}", "Use at least 1")
    tensors = named(model, parameters)
    sums = {name: torch.zeros_like(t, dtype=precise(t), requires_grad=False) for name, t in tensors.items()}
    generator = torch.Generator().manual_seed(seed + _RANKS_APART * rank())
    batches = 0

    def visit(loss: Tensor) -> None:
        nonlocal batches
        batches += 1
        try:
            _add(loss, tensors, sums, probes, generator)
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            what = f"the criterion HessianDiagonal needs second derivatives of the loss, which an operator does not have: {reason}"
            fix = "Write that operator with ones that have them (the math backend of attention, recurrent cells without fused kernels), "
            raise InputError(what, f"{fix}or use a criterion of first order such as Taylor") from error

    with differentiable(tensors.values()), _twice_differentiable(model):
        source.losses(model, visit)
    return averaged(sums, batches)


def _add(loss: Tensor, tensors: Mapping[str, Tensor], sums: dict[str, Tensor], probes: int, generator: torch.Generator) -> None:
    """Adds the estimate of one batch."""
    first = {name: g for name, g in gradients(loss, tensors, create_graph=True).items() if g.requires_grad}
    _require_second(list(first.values()))
    for _ in range(probes):
        vectors = {name: signs(t, generator) for name, t in tensors.items()}
        if not first:  # the loss is linear in all of them
            continue
        along = torch.stack([(g * vectors[name]).sum().to(loss.device) for name, g in first.items()]).sum()
        for name, product in gradients(along, tensors).items():
            sums[name] += (product * vectors[name]).detach().to(sums[name].dtype) / probes


def _require_second(first: list[Tensor]) -> None:
    """Raises what an operator raises that is differentiable once only.

    Its node in the graph of the gradients is a dead end, which leads to no parameter, so that autograd never runs it and takes what it
    should have contributed for zero.
    """
    todo = [g.grad_fn for g in first]
    met: set[Any] = set()
    while todo:
        node: Any = todo.pop()
        if node is not None and node not in met:
            met.add(node)
            if node.name().endswith("::Error"):
                node(torch.zeros(()))
            todo += [n for n, _ in node.next_functions]


def signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a tensor of independent -1 and 1, each with probability 1/2 (Rademacher), like the given one."""
    drawn = torch.randint(2, tensor.shape, generator=generator)
    return (2 * drawn - 1).to(tensor.device, tensor.dtype)


@contextmanager
def _twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Keeps away fused kernels that have a first derivative only: those of attention, and of recurrent layers where there are any."""
    with ExitStack() as settings:
        settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
            for backend in backends:
                settings.callback(setattr, backend, "enabled", backend.enabled)
                backend.enabled = False
        yield
