"""Recording what one forward pass did, as a `torch.fx.Graph` of whole ATen operators.

A dispatch mode below autograd sees every operator before it is decomposed (`linear`, `conv2d`, `layer_norm`, attention stay whole)
while Python runs as it always does, so any control flow is followed, at the cost of one plain forward pass. Parameters are known by
identity, hence by their qualified names, wherever they are used; nodes carry the path of the module that ran them.

The recording has no side effect: training flags, buffers, cached attributes and the state of the random number generators are restored.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.contexts import below_autograd, module_paths, whole_attention
from graphprune.errors import GraphPruneError, InputError, TraceError
from graphprune.inputs import Inputs, normalise, undisturbed
from graphprune.ops import rule_for

_NODE = "_graphprune_node"


@dataclass(eq=False)
class Program:
    """A recorded forward pass.

    Attributes:
        graph: the operators, as calls of ATen overloads; each node has `meta["shapes"]` (one per output tensor), `meta["dtype"]`,
            `meta["module"]` and, for integer tensors that depend on nothing, `meta["tensor"]`.
        tensors: qualified name -> parameter or buffer that the program reads.
        parameters: names in `tensors` that may shrink: parameters and floating-point buffers.
        constants: name -> literal tensor that the program reads.
        aliases: other names of tied tensors -> the name used here.
        modules: qualified name -> module, for every module.
        inputs: what was passed.
        unused: parameters that the forward pass did not read.
    """

    graph: fx.Graph
    tensors: dict[str, torch.Tensor]
    parameters: set[str]
    constants: dict[str, torch.Tensor]
    aliases: dict[str, str]
    modules: dict[str, nn.Module]
    inputs: Inputs
    unused: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)


def record(
    model: nn.Module,
    example_inputs: object,
    *,
    training: bool = False,
    on_value: Callable[[fx.Node, torch.Tensor], None] | None = None,
    on_call: Callable[[], None] | None = None,
) -> Program:
    """Records one forward pass of `model` in eval mode.

    Args:
        model: any module; left as it was.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments).
        training: record what a training pass does instead (auxiliary heads run only then).
        on_value: called with every node and the tensor it produced (for diagnosis).
        on_call: called after every operator that was recorded.

    Raises:
        InputError: there are no inputs, or the model's own forward raises on them.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a torch.nn.Module is needed, not {type(model).__name__}", "Pass the model itself")
    inputs = normalise(example_inputs)
    with undisturbed(model), whole_attention(), below_autograd():
        recorder = _Recorder(model, inputs, on_value, on_call)
        args, kwargs = recorder.bind_inputs()
        for module in model.modules():
            module.training = training
        try:
            with module_paths(recorder.paths, recorder.entered, recorder.left), recorder:
                output = model(*args, **kwargs)
        except GraphPruneError:
            raise
        except Exception as error:
            raise _cannot_run(model, inputs, error, recorder.failed_in(error)) from error
        recorder.finish(output)
    return recorder.program()


def _cannot_run(model: nn.Module, inputs: Inputs, error: Exception, path: str) -> InputError:
    where = f" in {path!r}" if path else ""
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs.tensors())
    reason = " ".join(str(error).split())
    what = f"{type(model).__name__} cannot run on example inputs of shape {shapes}: {type(error).__name__}{where}: {reason}"
    return InputError(what.rstrip("."), "Pass inputs that model(...) accepts")


