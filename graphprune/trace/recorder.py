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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from graphprune.errors import GraphPruneError, InputError, TraceError
from graphprune.ops import rule_for
from graphprune.torch_private import TorchDispatchMode, append_node, disable_current_modes, is_composite, pytree
from graphprune.trace.caches import without_caches
from graphprune.trace.contexts import below_autograd, module_paths, values_taken, whole_attention
from graphprune.trace.data_dependent import decision, draws, is_seeded, rounds_matter, sized_by
from graphprune.trace.inputs import Inputs, argument_names, cannot_run, gpus_of, map_outputs, normalise, place, preserve_state
from graphprune.trace.members import Members
from graphprune.trace.meta_device import PYTHON, MetaExecutor, is_about_values, literals, shapes_suffice, unreadable
from graphprune.trace.outputs import output_tensors
from graphprune.trace.probe import Recorded
from graphprune.trace.program import NodeInfo, Program, Where, info, set_info
from graphprune.trace.threads import forked_generators
from graphprune.trace.turns import in_turn, turn

_NODE = "_graphprune_node"


Runner: TypeAlias = Callable[[fx.Node, Any, tuple[Any, ...], dict[str, Any]], Any]
"""From a node and the operator's arguments to its result (where `NodeInfo.whole` is set, the tensor whose values Python takes)."""


