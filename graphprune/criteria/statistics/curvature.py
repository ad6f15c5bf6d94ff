"""The diagonal of the Hessian of the loss, estimated with random vectors.

Hutchinson's estimator in the form of Bekas, Kokiopoulou and Saad (An estimator for the diagonal of a matrix, 2007): diag(H) = E[v * (H v)]
for v of independent signs. H v is a second backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from graphprune.criteria.statistics.gradients import averaged, differentiable, gradients, named, precise
from graphprune.data.distributed import rank
from graphprune.errors import ConfigError, InputError
from graphprune.torch_private import pytree
from graphprune.trace.turns import turn

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

    with turn(model), differentiable(tensors.values()), _twice_differentiable(model):
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
    """Keeps away fused kernels that have a first derivative only, those of attention and of recurrent layers, in this thread.

    cuDNN's recurrent layers can only be switched off for the whole process.
    """
    with ExitStack() as settings:
        settings.enter_context(_Unfused())
        on_gpu = any(p.is_cuda for m in model.modules() if isinstance(m, nn.RNNBase) for p in m.parameters())
        if on_gpu and torch.backends.cudnn.enabled:
            settings.callback(setattr, torch.backends.cudnn, "enabled", True)  # noqa: FBT003 (setattr takes no keywords)
            torch.backends.cudnn.enabled = False
        yield


class _Unfused(TorchFunctionMode):
    """Runs attention and recurrent layers by kernels that can be differentiated twice.

    PyTorch's own switches would have other threads run other kernels as well, whose results differ in their last bits.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function in question, or what computes the same."""
        given = kwargs or {}
        if func in _ATTENTION:
            return _attention(*args, **given)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention()(*args, **given)
        if func in _RECURRENT and not args[0].is_cuda and args[0].is_floating_point():
            return _in_double(func, args, given)
        return func(*args, **given)


_SDPA = torch.ops.aten.scaled_dot_product_attention
_ATTENTION = (F.scaled_dot_product_attention, _SDPA, _SDPA.default)
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Returns what `scaled_dot_product_attention` does, by its definition."""
    result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]  # noqa: SLF001 (an operator like any other)
    return result


@functools.cache
def _multi_head_attention() -> FunctionType:
    """Returns `multi_head_attention_forward`, which calls attention where no mode sees it, with `_attention` in its place."""
    function = F.multi_head_attention_forward
    names = {**function.__globals__, "scaled_dot_product_attention": _attention}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _in_double(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs recurrent layers in double precision, for which the CPU has no fused kernel."""
    kind = args[0].dtype
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    return pytree.tree_map_only(Tensor, lambda t: t.to(kind) if t.is_floating_point() else t, func(*args, **kwargs))
