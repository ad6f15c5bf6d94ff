"""What graphprune needs of PyTorch beyond its public names: all of it here, nothing of it anywhere else in the package.

Private names may move or vanish in any release. Each one says here what it is for and what there would be instead, and
`tests/test_torch_private.py` has a test for each that says what breaks without it. All are the same in every release from PyTorch 2.6 to
2.14, unless a line here says otherwise. Names that PyTorch has are spelled as there, without the underscore.

Operators whose names begin with an underscore (`aten::_softmax`) are no private names: rules are found by the text of the name, and a
release without the operator never calls them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvNd
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_current_modes
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from torch._C import FunctionSchema

__all__ = [
    "OWN_DICTS",
    "AutoDispatchBelowAutograd",
    "BatchNorm",
    "ConvNd",
    "ConvTransposeNd",
    "DisableTorchFunction",
    "NormBase",
    "OpOverload",
    "TorchDispatchMode",
    "add_hooks",
    "append_node",
    "argument_names",
    "disable_current_modes",
    "forward_hooks",
    "graph_printers",
    "is_composite",
    "is_mutable",
    "is_operator",
    "name_of",
    "own_buffers",
    "own_modules",
    "own_parameters",
    "pytree",
    "schema_of",
    "storage_key",
    "version_of",
]

# `BatchNorm`, `NormBase`, `ConvNd` and `ConvTransposeNd` are what all layers of one kind derive from, those of users among them. Instead of
# them: the public classes one by one, which a user's class beside them does not derive from.
#
# `pytree` walks nested tuples, lists, dicts and registered classes in the order that the exporters use. Instead of it: a walk of our own,
# which would know none of the classes that others have registered (outputs of transformers, for one).
#
# `TorchDispatchMode` is called for every operator that runs; a forward pass is recorded by one. The class is documented, its module is
# private. Instead of it: `torch.export`, which refuses whatever it cannot prove to be the same for all inputs.
#
# `disable_current_modes` lets operators run unseen while a mode is active, for tensors that are copied on the side. Instead of it: a flag
# in every mode of ours, which modes of others would not obey.


# -- operators ---------------------------------------------------------------------------------------------------------------------


def is_operator(target: object) -> TypeGuard[OpOverload]:
    """Returns whether what a node of a graph calls is an overload of an operator (and no function of Python).

    Instead of it: `callable(target)` and a look at the module that it comes from.
    """
    return isinstance(target, OpOverload)


def schema_of(overload: OpOverload) -> FunctionSchema:
    """Returns an overload's signature: name, arguments (type, default, whether it is written to), returns.

    Instead of it: parsing the text that PyTorch prints for an overload.
    """
    return overload._schema  # noqa: SLF001


def name_of(overload: OpOverload) -> str:
    """Returns the name of an overload's operator, such as "aten::conv2d", which all of its overloads share.

    Asked once per operator of every pass, so it is read where it is a string already; the schema makes one anew each time.
    """
    name: str = overload.overloadpacket._qualified_op_name  # noqa: SLF001
    return name


_ARGUMENTS: dict[OpOverload, tuple[str, ...]] = {}


def argument_names(overload: OpOverload) -> tuple[str, ...]:
    """Returns the names of an overload's arguments, in order; read from the schema once."""
    names = _ARGUMENTS.get(overload)
    if names is None:
        names = tuple(argument.name for argument in schema_of(overload).arguments)
        if isinstance(overload, OpOverload):  # what stands in an overload's place may keep a model alive
            _ARGUMENTS[overload] = names
    return names


def is_mutable(overload: OpOverload) -> bool:
    """Returns whether an overload writes into one of its arguments. Instead of it: the underscore at the end of most such names."""
    return schema_of(overload).is_mutable


def is_composite(overload: OpOverload) -> bool:
    """Returns whether PyTorch can take an operator apart into others, so that `overload.decompose` does.

    Instead of it: calling `decompose`, which runs the operator, and seeing whether it returns `NotImplemented`.
    """
    return torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeImplicitAutograd")  # noqa: SLF001


# -- graphs ------------------------------------------------------------------------------------------------------------------------


