"""What a program decides by the values that it computes: numbers that Python reads, sizes, choices, random draws.

Two runs whose values agree to the last bit but one may decide differently (a tie broken the other way), and a recording holds only one
outcome of each decision. So decisions are known by kind: channels that are mixed into a number stay, a `GraphModule` that would repeat a
decision is refused, and a verification lets both of its runs decide alike.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from graphprune.ops.registry import named_arguments
from graphprune.torch_private import name_of, schema_of
from graphprune.trace.inputs import tensors_in
from graphprune.trace.program import Kind, info

if TYPE_CHECKING:
    from torch import fx

    from graphprune.trace.program import Program

_NUMBERS = frozenset({"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::is_same_size"})
_STEPS = frozenset(
    f"aten::{name}"
    for name in ("round", "floor", "ceil", "trunc", "fix", "frac", "sign", "sgn", "heaviside", "floor_divide", "remainder", "fmod")
)
_SIZES = frozenset({"aten::nonzero_numpy", "aten::masked_select", "aten::unique_consecutive", "aten::bincount", "torchvision::nms"})
_SIZED_BY = {"aten::index": "indices", "aten::repeat_interleave": "repeats"}
_OFF = {"train": (False,), "training": (False,), "dropout_p": (0, None), "p": (0,), "dropout": (0,)}


def decision(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: object, *, constant: bool) -> Kind:
    """Returns what kind of decision an operator call is.

    Args:
        func: the ATen overload.
        args: what it was called with.
        kwargs: likewise.
        result: what it returned.
        constant: whether it depends on no input and no parameter, so that it decides the same in every run.

    Returns:
        "number" where Python gets a number; "size" where values decide a shape; "step" where small changes of floating-point values make
        large changes, or choose positions; "random" where random numbers are drawn; "" otherwise.
    """
    name = name_of(func)
    if is_seeded(func) and draws(func, args, kwargs):
        return "random"
    if constant:
        return ""
    if name in _NUMBERS:
        return "number"
    if _is_sized(func, name, args, kwargs):
        return "size"
    if any(not t.is_floating_point() and not t.is_complex() for t in tensors_in(result)) or name.removesuffix("_") in _STEPS:
        return "step" if any(t.is_floating_point() for t in tensors_in((args, kwargs))) else ""
    return ""


def sized_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors whose values decide the size of the result, where an operator has others besides; none elsewhere."""
    argument = _SIZED_BY.get(name_of(func), "")
    given = named_arguments(func, args, kwargs) if argument else {}
    return tensors_in(given.get(argument)) if "self" in given else []


def rounds_matter(kind: Kind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether rounding, or the state of the random number generator, may change what is decided."""
    return kind == "random" or (bool(kind) and any(t.is_floating_point() for t in tensors_in((args, kwargs))))


def is_delicate(program: Program) -> bool:
    """Returns whether rounding or random numbers may change which values a program computes."""
    return any(info(node).delicate for node in program.graph.nodes)


def decisions_of(program: Program, kinds: tuple[Kind, ...]) -> list[fx.Node]:
    """Returns the operators of a program that take decisions of these kinds."""
    return [node for node in program.graph.nodes if info(node).decides in kinds]


def operators_of(program: Program) -> list[tuple[object, ...]]:
    """Returns a program's operators with the modules that ran them and the parameters that they read: equal where the paths are."""
    calls = (n for n in program.graph.nodes if n.op == "call_function" and info(n).operator)
    return [(n.target, info(n).module, *(a.target for a in n.all_input_nodes if a.op == "get_attr")) for n in calls]


@functools.lru_cache(maxsize=4096)
def is_seeded(func: Any) -> bool:
    """Returns whether an operator is of those that draw from a random number generator."""
    return torch.Tag.nondeterministic_seeded in func.tags


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a call of such an operator draws: not that of dropout that is switched off."""
    defaults = {a.name: a.default_value for a in schema_of(func).arguments if a.has_default_value()}
    given = {**defaults, **named_arguments(func, args, kwargs)}
    return not any(name in given and not isinstance(given[name], torch.Tensor) and given[name] in off for name, off in _OFF.items())


def _is_sized(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in {"aten::index_put", "aten::index_put_", "aten::_unsafe_index"}:
        return False
    if name == "aten::index":
        places = named_arguments(func, args, kwargs).get("indices")
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(places))
    if name == "aten::one_hot":
        return bool(named_arguments(func, args, kwargs).get("num_classes", -1) == -1)
    if name == "aten::repeat_interleave":
        given = named_arguments(func, args, kwargs)
        return isinstance(given.get("repeats"), torch.Tensor) and given.get("output_size") is None
    if name == "aten::tensor_split":
        return len(tensors_in((args, kwargs))) > 1
    return name in _SIZES or (name == "aten::where" and len(args) == 1) or torch.Tag.dynamic_output_shape in func.tags
