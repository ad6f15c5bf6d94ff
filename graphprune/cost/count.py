"""What a model costs: parameters and multiply-accumulates (MACs), in all and module by module.

Parameters are the elements of all distinct parameters: a tied parameter counts once, buffers do not count.

MACs are half of the floating-point operations that `torch.utils.flop_counter` counts in one forward pass, for the whole batch of the
example inputs. It counts convolutions, matrix products (linear layers, bmm, einsum and what else ends in mm, addmm, bmm or baddbmm) and
scaled-dot-product attention; additions of biases, norms, activations and pooling count nothing. Published figures are for a batch of
one: pass such a batch to compare.

The forward pass is a real one. A fake or meta pass takes about two thirds of its time for one image, but what it computes must
not stay behind, and a function that caches its results keeps them out of our reach. A model too large for memory may be built on the
meta device; its inputs may have values all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from graphprune.trace.contexts import whole_attention
from graphprune.trace.inputs import normalise, preserve_state, run
from graphprune.trace.meta_device import shapes_suffice

if TYPE_CHECKING:
    from typing_extensions import Self

_aten = torch.ops.aten


@dataclass(frozen=True)
class CostRatio:
    """What one cost is of another, as fractions; 1.0 where both are zero.

    Attributes:
        params: the fraction of the parameters.
        macs: the fraction of the multiply-accumulates.
    """

    params: float
    macs: float


@dataclass(frozen=True)
class Cost:
    """The size of a model and the work of one forward pass.

    Attributes:
        params: elements of all distinct parameters.
        macs: multiply-accumulates for the whole batch that was passed.
    """

    params: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        """Returns the cost of both together."""
        return Cost(self.params + other.params, self.macs + other.macs)

    def __sub__(self, other: Cost) -> Cost:
        """Returns what remains of this cost without the other: ``before - after`` is what was saved."""
        return Cost(self.params - other.params, self.macs - other.macs)

    def relative_to(self, dense: Cost) -> CostRatio:
        """Returns this cost as fractions of another: ``after.relative_to(before)`` is what is left."""
        return CostRatio(_fraction(self.params, dense.params), _fraction(self.macs, dense.macs))

    def to_dict(self) -> dict[str, int]:
        """Returns the two numbers by name, for JSON."""
        return asdict(self)


def count(model: nn.Module, example_inputs: Any) -> Cost:
    """Returns the parameters of a model and the MACs of one forward pass in inference mode; the model stays as it was.

    Args:
        model: any module, on any device.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs).

    Raises:
        InputError: if the example inputs are missing, or the model cannot be run on them.
    """
    inputs = normalise(example_inputs).copied()
    with preserve_state(model), _counting() as counter, shapes_suffice(model, inputs.tensors()):
        run(model, inputs)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), _macs(counter))


def count_by_module(model: nn.Module, example_inputs: Any) -> dict[str, Cost]:
    """Returns the cost of each module by its qualified name, without that of the modules inside it; they add up to `count`.

    Work outside any module of the model's own belongs to the innermost module whose forward does it, "" being the model itself. A module
    or parameter that has several names goes by its first. Modules that cost nothing are left out.

    Args:
        model: any module, on any device.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (args, kwargs).

    Raises:
        InputError: if the example inputs are missing, or the model cannot be run on them.
    """
    inputs = normalise(example_inputs).copied()
    macs = dict.fromkeys((name for name, _ in model.named_modules()), 0)
    with preserve_state(model), _counting() as counter, shapes_suffice(model, inputs.tensors()), _attributing(model, counter, macs):
        run(model, inputs)
    params = dict.fromkeys(macs, 0)
    for name, parameter in model.named_parameters():
        params[name.rpartition(".")[0]] += parameter.numel()
    return {name: Cost(params[name], macs[name]) for name in macs if params[name] or macs[name]}


@contextmanager
def _attributing(model: nn.Module, counter: FlopCounterMode, macs: dict[str, int]) -> Iterator[None]:
    """Adds what is counted inside the block to the module that is innermost at the time.

    FlopCounterMode's own figures per module go by the class name of a module that its parent does not call itself, so that two such
    modules share one figure.
    """
    me = get_ident()
    stack = [""]
    seen = 0

    def settle() -> None:
        nonlocal seen
        now = _macs(counter)
        macs[stack[-1]] += now - seen
        seen = now

    def enter(name: str, *_: object) -> None:
        if get_ident() == me:
            settle()
            stack.append(name)

    def leave(*_: object) -> None:
        if get_ident() == me:
            settle()
            stack.pop()

    with ExitStack() as handles:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks: what it does belongs to the module around it
            handles.callback(module.register_forward_pre_hook(partial(enter, name), prepend=True).remove)
            handles.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
        settle()


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Counts operations of this thread inside the block, without the fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer."""
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    counter.mod_tracker = _NoTracker()
    with whole_attention(), counter:
        yield counter


class _NoTracker(ModuleTracker):
    """Follows no modules, in place of what does so with hooks on the modules of all threads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _formulas() -> dict[Any, Any]:
    """Returns the formulas for the kernels that FlopCounterMode lacks, of attention and of recurrent layers, by operator."""
    attention = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    formulas: dict[str, Callable[..., int]] = {**dict.fromkeys(attention, _attention_flops), "mkldnn_rnn_layer": _layer_flops}
    formulas |= dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), recurrent_flops)
    return {getattr(_aten, name): formula for name, formula in formulas.items() if hasattr(_aten, name)}


def _layer_flops(inputs: torch.Size, weights: torch.Size, recurrent: torch.Size, *_: object, **__: object) -> int:
    """Returns the operations of one recurrent layer in one direction: both of its matrices are applied at each step of each sequence."""
    return 2 * inputs[:-1].numel() * (weights.numel() + recurrent.numel())


def recurrent_flops(inputs: torch.Size, weights: Sequence[torch.Size], *_: object, **__: object) -> int:
    """Returns the operations of recurrent layers, given all their parameters: matrices, and vectors, which are added."""
    return 2 * inputs[:-1].numel() * sum(shape.numel() for shape in weights if len(shape) == 2)


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    """Returns the operations of softmax(Q Kᵀ) V for queries (…, L, d), keys (…, S, d) and values (…, S, v): 2 … L S (d + v)."""
    length, width = query[-2:]
    return 2 * query[:-2].numel() * length * key[-2] * (width + value[-1])


def _macs(counter: FlopCounterMode) -> int:
    """Returns the multiply-accumulates counted so far: half the operations."""
    return counter.get_total_flops() // 2


def _fraction(part: int, whole: int) -> float:
    """Returns part over whole, 1 if both are nothing."""
    return part / whole if whole else inf if part else 1.0