@in_turn
def record(
    model: nn.Module,
    example_inputs: object,
    *,
    training: bool = False,
    on_value: Callable[[fx.Node, torch.Tensor], None] | None = None,
    on_call: Callable[[], None] | None = None,
    runner: Runner | None = None,
    caches: list[Where] | None = None,
    members: Members | None = None,
) -> Program:
    """Records one forward pass of `model` in eval mode.

    Args:
        model: any module; left as it was.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments).
        training: record what a training pass does instead (auxiliary heads run only then).
        on_value: called with every node and the tensor it produced (for diagnosis).
        on_call: called after every operator that was recorded.
        runner: runs the operators in PyTorch's place.
        caches: where the model keeps tensors of earlier runs, if that is known; found by trying otherwise.
        members: the model's modules and tensors, if they have been gathered already.

    Raises:
        InputError: there are no inputs, or the model's own forward raises on them.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a torch.nn.Module is needed, not {type(model).__name__}", "Pass the model itself")
    inputs = normalise(example_inputs)
    members = members or Members.of(model)
    with (
        _changes_confirmed(model, inputs, training=training),
        preserve_state(model, members, training=training, draws=False),
        without_caches(model, inputs, members, caches) as emptied,
        whole_attention(),
        below_autograd(),
        ExitStack() as generators,
    ):
        recorder = _Recorder(model, inputs, members, on_value, on_call)
        recorder.runner = runner
        args, kwargs = recorder.bind_inputs()
        recorder.before_drawing = lambda: generators.enter_context(forked_generators(gpus_of(members)))
        try:
            with (
                module_paths(members.distinct, recorder.paths, recorder.entered, recorder.left),
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
        recorder.finish(output)
    return recorder.program(emptied)


@contextmanager
def _changes_confirmed(model: nn.Module, inputs: Inputs, *, training: bool) -> Iterator[None]:
    """Runs a model again that was not the same after a pass: what it changed itself, it changes every time; the turn on it compares."""
    with turn(model) as mine:
        try:
            yield
        finally:
            if mine.unconfirmed(training=training):
                with (
                    preserve_state(model, training=training),
                    shapes_suffice(model, inputs.tensors()),
                    suppress(Exception),  # what it changed until then is all that is asked for
                ):
                    inputs.copied().call(model)


class _Recorder(TorchDispatchMode):
    """Turns every operator that passes into a node."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        members: Members,
        on_value: Callable[[fx.Node, torch.Tensor], None] | None,
        on_call: Callable[[], None] | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.inputs = inputs
        self.outputs: list[torch.Tensor] = []
        self.graph = fx.Graph()
        self.stack: list[str] = []
        self.ran: dict[str, None] = {}
        self.modules = members.first_names
        self.paths = {id(m): n for n, m in self.modules.items()}
        self.constants: dict[str, torch.Tensor] = {}
        self.on_value = on_value
        self.on_call = on_call
        self.runner: Runner | None = None
        self.before_drawing: Callable[[], object] | None = None
        self._decompose: dict[Any, bool] = {}
        self._external: dict[int, fx.Node | str] = {}
        self._alive: list[torch.Tensor] = []
        self._marked: list[weakref.ref[torch.Tensor]] = []
        self._failure: tuple[int, str] = (0, "")
        self._last_read: fx.Node | None = None
        self._last_input: fx.Node | None = None
        self._register_tensors(members)
        self.weightless = MetaExecutor.running(members, inputs.tensors(), self.node_of, lambda: place(self.stack[-1] if self.stack else ""))

    # -- inputs, parameters, outputs ---------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False: wrapping the dispatch against compilation would import the compiler, for nothing: nothing is compiled here."""
        return False

    def _register_tensors(self, members: Members) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.parameters: set[str] = set()
        storages: dict[tuple[Any, Any], str] = {}
        for name, tensor in members.tensors:
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
            set_info(node, NodeInfo())
            self._last_input = node
            self._bind(node, value)
        return args, kwargs

    def _bind(self, node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            self._external[id(value)] = node
            known = info(node)
            known.shapes, known.dtype = [tuple(value.shape)], value.dtype
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                self._bind_item(node, i, item)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._bind_item(node, key, item)

    def _bind_item(self, node: fx.Node, key: Any, item: object) -> None:
        if any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(item)):
            part = self.graph.call_function(operator.getitem, (node, key))
            set_info(part, NodeInfo(placeholder=True))
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
        set_info(self.graph.output(map_outputs(output, self.node_of, self._wrapped)), NodeInfo())
        self.outputs = [tensor.detach().clone() for tensor in output_tensors(output)]
        for reference in self._marked:
            tensor = reference()
            if tensor is not None:
                tensor.__dict__.pop(_NODE, None)

    def _wrapped(self, kind: Any, items: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(kind, (), items)
        set_info(node, NodeInfo())
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
            fixed = constant or name not in self.parameters
            node = self._last_read = append_node(self.graph, "get_attr", name, after=self._last_read or self._last_input)
            known = NodeInfo(name.rpartition(".")[0], [tuple(tensor.shape)], tensor.dtype, constant=fixed)
            if fixed and not tensor.is_floating_point() and not tensor.is_meta:
                known.tensor = tensor
            set_info(node, known)
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
        if self.before_drawing is not None and is_seeded(func) and draws(func, args, kwargs):
            self.before_drawing()
            self.before_drawing = None
        node, known = self._call(func, args, kwargs)
        result = self._run(node, func, args, kwargs)
        known.decides = kind = decision(func, args, kwargs, result, constant=self._decides_nothing(known, func, args, kwargs))
        known.delicate = bool(kind) and rounds_matter(kind, args, kwargs)
        if isinstance(result, torch.Tensor):
            known.constant = known.constant and (kind != "random" or kwargs.get("generator") is not None)
            self._made(node, known, result)
        else:
            known.constant = known.constant and (kind != "random" or kwargs.get("generator") is not None)
            if isinstance(result, (list, tuple)):
                self._made_many(node, known, result)
            elif isinstance(result, (bool, int, float, complex)):
                known.reads, known.value = True, result
        if not known.constant and rule_for(func) is None:
            with disable_current_modes():  # copying the tensors is no part of the program
                known.recorded = Recorded.of(func, args, kwargs)
        if self.on_call is not None:
            self.on_call()
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[fx.Node, NodeInfo]:
        node = append_node(self.graph, "call_function", func, self._lower(args), {k: self._lower(v) for k, v in kwargs.items()})
        known = NodeInfo(self.stack[-1] if self.stack else "", operator=True, constant=all(info(n).constant for n in node.all_input_nodes))
        return node, set_info(node, known)

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
        node, known = self._call(func, (tensor,), {})
        known.whole = known.reads = True
        known.decides = kind = decision(func, (tensor,), {}, None, constant=known.constant)
        known.delicate = rounds_matter(kind, (tensor,), {})
        with disable_current_modes():  # what is copied here is no part of the program
            known.value = None if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta else tensor.detach().clone()
            taken: torch.Tensor = tensor if self.runner is None else self.runner(node, func, (tensor,), {})
        if self.on_call is not None:
            self.on_call()
        return taken

    def _made(self, node: fx.Node, known: NodeInfo, tensor: torch.Tensor) -> None:
        known.shapes = [tuple(tensor.shape)]
        known.dtype = tensor.dtype
        if known.constant and not tensor.is_floating_point() and not tensor.is_meta:
            known.tensor = tensor
        if id(tensor) in self._external:
            self._external[id(tensor)] = node
        else:
            tensor.__dict__[_NODE] = (self, node)
            self._marked.append(weakref.ref(tensor))
        if self.on_value is not None:
            self.on_value(node, tensor)

    def _made_many(self, node: fx.Node, known: NodeInfo, result: Any) -> None:
        for i, tensor in enumerate(result):
            known.shapes.append(tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ())
            if isinstance(tensor, torch.Tensor):
                part = append_node(self.graph, "call_function", operator.getitem, (node, i))
                self._made(part, set_info(part, NodeInfo(known.module, constant=known.constant)), tensor)

    def _decides_nothing(self, known: NodeInfo, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether what a call decides is the same in every run: all of its tensors are constants, or those that decide are."""
        if known.constant:
            return True
        deciding = sized_by(func, args, kwargs)
        return bool(deciding) and all(info(self.node_of(t)).constant for t in deciding)

    def _must_decompose(self, func: Any) -> bool:
        known = self._decompose.get(func)
        if known is None:
            composite = is_composite(func)
            known = self._decompose[func] = rule_for(func) is None and composite
        return known

    def _lower(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, (list, tuple)):
            lowered = [self._lower(v) if isinstance(v, (torch.Tensor, list, tuple)) else v for v in value]
            return lowered if isinstance(value, list) else tuple(lowered)
        return value

    def program(self, caches: list[Where]) -> Program:
        """Returns the finished recording of a model whose caches were emptied."""
        used = {n: t for n, t in self.tensors.items() if n in self._used}
        unused = [n for n in self.tensors if n not in self._used and n in self.parameters and isinstance(self.tensors[n], nn.Parameter)]
        parameters = {n for n in self.parameters if n in used}
        constants = {n: t for n, t in self.constants.items() if n in self._used}
        return Program(
            self.graph,
            used,
            parameters,
            constants,
            self.aliases,
            self.modules,
            self.inputs,
            outputs=self.outputs,
            caches=caches,
            unused=unused,
            ran=list(self.ran),
        )


def node_behind(tensor: torch.Tensor) -> fx.Node | None:
    """Returns the node that made a tensor in the recording now running (None for inputs, parameters and literals)."""
    found = tensor.__dict__.get(_NODE)
    return None if found is None else found[1]
