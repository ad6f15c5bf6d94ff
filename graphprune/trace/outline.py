"""What operators a forward pass runs, without a graph of them: enough to tell whether two models run alike, at a fraction of the time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from graphprune.ops import rule_for
from graphprune.torch_private import OpOverload, TorchDispatchMode, is_composite
from graphprune.trace.caches import without_caches
from graphprune.trace.contexts import below_autograd, values_taken, whole_attention
from graphprune.trace.inputs import Inputs, preserve_state
from graphprune.trace.members import Members
from graphprune.trace.outputs import output_tensors

if TYPE_CHECKING:
    from graphprune.trace.program import Program, Where

Calls: TypeAlias = "list[tuple[Any, list[float]]]"
"""The operators in the order of execution, each with its fractional arguments.

Of what they return in lists, any number may be picked. `contiguous` is left out: PyTorch skips it where the layout is the wanted one
already, as that of a single head is. So is `detach`, which does nothing here: PyTorch calls it by itself on new tensors that others hold.
"""

Observe: TypeAlias = "Callable[[OpOverload, tuple[Any, ...], dict[str, Any], Any], None]"
"""Is given every operator with its arguments and its result, right after it ran."""

_SKIPPED = (operator.getitem, torch.ops.aten.contiguous.default, torch.ops.aten.detach.default)


@dataclass(frozen=True, eq=False)
class Outline:
    """What one forward pass did.

    Attributes:
        calls: the operators.
        outputs: copies of the tensors that the model returned, in order.
    """

    calls: Calls
    outputs: list[Tensor]


def outline(
    model: nn.Module,
    inputs: Inputs,
    caches: list[Where] | None = None,
    observe: Observe | None = None,
    members: Members | None = None,
    *,
    draws: bool = False,
) -> Outline:
    """Runs a model in eval mode, leaving it as it was, and returns what it did; its exceptions pass as they are.

    It sees what `record` sees, in the same contexts.

    Args:
        model: any module whose tensors have values.
        inputs: to run it on.
        caches: where the model keeps tensors of earlier runs, if that is known; found by trying otherwise.
        observe: called with every operator.
        members: the model's modules and tensors, if they have been gathered already.
        draws: whether the model may draw random numbers, see `preserve_state`.
    """
    members = members or Members.of(model)
    with preserve_state(model, members, draws=draws), without_caches(model, inputs, members, caches), whole_attention(), below_autograd():
        mode, own = _Outliner(observe), inputs.copied()
        with values_taken(mode.take), mode:
            output = own.call(model)
        return Outline(mode.calls, [tensor.detach().clone() for tensor in output_tensors(output)])


def calls_of(program: Program) -> Calls:
    """Returns the operators of a recording."""
    calls = (n for n in program.graph.nodes if n.op == "call_function" and n.target not in _SKIPPED)
    return [(n.target, _all_fractions(n.args, n.kwargs)) for n in calls]


class _Outliner(TorchDispatchMode):
    """Notes every operator that passes."""

    def __init__(self, observe: Observe | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Calls = []
        self._observe = observe
        self._decompose: dict[Any, bool] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, as for the recorder."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = self._decompose.get(func)
        if known is None:
            known = self._decompose[func] = rule_for(func) is None and is_composite(func)
        if known:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func not in _SKIPPED:
            self.calls.append((func, _all_fractions(args, kwargs)))
        if self._observe is not None:
            self._observe(func, args, kwargs, result)
        return result

    def take(self, tensor: Tensor) -> Tensor:
        """Notes that Python takes the values of a whole tensor, as the recorder does."""
        self.calls.append((torch.ops.aten.item.default, []))
        return tensor


def _all_fractions(args: Any, kwargs: Any) -> list[float]:
    found = list(_fractions(args))
    for value in kwargs.values():
        found += _fractions(value)
    return found


def _fractions(value: Any) -> Iterator[float]:
    """Yields the fractions among nested arguments, in order."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, float):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _fractions(item)
