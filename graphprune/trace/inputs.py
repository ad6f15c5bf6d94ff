"""Example inputs in all the forms that users write them in, and running a model on them without leaving a trace."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphprune.errors import GraphPruneError, InputError
from graphprune.torch_private import pytree
from graphprune.trace.members import Members
from graphprune.trace.threads import alone, forked_generators, running
from graphprune.trace.turns import Turn, turn

_FORMS = "Pass a tensor, a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs)"
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set})  # exactly these: subclasses may refuse to be refilled
_LONGEST_REASON = 300  # characters of a model's own error that are repeated in ours


def tensors_in(value: object) -> list[Tensor]:
    """Returns the tensors in nested arguments or results, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a model.

    Attributes:
        args: positional arguments; tensors may be nested in tuples, lists and dicts.
        kwargs: keyword arguments, likewise.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def call(self, model: Callable[..., Any]) -> Any:
        """Returns what the model returns; its exceptions pass as they are, see `run`."""
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Returns all tensors, positional arguments first, each in the order in which it is nested."""
        return tensors_in((self.args, self.kwargs))

    def map(self, function: Callable[[Tensor], Any]) -> Inputs:
        """Returns the same arguments with the function's result in each tensor's place."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(args, kwargs)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Returns the same arguments with floating-point tensors converted; integers, booleans and complex numbers stay."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def copied(self) -> Inputs:
        """Returns the same arguments with copies of the tensors, so that operators in place cannot reach the originals."""
        return self.map(lambda tensor: tensor.detach().clone())

    @property
    def batch(self) -> int | None:
        """The size that most tensors have in dimension 0 (of two as frequent, the first), or None if all are scalars."""
        sizes = Counter(tensor.shape[0] for tensor in self.tensors() if tensor.ndim)
        return sizes.most_common(1)[0][0] if sizes else None

    def with_batch(self, size: int) -> Inputs:
        """Returns the same arguments for a batch of `size` samples, the given samples repeated in turn or cut off.

        Only tensors whose dimension 0 has the common size, see `batch`, are batched; all others stay as they are.

        Raises:
            InputError: if `size` is below 1, or the inputs have no samples to repeat.
        """
        batch = self.batch
        if size < 1 or batch == 0:
            raise InputError(f"inputs of batch {batch} cannot be made into a batch of {size}", "Give at least one sample")

        def resized(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != batch:
                return tensor
            return tensor.index_select(0, torch.arange(size, device=tensor.device) % batch)

        return self if batch in {None, size} else self.map(resized)

    def __str__(self) -> str:
        """The shapes and types of the arguments, as error messages show them."""
        positional = [_described(arg) for arg in self.args]
        return ", ".join([*positional, *(f"{name}={_described(arg)}" for name, arg in self.kwargs.items())])


def normalise(example_inputs: Any) -> Inputs:
    """Returns example inputs as `Inputs`, whichever of the accepted forms they have.

    A tuple of a tuple and a dict with string keys is (args, kwargs); any other tuple holds the positional arguments. Write
    ``((a_tuple, a_dict), {})`` for a model with exactly these two positional arguments, ``(a_list,)`` for one that takes a list.

    Raises:
        InputError: if the inputs are missing, of another form, or hold no tensor.
    """
    if isinstance(example_inputs, Inputs):
        inputs = example_inputs
    elif isinstance(example_inputs, Tensor):
        inputs = Inputs((example_inputs,))
    elif _is_keywords(example_inputs):
        inputs = Inputs((), dict(example_inputs))
    elif isinstance(example_inputs, tuple):
        args, kwargs = example_inputs, {}
        if len(args) == 2 and isinstance(args[0], tuple) and _is_keywords(args[1]):
            args, kwargs = args[0], dict(args[1])
        inputs = Inputs(tuple(args), kwargs)
    elif example_inputs is None:
        raise InputError("there are no example inputs to run the model on", _FORMS)
    elif isinstance(example_inputs, list):
        fix = "Pass a tuple: (a, b) for two arguments, ([a, b],) for one argument that is a list"
        raise InputError("the example inputs are a list, which could be one argument or several", fix)
    else:
        raise InputError(f"the example inputs are a {type(example_inputs).__name__}, which is no form of arguments", _FORMS)
    if not inputs.tensors():
        raise InputError("the example inputs contain no tensor", _FORMS)
    return inputs


def argument_names(model: nn.Module, positional: int, keywords: list[str]) -> list[str]:
    """Returns one name per argument, those of the forward's signature where it has them."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [named[i] if i < len(named) else f"input_{i}" for i in range(positional)]
    return [*names, *keywords]


def map_outputs(value: Any, tensor: Callable[[Tensor], Any], rebuilt: Callable[[Any, dict[str, Any]], Any]) -> Any:
    """Returns what a model returned with other things in the tensors' places; what no graph can hold becomes None.

    Args:
        value: tensors, nested in any way.
        tensor: returns what stands for a tensor.
        rebuilt: returns what stands for an object of a class of its own (a dataclass, a named tuple, a kind of dict), by its fields.
    """
    if isinstance(value, Tensor):
        return tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return rebuilt(type(value), {name: map_outputs(getattr(value, name), tensor, rebuilt) for name in names})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return rebuilt(type(value), {name: map_outputs(getattr(value, name), tensor, rebuilt) for name in value._fields})
    if isinstance(value, (list, tuple)):
        return type(value)(map_outputs(v, tensor, rebuilt) for v in value)
    if isinstance(value, dict):
        items = {k: map_outputs(v, tensor, rebuilt) for k, v in value.items()}
        return items if type(value) is dict else rebuilt(type(value), items)
    return value if isinstance(value, (int, float, bool, str, torch.dtype, torch.device)) else None


def place(path: str) -> str:
    """Returns a module's path as messages show it."""
    return repr(path) if path else "the model"


def cannot_run(model: nn.Module, inputs: Inputs, error: Exception, path: str) -> InputError:
    """Returns the error that says what a model raised, and in which module."""
    where = f" in {path!r}" if path else ""
    shapes = ", ".join(str(tuple(t.shape)) for t in inputs.tensors())
    reason = " ".join(str(error).split())
    what = f"{type(model).__name__} cannot run on example inputs of shape {shapes}: {type(error).__name__}{where}: {reason}"
    return InputError(what.rstrip("."), "Pass inputs that model(...) accepts")


def run(model: nn.Module, inputs: Inputs) -> Any:
    """Returns the model's output for the inputs; whether and how gradients, modes and random numbers count is the caller's affair.

    Raises:
        InputError: if the model raises, with its class, the inputs' shapes and its own message; the model's error is the cause.
    """
    try:
        return inputs.call(model)
    except GraphPruneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        reason = f"{reason[:_LONGEST_REASON].rstrip()} [...]" if len(reason) > _LONGEST_REASON else reason.rstrip(".")
        what = f"{type(model).__name__} cannot be run on ({inputs}): {type(error).__name__}: {reason}"
        raise InputError(what, "Pass example inputs of the shapes and types that the model's forward expects") from error


@contextmanager
def preserve_state(model: nn.Module, members: Members | None = None, *, training: bool = False, draws: bool = True) -> Iterator[None]:
    """Lets the model run in inference mode inside the block, and puts everything back that a run may change.

    Inside, all modules have ``training = False`` (set directly: some models' own `train` rewrites weights) and no gradients are
    recorded. Afterwards, also after an error, these are as they were: training flags, attributes of modules (with the contents of
    lists, dicts and sets), values of buffers and of tensors that are plain attributes, and PyTorch's random number generators.
    Not covered: parameters written in place, containers nested deeper, and random numbers from elsewhere.

    One thread at a time works on a model, see `turn`; and one at a time draws random numbers.

    Args:
        model: any module.
        members: its modules and tensors, if they have been gathered already.
        training: what the flags are set to.
        draws: whether the block may draw random numbers. False where it draws none, or forks the generators itself once it does: then
            those of other threads go on undisturbed.

    Raises:
        InputError: if the model has lazy modules that do not know their shapes yet.
        ModelChangedError: another thread changed the model since this one began to work on it.
    """
    with turn(model) as mine:
        mine.check()
        yield from _preserved(model, mine, members or Members.of(model), training=training, draws=draws)


def _preserved(model: nn.Module, mine: Turn, members: Members, *, training: bool, draws: bool) -> Iterator[None]:
    """What `preserve_state` does in its turn."""
    _require_initialised(model, members)
    modules = members.distinct
    flags = [(module, module.training) for module in modules]
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    values = [value for _, saved in attributes for value in saved.values()]
    containers = [(value, value.copy()) for value in values if type(value) in _CONTAINERS]
    buffers = list({id(tensor): tensor for _, tensor in members.buffers}.values())
    state = [*buffers, *(value for value in values if isinstance(value, Tensor))]
    tensors = [(tensor, tensor.detach().clone()) for tensor in state]
    forked = forked_generators(gpus_of(members, state)) if draws or alone() else running()
    with forked, torch.no_grad():
        try:
            set_training(modules, training=training)
            mine.begin()
            yield
        finally:
            mine.end(training=training)
            for current, saved in attributes:
                _refill(current, saved)
            for container, saved_contents in containers:
                if container or saved_contents:  # most are the hooks of modules, of which there are none
                    _refill(container, saved_contents)
            for module, flag in flags:
                if module.training != flag:  # a scripted module keeps its flag outside its attributes
                    module.training = flag
            for tensor, value in tensors:
                if tensor.device.type != "meta" and not torch.equal(tensor, value):
                    tensor.copy_(value)
            mine.settle()


def gpus_of(members: Members, tensors: Iterable[Tensor] = ()) -> list[int]:
    """Returns the numbers of the CUDA devices that parameters, buffers and other tensors are on."""
    found = [*(tensor for _, tensor in members.tensors), *tensors]
    return sorted({tensor.device.index for tensor in found if tensor.device.type == "cuda"})


def set_training(modules: Iterable[nn.Module], *, training: bool) -> None:
    """Sets the training flag of modules, directly: some models' own `train` rewrites weights."""
    for module in modules:
        if module.training != training:
            module.training = training


def _refill(container: dict[Any, Any] | list[Any] | set[Any], contents: Any) -> None:
    """Puts saved contents back into the container that held them; one that holds them still is not touched, as others may be reading it."""
    if len(container) == len(contents) and all(map(operator.is_, container, contents)):
        if isinstance(container, dict) and not all(map(operator.is_, container.values(), contents.values())):
            container.update(contents)
        return
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)


def _require_initialised(model: nn.Module, members: Members) -> None:
    """Raises if a lazy module has not seen an input yet: a first run would shape it, which no look at a model may do."""
    for name, tensor in members.tensors:
        if is_lazy(tensor):
            raise InputError(f"{name!r} of {type(model).__name__} has no shape yet", "Run the model once to initialise its lazy modules")


def _is_keywords(value: Any) -> bool:
    """Returns whether the value can be unpacked with ``**``."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _described(argument: Any) -> str:
    """Returns the shape and type of an argument's tensors, or the type of an argument without any."""
    leaves = tensors_in(argument)
    if not leaves:
        return type(argument).__name__
    described = [f"{list(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}" for leaf in leaves]
    return described[0] if isinstance(argument, Tensor) else f"{type(argument).__name__} of {', '.join(described)}"
