"""Recording what one forward pass did, as a `torch.fx.Graph` of whole ATen operators.

A dispatch mode below autograd sees every operator before it is decomposed (`linear`, `conv2d`, `layer_norm`, attention stay whole)
while Python runs as it always does, so any control flow is followed, at the cost of one plain forward pass. Parameters are known by
identity, hence by their qualified names, wherever they are used; nodes carry the path of the module that ran them.

The recording has no side effect: training flags, buffers, cached attributes and the state of the random number generators are restored.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphprune.errors import GraphPruneError, InputError, TraceError
from graphprune.ops import rule_for
from graphprune.trace.caches import without_caches
from graphprune.trace.contexts import below_autograd, module_paths, values_taken, whole_attention
from graphprune.trace.data_dependent import decision, rounds_matter, sized_by
from graphprune.trace.inputs import Inputs, argument_names, cannot_run, map_outputs, normalise, place, preserve_state
from graphprune.trace.meta_device import PYTHON, MetaExecutor, is_about_values, literals, unreadable
from graphprune.trace.probe import Recorded
from graphprune.trace.program import Program

_NODE = "_graphprune_node"


Runner: TypeAlias = Callable[[fx.Node, Any, tuple[Any, ...], dict[str, Any]], Any]
"""From a node and the operator's arguments to its result (for `meta["whole"]`, the tensor whose values Python takes)."""


def record(
    model: nn.Module,
    example_inputs: object,
    *,
    training: bool = False,
    on_value: Callable[[fx.Node, torch.Tensor], None] | None = None,
    on_call: Callable[[], None] | None = None,
    on_output: Callable[[object], None] | None = None,
    runner: Runner | None = None,
) -> Program:
    """Records one forward pass of `model` in eval mode.

    Args:
        model: any module; left as it was.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments).
        training: record what a training pass does instead (auxiliary heads run only then).
        on_value: called with every node and the tensor it produced (for diagnosis).
        on_call: called after every operator that was recorded.
        on_output: called with what the model returned.
        runner: runs the operators in PyTorch's place.

    Raises:
        InputError: there are no inputs, or the model's own forward raises on them.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a torch.nn.Module is needed, not {type(model).__name__}", "Pass the model itself")
    inputs = normalise(example_inputs)
    with preserve_state(model), without_caches(model, inputs), whole_attention(), below_autograd():
        recorder = _Recorder(model, inputs, on_value, on_call)
        recorder.runner = runner
        args, kwargs = recorder.bind_inputs()
        for module in model.modules():
            module.training = training
        try:
            with (
                module_paths(recorder.paths, recorder.entered, recorder.left),
                literals(recorder.weightless),
                values_taken(recorder.take),
                recorder,
            ):
                output = model(*args, **kwargs)
        except GraphPruneError:
            raise
        except Exception as error:
            if recorder.weightless is not None and is_about_values(error):
                raise unreadable(PYTHON, place(recorder.failed_in(error)), "") from error
            raise cannot_run(model, inputs, error, recorder.failed_in(error)) from error
        if on_output is not None:
            on_output(output)
        recorder.finish(output)
    return recorder.program()


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
        self.runner: Runner | None = None
        self._decompose: dict[Any, bool] = {}
        self._external: dict[int, fx.Node | str] = {}
        self._alive: list[torch.Tensor] = []
        self._marked: list[weakref.ref[torch.Tensor]] = []
        self._failure: tuple[int, str] = (0, "")
        self._last_read: fx.Node | None = None
        self._register_tensors(model)
        self.weightless = MetaExecutor.running(model, inputs.tensors(), self.node_of, lambda: place(self.stack[-1] if self.stack else ""))

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
        names = argument_names(self.model, len(args), list(kwargs))
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
        if any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(item)):
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
        self.graph.output(map_outputs(output, self.node_of, self._wrapped))
        for reference in self._marked:
            tensor = reference()
            if tensor is not None:
                tensor.__dict__.pop(_NODE, None)

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
        node = self._call(func, args, kwargs)
        result = self._run(node, func, args, kwargs)
        node.meta["decides"] = kind = decision(func, args, kwargs, result, constant=self._decides_nothing(node, func, args, kwargs))
        node.meta["delicate"] = rounds_matter(kind, args, kwargs)
        if isinstance(result, (bool, int, float, complex)):
            node.meta["value"] = result
        constant = node.meta["constant"] = node.meta["constant"] and (kind != "random" or kwargs.get("generator") is not None)
        path = node.meta["module"]
        if not constant and rule_for(func) is None:
            with torch.utils._python_dispatch._disable_current_modes():  # noqa: SLF001 (copying the tensors is no part of the program)
                node.meta["recorded"] = Recorded.of(func, args, kwargs)
        if isinstance(result, torch.Tensor):
            self._made(node, result)
        elif isinstance(result, (list, tuple)):
            self._made_many(node, result, path, constant=constant)
        if self.on_call is not None:
            self.on_call()
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(func, self._lower(args), {k: self._lower(v) for k, v in kwargs.items()})
        constant = not any(not n.meta.get("constant", False) for n in node.all_input_nodes)
        node.meta.update(module=self.stack[-1] if self.stack else "", shapes=[], constant=constant)
        return node

    def _run(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            called = func if self.weightless is None else self.weightless.operator(func)
            return called(*args, **kwargs) if self.runner is None else self.runner(node, called, args, kwargs)
        except Exception:
            self.graph.erase_node(node)
            raise

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Notes that Python takes the values of a whole tensor; returns the tensor to take them from."""
        func = torch.ops.aten.item.default
        if self.weightless is not None:
            self.weightless.require(tensor)
        node = self._call(func, (tensor,), {})
        node.meta["whole"] = True
        node.meta["decides"] = kind = decision(func, (tensor,), {}, None, constant=node.meta["constant"])
        node.meta["delicate"] = rounds_matter(kind, (tensor,), {})
        with torch.utils._python_dispatch._disable_current_modes():  # noqa: SLF001 (what is copied here is no part of the program)
            node.meta["value"] = None if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta else tensor.detach().clone()
            taken: torch.Tensor = tensor if self.runner is None else self.runner(node, func, (tensor,), {})
        if self.on_call is not None:
            self.on_call()
        return taken

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

    def _decides_nothing(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether what a call decides is the same in every run: all of its tensors are constants, or those that decide are."""
        deciding = sized_by(func, args, kwargs)
        return bool(node.meta["constant"] or (deciding and all(self.node_of(t).meta.get("constant") for t in deciding)))

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


def node_behind(tensor: torch.Tensor) -> fx.Node | None:
    """Returns the node that made a tensor in the recording now running (None for inputs, parameters and literals)."""
    found = tensor.__dict__.get(_NODE)
    return None if found is None else found[1]


def _follows_placeholder(node: fx.Node) -> bool:
    """Returns whether the next node is a placeholder as well."""
    return node.next.op == "placeholder"
