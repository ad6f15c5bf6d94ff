"""Running a model whose weights have shapes but no values (PyTorch's meta device).

A model too large for memory is built on the meta device, where an operator computes the shape of its result and nothing else. What such a
model decides in Python (is this mask all ones, how long is the longest row) it decides on small tensors that never met a weight: ids,
masks, positions. So here every tensor keeps its values until it meets one that has none. A tensor that a model makes on the meta device,
because that is where its weights are, is made on the CPU instead; a tensor that is moved to another device stays where it is; operands of
both kinds are all taken without values. A tensor with values into which one without values is written counts as one without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphprune.errors import InputError, TraceError
from graphprune.torch_private import TorchDispatchMode, name_of, pytree, schema_of, storage_key
from graphprune.trace.members import Members

if TYPE_CHECKING:
    from torch import fx

META, CPU = torch.device("meta"), torch.device("cpu")
PYTHON = "Python code"  # what reads values where no operator does
NAMED = 2  # tensors that a message names
LARGEST = 1 << 24  # bytes of a tensor that is made with values only because it could be

# Operators whose result takes no values from their tensors.
_FILLED = frozenset(
    f"aten::{name}"
    for name in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones",
                 "new_full", "new_empty", "new_empty_strided")
)  # fmt: skip
_AS_OTHER = frozenset({"aten::to", "aten::type_as"})  # the second of two tensors gives type and device only
_READING = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"})
_FROM_PYTHON = frozenset({torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor})
# How PyTorch says that a tensor on the meta device has no values.
_SAYINGS = ("meta tensor", "Meta tensor", "meta device type tensor", "'Meta' backend", "data-independent", "unallocated storage")
_REMEDY = (
    "Pass example inputs that have values, give the small tensors that this decision is computed from values, or trace a model of the same "
    "kind that is small enough to have weights"
)


def _has_meta(members: Members, inputs: Iterable[Tensor]) -> bool:
    return any(tensor.is_meta for _, tensor in members.tensors) or any(tensor.is_meta for tensor in inputs)


def require_values(model: nn.Module, purpose: str) -> None:
    """Raises unless all tensors of a model have values.

    Args:
        model: any module.
        purpose: what needs the values, as the subject of a sentence.

    Raises:
        InputError: some parameter or buffer is on the meta device.
    """
    refuse_meta(model, Members.of(model).tensors, purpose)


def refuse_meta(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], purpose: str) -> None:
    """Raises unless all of a model's tensors, given by name, have values; see `require_values`."""
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        which = f"{empty[0]!r}" + (f" and {len(empty) - 1} more tensors" if len(empty) > 1 else "")
        what = f"{purpose} needs the values of {which} of {type(model).__name__}, but on the meta device there are none"
        raise InputError(what, "Build the model without torch.device('meta'), or call model.to_empty(device='cpu') and load its weights")


def unreadable(operator: str, place: str, origin: str) -> TraceError:
    """Returns the error that says that values are read which are not there."""
    source = f", computed from {origin}," if origin else ""
    return TraceError(f"{operator} in {place} needs the values of a tensor that{source} is on the meta device and has none", _REMEDY)


def is_about_values(error: Exception) -> bool:
    """Returns whether an exception is PyTorch's way to say that a tensor on the meta device has no values."""
    return isinstance(error, (NotImplementedError, RuntimeError, TypeError)) and any(phrase in str(error) for phrase in _SAYINGS)


def literals(weightless: MetaExecutor | None) -> AbstractContextManager[Any]:
    """Returns a context in which tensors that are made of Python numbers have values; for a model with weights it does nothing."""
    return nullcontext() if weightless is None else _Literals()