def append_node(
    graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, after: fx.Node | None = None
) -> fx.Node:
    """Appends a node behind another one (by default, at the end), and returns it.

    Instead of it: `Graph.create_node`, which does the same, and searches all arguments for symbolic numbers besides, of which a recording
    has none: that takes ten times as long as all else, per operator of every recording.
    """
    names = graph._graph_namespace  # noqa: SLF001
    name = names.create_name(graph._target_to_str(target), None)  # noqa: SLF001
    node = fx.Node(graph, name, op, target, args, kwargs or {})
    names.associate_name_with_obj(name, node)
    if after is None:
        graph._insert(node)  # noqa: SLF001
    else:
        after.append(node)
    graph._find_nodes_lookup_table.insert(node)  # noqa: SLF001
    graph._len += 1  # noqa: SLF001
    return node


# -- what runs, and who sees it ----------------------------------------------------------------------------------------------------

AutoDispatchBelowAutograd: Final[Any] = torch._C._AutoDispatchBelowAutograd  # noqa: SLF001
"""Context in which operators pass autograd by, so that a mode sees them before autograd takes them apart (`linear`, `conv2d`, `dropout`).

Instead of it: `torch.inference_mode`, whose tensors could never be trained with where a cache outside the model keeps one.
"""

DisableTorchFunction: Final[Any] = torch._C.DisableTorchFunction  # noqa: SLF001
"""Context in which methods of tensors are called as they are: no mode and no subclass is asked.

Instead of it: `torch._C.DisableTorchFunctionSubclass`, as private, which asks modes all the same.
"""


# -- modules and tensors -----------------------------------------------------------------------------------------------------------

OWN_DICTS: Final = ("_parameters", "_buffers")
"""The attributes in which every module keeps its parameters and buffers, which are no attributes of the user's."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the dict itself in which a module keeps its parameters, in the order in which it names them.

    Instead of it: `named_parameters(recurse=False)`, which has no order to change, and leaves out parameters that are None.
    """
    return module._parameters  # noqa: SLF001


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Returns the dict itself in which a module keeps its buffers.

    Instead of it: `register_buffer`, which would forget whether the buffer belongs to the state dict.
    """
    return module._buffers  # noqa: SLF001


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the dict itself in which a module keeps the modules inside it.

    Instead of it: `named_children`, which leaves out a module that stands in two places the second time.
    """
    return module._modules  # noqa: SLF001


def forward_hooks(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]:
    """Returns the dicts themselves in which a module keeps its forward hooks and its hooks before the forward pass.

    Instead of it: the handles that registering returned, which only the one who registered has.
    """
    return module._forward_hooks, module._forward_pre_hooks  # noqa: SLF001


def add_hooks(modules: Iterable[nn.Module], before: Callable[..., None], after: Callable[..., None]) -> Callable[[], None]:
    """Lets functions be called before and after modules run, ahead of their own hooks, the second also when they raise.

    Returns:
        What removes them.

    Instead of it: `register_forward_pre_hook` and `register_forward_hook`, which scripted modules refuse, and which take longer, for a
    model of small modules, than running it. The hooks of all modules at once, which PyTorch has too, are called by every thread.
    """
    key = RemovableHandle(OrderedDict()).id
    dicts: list[dict[int, Any]] = []
    for module in modules:
        both: tuple[tuple[Any, Any], ...] = ((module._forward_pre_hooks, before), (module._forward_hooks, after))  # noqa: SLF001
        for hooks, hook in both:
            hooks[key] = hook
            if len(hooks) > 1:
                hooks.move_to_end(key, last=False)
            dicts.append(hooks)
        module._forward_hooks_always_called[key] = True  # noqa: SLF001
        dicts.append(module._forward_hooks_always_called)  # noqa: SLF001

    def remove() -> None:
        for hooks in dicts:
            hooks.pop(key, None)

    return remove


def storage_key(storage: torch.UntypedStorage) -> int:
    """Returns a number that no other storage has while this one is alive, also where it has no memory (on the meta device).

    Instead of it: `data_ptr()`, which is 0 for all storages without memory.
    """
    key: int = storage._cdata  # noqa: SLF001
    return key


def version_of(tensor: torch.Tensor) -> int:
    """Returns how often a tensor has been written to, as far as PyTorch counts: writes through `.data` and inference tensors are left out.

    Instead of it: comparing all values.
    """
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001


# -- export ------------------------------------------------------------------------------------------------------------------------


def graph_printers() -> list[tuple[Any, str]]:
    """Returns owner and name of the function by which the recording exporter prints the graph that it failed on; none in some releases.

    It prints past Python's streams, and PyTorch switches that on in every export. Instead of it: turning off the process's own standard
    output while an export runs, that of other threads too.
    """
    return [(torch._C, name) for name in ("_jit_onnx_log",) if hasattr(torch._C, name)]  # noqa: SLF001