class _Recorder(TorchDispatchMode):
    """Turns every operator that passes into a node."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, on_value: Callable[[fx.Node, torch.Tensor], None] | None, on_call: Callable[[], None] | None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.inputs = inputs
        self.graph = fx.Graph()
        self.stack: list[str] = []
        self.ran: dict[str, None] = {}
        self.modules = dict(model.named_modules())
        self.paths = {id(m): n for n, m in reversed(list(self.modules.items()))}
        self.constants: dict[str, torch.Tensor] = {}
        self.on_value = on_value
        self.on_call = on_call
        self._decompose: dict[Any, bool] = {}
        self._external: dict[int, fx.Node | str] = {}
        self._alive: list[torch.Tensor] = []
        self._marked: list[weakref.ref[torch.Tensor]] = []
        self._failure: tuple[int, str] = (0, "")
        self._last_read: fx.Node | None = None
        self._register_tensors(model)

    # -- inputs, parameters, outputs ---------------------------------------------------------------------------------------------

    def _register_tensors(self, model: nn.Module) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.parameters: set[str] = set()
        storages: dict[tuple[Any, Any], str] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            known = self._external.get(id(tensor))
            if known is None and not tensor.is_meta and tensor.numel():
                key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
                other = storages.setdefault(key, name)
                if other != name and self.tensors[other].shape == tensor.shape and self.tensors[other].stride() == tensor.stride():
                    known = other
            if known is not None:
                self.aliases[name] = str(known)
                self._external[id(tensor)] = known
                continue
            self._external[id(tensor)] = name
            self.tensors[name] = tensor
            if isinstance(tensor, nn.Parameter) or (tensor.is_floating_point() or tensor.is_complex()):
                self.parameters.add(name)
        self._storages = {tensor.untyped_storage().data_ptr(): name for name, tensor in self.tensors.items() if not tensor.is_meta}
        self._used: dict[str, fx.Node] = {}

    def bind_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Makes a placeholder per argument; returns the arguments to call the model with."""
        inputs = self.inputs.copied()
        args, kwargs = inputs.args, inputs.kwargs
        names = _argument_names(self.model, len(args), list(kwargs))
        for name, value in zip(names, [*args, *kwargs.values()], strict=True):
            literal = isinstance(value, (int, float, bool, str, type(None)))
            node = self.graph.placeholder(name, default_value=value) if literal else self.graph.placeholder(name)
            node.meta.update(module="", shapes=[])
            self._bind(node, value)
        return args, kwargs

    def _bind(self, node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            self._external[id(value)] = node
            node.meta.update(shapes=[tuple(value.shape)], dtype=value.dtype, constant=False)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                self._bind_item(node, i, item)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._bind_item(node, key, item)

    def _bind_item(self, node: fx.Node, key: Any, item: object) -> None:
        if any(isinstance(v, torch.Tensor) for v in _leaves(item)):
            part = self.graph.call_function(operator.getitem, (node, key))
            part.meta.update(module="", shapes=[], placeholder=True)
            self._bind(part, item)

    def entered(self, path: str) -> None:
        """Notes that a module runs now."""
        self.ran[path] = None
        self.stack.append(path)

    def left(self, path: str) -> None:
        """Notes that a module was left; where an exception passes through several, the first of them is where it was raised."""
        self.stack.pop()
        error = sys.exc_info()[1]
        if error is not None and self._failure[0] != id(error):
            self._failure = (id(error), path)

    def failed_in(self, error: Exception) -> str:
        """Returns the path of the innermost module that an exception left."""
        return self._failure[1] if self._failure[0] == id(error) else ""

    def finish(self, output: object) -> None:
        """Records what the model returned, then takes the marks off tensors that outlive the recording."""
        self.graph.output(self._outputs(output))
        for reference in self._marked:
            tensor = reference()
            if tensor is not None:
                tensor.__dict__.pop(_NODE, None)

    def _outputs(self, value: Any) -> Any:
        """Returns the same structure with nodes in the tensors' places; what no graph can hold becomes None."""
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._wrapped(type(value), {f.name: self._outputs(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._wrapped(type(value), {k: self._outputs(getattr(value, k)) for k in value._fields})
        if isinstance(value, (list, tuple)):
            return type(value)(self._outputs(v) for v in value)
        if isinstance(value, dict):
            items = {k: self._outputs(v) for k, v in value.items()}
            return items if type(value) is dict else self._wrapped(type(value), items)
        return value if isinstance(value, (int, float, bool, str, torch.dtype, torch.device)) else None

    def _wrapped(self, kind: Any, items: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(kind, (), items)
        node.meta.update(module="", shapes=[])
        return node

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """Returns the node that produced a tensor: an operator, an input, a parameter or a literal."""
        known = self._external.get(id(tensor))
        if known is None:
            node = tensor.__dict__.get(_NODE)
            if node is not None and node[0] is self:
                return node[1]  # type: ignore[no-any-return]
            known = self._unknown(tensor)
        if isinstance(known, str):
            return self._read(known)
        return known

    def _unknown(self, tensor: torch.Tensor) -> str:
        """A tensor that no recorded operator made: the data of a parameter taken behind our back, or a literal."""
        self._alive.append(tensor)
        if not tensor.is_meta:
            owner = self._storages.get(tensor.untyped_storage().data_ptr())
            if owner is not None and tensor.numel():
                same = self.tensors[owner].shape == tensor.shape and self.tensors[owner].stride() == tensor.stride()
                if same:
                    self._external[id(tensor)] = owner
                    return owner
                raise TraceError(
                    f"{(self.stack[-1] if self.stack else '') or 'the model'!r} reads a view of {owner!r} made outside the forward pass",
                    "Make the view inside forward()",
                )
        name = f"constant_{len(self.constants)}"
        self.constants[name] = tensor
        self._external[id(tensor)] = name
        return name

    def _read(self, name: str) -> fx.Node:
        node = self._used.get(name)
        if node is None:
            tensor = self.tensors.get(name)
            constant = tensor is None
            tensor = self.constants[name] if tensor is None else tensor
            last = self._last_read or next(n for n in self.graph.nodes if n.op == "placeholder" and not _follows_placeholder(n))
            with self.graph.inserting_after(last):
                node = self.graph.create_node("get_attr", name)
            self._last_read = node
            node.meta.update(module=name.rpartition(".")[0], shapes=[tuple(tensor.shape)], dtype=tensor.dtype)
            node.meta["constant"] = constant or name not in self.parameters
            if node.meta["constant"] and not tensor.is_floating_point() and not tensor.is_meta:
                node.meta["tensor"] = tensor
            self._used[name] = node
        return node

    # -- operators ---------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._must_decompose(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        node_args, node_kwargs = self._lower(args), {k: self._lower(v) for k, v in kwargs.items()}
        node = self.graph.call_function(func, node_args, node_kwargs)
        path = self.stack[-1] if self.stack else ""
        constant = not any(not n.meta.get("constant", False) for n in node.all_input_nodes)
        node.meta.update(module=path, shapes=[], constant=constant)
        if isinstance(result, torch.Tensor):
            self._made(node, result)
        elif isinstance(result, (list, tuple)):
            self._made_many(node, result, path, constant=constant)
        if self.on_call is not None:
            self.on_call()
        return result

    def _made(self, node: fx.Node, tensor: torch.Tensor) -> None:
        node.meta["shapes"] = [tuple(tensor.shape)]
        node.meta["dtype"] = tensor.dtype
        if node.meta["constant"] and not tensor.is_floating_point() and not tensor.is_meta:
            node.meta["tensor"] = tensor
        if id(tensor) in self._external:
            self._external[id(tensor)] = node
        else:
            tensor.__dict__[_NODE] = (self, node)
            self._marked.append(weakref.ref(tensor))
        if self.on_value is not None:
            self.on_value(node, tensor)

    def _made_many(self, node: fx.Node, result: Any, path: str, *, constant: bool) -> None:
        for i, tensor in enumerate(result):
            node.meta["shapes"].append(tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ())
            if isinstance(tensor, torch.Tensor):
                part = self.graph.call_function(operator.getitem, (node, i))
                part.meta.update(module=path, constant=constant)
                self._made(part, tensor)

    def _must_decompose(self, func: Any) -> bool:
        known = self._decompose.get(func)
        if known is None:
            composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")  # noqa: SLF001
            known = self._decompose[func] = rule_for(func) is None and composite
        return known

    def _lower(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, (list, tuple)):
            return [self._lower(v) for v in value] if isinstance(value, list) else tuple(self._lower(v) for v in value)
        return value

    def program(self) -> Program:
        """Returns the finished recording."""
        used = {n: t for n, t in self.tensors.items() if n in self._used}
        unused = [n for n in self.tensors if n not in self._used and n in self.parameters and isinstance(self.tensors[n], nn.Parameter)]
        parameters = {n for n in self.parameters if n in used}
        constants = {n: t for n, t in self.constants.items() if n in self._used}
        return Program(self.graph, used, parameters, constants, self.aliases, self.modules, self.inputs, unused, list(self.ran))


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _argument_names(model: nn.Module, positional: int, keywords: list[str]) -> list[str]:
    """Returns one name per argument, those of the forward's signature where it has them."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [named[i] if i < len(named) else f"input_{i}" for i in range(positional)]
    return [*names, *keywords]


def _follows_placeholder(node: fx.Node) -> bool:
    """Returns whether the next node is a placeholder as well."""
    return node.next.op == "placeholder"
