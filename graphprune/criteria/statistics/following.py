"""Following a model's operators, on any batch, along the recording whose labels are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from graphprune.errors import InputError
from graphprune.groups.propagate import operators
from graphprune.torch_private import is_operator, name_of
from graphprune.trace.inputs import place
from graphprune.trace.program import info
from graphprune.trace.recorder import record

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.trace.inputs import Inputs
    from graphprune.trace.program import Program

Look: TypeAlias = "Callable[[fx.Node, tuple[Any, ...], dict[str, Any], Any], None]"
"""From a recorded operator to nothing: is given the arguments and the result of the same operator on a batch, right after it ran."""

_FIX = "Pass batches that take the same path as the example inputs, or example inputs like the batches"


def follow(model: nn.Module, inputs: Inputs, program: Program, look: Look) -> None:
    """Runs a model on a batch, in eval mode and leaving it as it was, and shows every operator to `look`.

    Raises:
        InputError: the model cannot run on the batch, or runs other operators on it than those recorded.
    """
    recorded = operators(program)

    def runner(node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        twin = next(recorded, None)
        if twin is None or twin.target is not node.target or info(twin).module != info(node).module:
            expected = "nothing more" if twin is None else named(twin)
            what = f"a batch takes another path through the model than the example inputs did: {named(node)} runs where they ran {expected}"
            raise InputError(what, _FIX)
        result = args[0] if info(node).whole else func(*args, **kwargs)
        look(twin, args, kwargs, result)
        return result

    record(model, inputs, runner=runner)
    left = next(recorded, None)
    if left is not None:
        raise InputError(f"a batch takes another path through the model than the example inputs did: {named(left)} does not run", _FIX)


def name(node: fx.Node) -> str:
    """Returns the name of a recorded operator, such as "aten::relu", whichever its overload and also where it works in place."""
    target: Any = node.target
    full = name_of(target)
    return full[:-1] if full.endswith("_") and not full.endswith("__") else full


def named(node: fx.Node) -> str:
    """Returns operator and place of a node, as messages and reports name them."""
    target: Any = node.target
    operator = name_of(target).removeprefix("aten::") if is_operator(target) else node.name
    return f"{operator} in {place(info(node).module)}"