class _Literals(TorchFunctionMode):
    """Makes tensors of Python numbers with values, also where they are asked for on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replaces the device."""
        kwargs = dict(kwargs or {})
        if func in _FROM_PYTHON and not any(isinstance(a, Tensor) for a in args[func is Tensor.new_tensor :]):
            if func is Tensor.new_tensor and kwargs.get("device") is None:
                kwargs["device"] = args[0].device
            if kwargs.get("device") is not None and torch.device(kwargs["device"]) == META:
                kwargs["device"] = CPU
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Schema:
    """What matters here about an operator.

    Attributes:
        name: its name without the overload's.
        devices: (position, name) of its arguments that are devices.
        writes: (position, name) of the tensors that it writes into.
    """

    name: str
    devices: tuple[tuple[int, str], ...]
    writes: tuple[tuple[int, str], ...]

    @staticmethod
    def of(func: Any) -> _Schema:
        """Reads the schema of an overload."""
        arguments = list(enumerate(schema_of(func).arguments))
        return _Schema(
            name_of(func),
            tuple((i, a.name) for i, a in arguments if "Device" in str(a.type)),
            tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write),
        )

    def written(self, call: _Call) -> list[Tensor]:
        """Returns the tensors that a call writes into."""
        values = [call.args[i] if i < len(call.args) else call.kwargs.get(name) for i, name in self.writes]
        return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _Call:
    """An operator and its arguments."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Returns the operator's result."""
        return self.func(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Returns the tensor arguments."""
        return [leaf for leaf in pytree.arg_tree_leaves(*self.args, **self.kwargs) if isinstance(leaf, Tensor)]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> _Call:
        """Returns the call with other tensors."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return _Call(self.func, args, kwargs)

    def on(self, device: torch.device, schema: _Schema) -> _Call:
        """Returns the call with every device that it names replaced."""
        positions = {i for i, _ in schema.devices if i < len(self.args) and self.args[i] is not None}
        names = {name for _, name in schema.devices if self.kwargs.get(name) is not None}
        if not positions and not names:
            return self
        args = tuple(device if i in positions else a for i, a in enumerate(self.args))
        return _Call(self.func, args, {k: device if k in names else v for k, v in self.kwargs.items()})

    def names(self, device: torch.device, schema: _Schema) -> bool:
        """Returns whether the call names a device."""
        given = [self.args[i] if i < len(self.args) else self.kwargs.get(name) for i, name in schema.devices]
        return device in given


class MetaExecutor:
    """Calls operators on tensors of which some have no values.

    Args:
        empty: names of the tensors of the model that have no values.
        node_of: returns the node of the recorded graph that made a tensor; None where nothing is recorded.
        place: returns in words which module runs now.
    """

    def __init__(self, empty: set[str], node_of: Callable[[Tensor], fx.Node] | None, place: Callable[[], str]) -> None:
        """Starts with no tensor overwritten."""
        self._empty = empty
        self._node_of = node_of
        self._place = place
        self._schemas: dict[Any, _Schema] = {}
        self._overwritten: dict[int, Any] = {}  # address of a storage -> the storage, whose values count no more

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the operator's result, with values where it can have them.

        Raises:
            TraceError: the operator needs values that are not there.
        """
        schema = self._schemas.get(func) or self._schemas.setdefault(func, _Schema.of(func))
        call = _Call(func, args, kwargs)
        tensors = call.tensors()
        if not tensors:
            return _made(call, schema) if call.names(META, schema) else call.run()
        if schema.name in _AS_OTHER and len(tensors) > 1 and self.has_values(tensors[0]):
            call = call.mapped(lambda t: t if t is tensors[0] else torch.empty(0, dtype=t.dtype, device=tensors[0].device))
            tensors = tensors[:1]
        unknown = [tensor for tensor in tensors if not self.has_values(tensor)]
        if not unknown:
            return (call.on(tensors[0].device, schema) if call.names(META, schema) else call).run()
        if schema.name in _FILLED:
            return _filled(call, schema)
        return self._without_values(call, schema, unknown)

    @staticmethod
    def running(
        members: Members, inputs: list[Tensor], node_of: Callable[[Tensor], fx.Node], place: Callable[[], str]
    ) -> MetaExecutor | None:
        """Returns what calls the operators while a model is recorded: None for a model and inputs that have values."""
        if not _has_meta(members, inputs):
            return None
        return MetaExecutor({name for name, tensor in members.tensors if tensor.is_meta}, node_of, place)

    def operator(self, func: Any) -> Any:
        """Returns an operator with the attributes of `func` that is called through this object."""
        return _Operator(func, self)

    def require(self, tensor: Tensor, reader: str = PYTHON) -> None:
        """Raises unless a tensor has values that count; `reader` is what reads them.

        Raises:
            TraceError: it has none.
        """
        if not self.has_values(tensor):
            raise unreadable(reader, self._place(), self._origin(tensor))

    def _origin(self, tensor: Tensor) -> str:
        """Returns the names of the nearest tensors without values that a tensor is computed from."""
        todo = [] if self._node_of is None else [self._node_of(tensor)]
        seen, found = set(todo), []
        for node in todo:
            if node.op == "get_attr" and str(node.target) in self._empty:
                found.append(repr(str(node.target)))
            todo += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
        return " and ".join(found[:NAMED])

    def has_values(self, tensor: Tensor) -> bool:
        """Returns whether a tensor has values that count."""
        if tensor.is_meta:
            return False
        return not self._overwritten or storage_key(tensor.untyped_storage()) not in self._overwritten

    def _without_values(self, call: _Call, schema: _Schema, unknown: list[Tensor]) -> Any:
        """Runs a call on shapes alone; what it writes into has values no more."""
        if schema.name in _READING:
            self.require(unknown[0], schema.name)
        shells: dict[int, Tensor] = {}
        owners: dict[int, Tensor] = {}

        def shell(tensor: Tensor) -> Tensor:
            if tensor.is_meta:
                return tensor
            if id(tensor) not in shells:
                shells[id(tensor)] = made = _shell(tensor)
                owners[id(made)] = tensor
            return shells[id(tensor)]

        try:
            result = call.mapped(shell).on(META, schema).run()
        except Exception as error:
            if is_about_values(error):
                raise unreadable(schema.name, self._place(), self._origin(unknown[0])) from error
            raise
        if schema.writes:
            for tensor in schema.written(call):
                if not tensor.is_meta:
                    storage = tensor.untyped_storage()
                    self._overwritten[storage_key(storage)] = storage
                    _follow(tensor, shells[id(tensor)])
            result = pytree.tree_map_only(Tensor, lambda t: owners.get(id(t), t), result)
        return result


@dataclass(frozen=True)
class _Operator:
    """An overload, called through a `MetaExecutor`."""

    func: Any
    weightless: MetaExecutor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.weightless(self.func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)


@contextmanager
def shapes_suffice(model: nn.Module, inputs: Iterable[Tensor]) -> Iterator[None]:
    """Lets a model that is partly or wholly on the meta device run on inputs that have values; does nothing for any other model."""
    tensors = list(inputs)
    if _has_meta(Members.of(model), tensors):
        try:
            with _Literals(), _Running():
                yield
        except InputError as error:
            if isinstance(error.__cause__, Exception) and is_about_values(error.__cause__):
                raise unreadable(PYTHON, "the model", "") from error
            raise
    else:
        yield


class _Running(TorchDispatchMode):
    """Calls every operator through `MetaExecutor`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weightless = MetaExecutor(set(), None, lambda: "the model")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._weightless(func, args, kwargs or {})


def _shell(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same form without values."""
    if tensor.layout is not torch.strided:
        return tensor.to(META)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _follow(tensor: Tensor, shell: Tensor) -> None:
    """Gives a tensor the shape that an operator in place gave its stand-in (`unsqueeze_`, `resize_`)."""
    if tensor.shape != shell.shape or tensor.stride() != shell.stride():
        if shell.numel() > tensor.numel():
            tensor.resize_(shell.shape)
        tensor.as_strided_(shell.shape, shell.stride())


def _small(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.numel() * tensor.element_size() <= LARGEST


def _made(call: _Call, schema: _Schema) -> Any:
    """Makes a tensor from literals on the CPU unless it is large."""
    shape = call.run()
    return call.on(CPU, schema).run() if _small(shape) else shape


def _filled(call: _Call, schema: _Schema) -> Any:
    """Makes a tensor like another, with values unless it is large."""
    shape = call.mapped(lambda t: t if t.is_meta else _shell(t)).on(META, schema).run()
    if not _small(shape) or not all(_small(t) for t in call.tensors()):
        return shape
    return call.mapped(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if t.is_meta else t).on(CPU, schema).run()
