"""The one way into a run's file and back, bit by bit: modules, optimizers, records, and values that hold them, nested in any way.

save(run, who, values) ──▶ Packer: what JSON can hold, and tensors by number ──▶ `Run.save`
load(run) ◀── Unpacker: the same values, and for every module and optimizer a `Packed`, which fills one that was made anew ◀── `Run.load`

PyTorch's `load_state_dict` is no help there: it casts what it is given to the parameters' types, and makes new parameter groups.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.errors import ConfigError, FileError
from graphprune.runs.checkpoint import Run
from graphprune.torch_private import own_buffers

_FIX = "Leave folder= out, or use what keeps tensors, numbers, strings, lists, tuples and dicts alone"
_CONSTRUCTED = ("state", "param_groups", "defaults")  # of an optimizer: kept on their own, or not changed by training
_PACKAGE = __name__.partition(".")[0]


class ModuleState:
    """A module by the names that its parameters have now, whatever parametrizations are registered later.

    Args:
        module: saved, and filled in place: parameters, buffers (those that state dicts leave out, too), extra states, what is frozen.

    Attributes:
        module: the module.
        parameters: by name, each once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.parameters = module, dict(module.named_parameters())

    @property
    def extra(self) -> dict[str, nn.Module]:
        """The modules within it that have an extra state, by name."""
        own = nn.Module.get_extra_state
        return {name: part for name, part in self.module.named_modules() if type(part).get_extra_state is not own}


class Packer:
    """Takes nested values apart into what JSON can hold and named tensors.

    Args:
        owner: whose values they are, as messages say it.
        known: tensors that are there anyway (an optimizer's parameters), and are kept as their position in this list.

    Attributes:
        tensors: name -> tensor; one that is met twice is kept once.
    """

    def __init__(self, owner: str, known: Sequence[Tensor] = ()) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._owner = owner
        self._known = {id(tensor): index for index, tensor in enumerate(known)}
        self._names: dict[int, str] = {}

    def pack(self, value: Any, where: str) -> Any:  # noqa: PLR0911 (a kind of value each)
        """Returns a value as JSON can hold it.

        Args:
            value: None, numbers, strings, tensors, arrays, modules, optimizers, this package's dataclasses, and lists, tuples and dicts.
            where: it stands, as messages say it.

        Raises:
            ConfigError: something in it is of another kind.
        """
        kind = type(value)
        if value is None or kind in {bool, int, float, str}:
            return value
        if isinstance(value, np.bool_ | np.integer | np.floating):
            return {"numpy": value.dtype.str, "value": value.item()}
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            return self._tensor(value)
        if isinstance(value, np.ndarray) and value.dtype.kind in "bif":
            return {"array": self._tensor(torch.from_numpy(np.array(value)))}
        if isinstance(value, Optimizer):
            return {"optimizer": self._optimizer(value)}
        if isinstance(value, nn.Module | ModuleState):
            return {"module": self._module(value if isinstance(value, ModuleState) else ModuleState(value))}
        if is_dataclass(value) and kind.__module__.partition(".")[0] == _PACKAGE:
            plain = {field.name: self.pack(getattr(value, field.name), f"{where}.{field.name}") for field in fields(value)}
            return {"record": f"{kind.__module__}:{kind.__qualname__}", "fields": plain}
        if kind in {list, tuple}:
            return {kind.__name__: [self.pack(item, f"{where}[{index}]") for index, item in enumerate(value)]}
        if isinstance(value, dict):
            inner = {key: where if isinstance(key, Tensor) else f"{where}[{key!r}]" for key in value}
            return {"dict": [[self.pack(key, where), self.pack(item, inner[key])] for key, item in value.items()]}
        named = f"a {kind.__name__}" if not isinstance(value, Tensor) else "a sparse or quantized tensor"
        raise ConfigError(f"{where} of {self._owner} is {named}, which cannot be kept in a folder", _FIX)

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        if id(value) in self._known:
            return {"known": self._known[id(value)]}
        if id(value) not in self._names:
            self._names[id(value)] = str(len(self.tensors))
            self.tensors[self._names[id(value)]] = value
        return {"tensor": self._names[id(value)], "device": str(value.device), "stride": list(value.stride())}

    def _within(self, owner: str, known: Sequence[Tensor] = ()) -> Packer:
        """Returns a packer that adds to the same tensors."""
        inner = Packer(owner, known)
        inner.tensors, inner._names = self.tensors, self._names
        return inner

    def _module(self, state: ModuleState) -> dict[str, Any]:
        packer = self._within(type(state.module).__name__)
        return {
            "parameters": packer.pack(state.parameters, "a parameter"),
            "buffers": packer.pack(dict(state.module.named_buffers()), "a buffer"),
            "extra": {name: packer.pack(part.get_extra_state(), f"the extra state of {name!r}") for name, part in state.extra.items()},
            "trained": [name for name, parameter in state.parameters.items() if parameter.requires_grad],
        }

    def _optimizer(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns what an optimizer remembers: settings of its groups, state, attributes of its own, and optimizers within it.

        Its parameters are kept by somebody else. Functions (of a group, such as a closure) are not kept; whoever makes the optimizer again
        gives them again.
        """
        owner, known = f"the optimizer {type(optimizer).__name__}", parameters_of(optimizer)
        places = {id(parameter) for parameter in known}
        remembered: dict[Any, Any] = optimizer.state  # by parameter, and some optimizers have a state of all of them by a string
        if any(isinstance(key, Tensor) and id(key) not in places for key in remembered):
            raise ConfigError(f"{owner} keeps a state for a tensor that is in none of its groups", _FIX)
        packer = self._within(owner, known)
        return {
            "groups": packer.pack([_settings(group) for group in optimizer.param_groups], "param_groups"),
            "state": packer.pack(dict(remembered), "state"),
            "own": packer.pack(_attributes(optimizer, lambda value: not isinstance(value, Optimizer)), "attribute "),
            "inner": packer.pack(_attributes(optimizer, lambda value: isinstance(value, Optimizer)), "attribute "),
        }


class Unpacker:
    """Puts together again what a `Packer` took apart.

    Args:
        tensors: by name.
        known: as of the packer.
    """

    def __init__(self, tensors: Mapping[str, Tensor], known: Sequence[Tensor] = ()) -> None:
        self._tensors, self._known = tensors, known
        self._made: dict[str, Tensor] = {}

    def unpack(self, value: Any) -> Any:  # noqa: PLR0911 (a kind of value each)
        """Returns the value; tensors in it are copies, with the strides and on the device of then; of modules and optimizers a `Packed`.

        Raises:
            FileError: it has a record that this version does not have.
        """
        if not isinstance(value, dict):
            return value
        if "known" in value:
            return self._known[value["known"]]
        if "tensor" in value:
            return self._tensor(value["tensor"], value["stride"], torch.device(value["device"]))
        if "array" in value:
            return self.unpack(value["array"]).numpy()
        if "numpy" in value:
            return np.dtype(value["numpy"]).type(value["value"])
        if "record" in value:
            return _record(value["record"], {name: self.unpack(item) for name, item in value["fields"].items()})
        if "dict" in value:
            return {self.unpack(key): self.unpack(item) for key, item in value["dict"]}
        (kind,) = value
        if kind in {"module", "optimizer"}:
            return Packed(kind, value[kind], self)
        items = [self.unpack(item) for item in value[kind]]
        return tuple(items) if kind == "tuple" else items

    def within(self, known: Sequence[Tensor]) -> Unpacker:
        """Returns an unpacker of the same tensors that knows others."""
        inner = Unpacker(self._tensors, known)
        inner._made = self._made
        return inner

    def _tensor(self, name: str, stride: list[int], device: torch.device) -> Tensor:
        if name not in self._made:
            found = self._tensors[name]
            if device.type == "cuda" and not torch.cuda.is_available():
                device = found.device
            if 0 in stride:  # expanded: one number at many places, which cannot be filled
                self._made[name] = found.to(device, copy=True)
            else:
                self._made[name] = torch.empty_strided(found.shape, stride, dtype=found.dtype, device=device).copy_(found)
        return self._made[name]


class Packed:
    """A module or an optimizer as a run keeps it.

    Args:
        kind: which of them.
        plain: what the packer made of it.
        unpacker: of all that was packed with it.
    """

    def __init__(self, kind: Literal["module", "optimizer"], plain: Mapping[str, Any], unpacker: Unpacker) -> None:
        self._kind, self._plain, self._unpacker = kind, plain, unpacker

    def fill(self, target: nn.Module | ModuleState | Optimizer) -> None:
        """Puts one that was made anew, of the same names and groups, where it was, in place; an optimizer's groups stay the same dicts."""
        if isinstance(target, Optimizer):
            self._fill_optimizer(target)
        else:
            self._fill_module(target if isinstance(target, ModuleState) else ModuleState(target))

    def _fill_module(self, state: ModuleState) -> None:
        plain, unpack = self._plain, self._unpacker.unpack
        with torch.no_grad():
            for name, value in unpack(plain["parameters"]).items():
                state.parameters[name].copy_(value)
                state.parameters[name].requires_grad_(name in plain["trained"])
            for name, value in unpack(plain["buffers"]).items():
                path, _, attribute = name.rpartition(".")
                _put(state.module.get_submodule(path), attribute, value)
        for name, part in state.extra.items():
            part.set_extra_state(unpack(plain["extra"][name]))

    def _fill_optimizer(self, optimizer: Optimizer) -> None:
        unpack = self._unpacker.within(parameters_of(optimizer)).unpack
        for group, settings in zip(optimizer.param_groups, unpack(self._plain["groups"]), strict=True):
            group.update(settings)
        optimizer.state.clear()
        optimizer.state.update(unpack(self._plain["state"]))
        for name, value in unpack(self._plain["own"]).items():
            setattr(optimizer, name, value)
        for name, inner in unpack(self._plain["inner"]).items():
            inner.fill(getattr(optimizer, name))


def save(run: Run, who: str, state: Mapping[str, Any]) -> None:
    """Replaces the last save of a run, if it has a folder; see `Packer.pack` for what can be kept, and `Run.save`.

    Args:
        run: the run.
        who: whose state it is, for messages.
        state: by name.

    Raises:
        ConfigError: something cannot be kept.
        FileError: the file cannot be written.
    """
    if run.path is not None:
        packer = Packer(who)
        run.save({name: packer.pack(value, name) for name, value in state.items()}, packer.tensors)


def load(run: Run) -> dict[str, Any] | None:
    """Returns what was saved last, by name, or None where nothing was; see `Unpacker.unpack` and `Run.load`.

    Raises:
        FileError: the file is damaged, or is of a run with other settings.
    """
    saved = run.load()
    if saved is None:
        return None
    unpacker = Unpacker(saved.tensors)
    return {name: unpacker.unpack(value) for name, value in saved.state.items()}


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns all parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def settings_of(optimizer: Any) -> list[Any] | None:
    """Returns an optimizer's class and the plain settings of its groups, for a run's settings; None for a function that makes one."""
    if not isinstance(optimizer, Optimizer):
        return None
    groups = [plain_part(_settings(group)) for group in optimizer.param_groups]
    return [type(optimizer).__name__, Packer(type(optimizer).__name__).pack(groups, "the groups")]


def plain_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of some values that are plain: None, numbers, strings, and lists and tuples of these."""
    return {key: value for key, value in values.items() if is_plain(value)}


def is_plain(value: object) -> bool:
    """Returns whether a value is None, a number, a string, or a list or tuple of these."""
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, np.number, np.bool_))


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and not callable(value)}


def _attributes(optimizer: Optimizer, wanted: Callable[[object], bool]) -> dict[str, Any]:
    """Returns what an optimizer has besides what all have."""
    found = {name: value for name, value in vars(optimizer).items() if name not in _CONSTRUCTED and not name.endswith("_hooks")}
    return {name: value for name, value in found.items() if wanted(value) and (isinstance(value, Tensor) or not callable(value))}


def _record(name: str, values: Mapping[str, Any]) -> Any:
    """Returns a dataclass of this package."""
    module, _, kind = name.partition(":")
    found = getattr(sys.modules.get(module), kind, None) if module.partition(".")[0] == _PACKAGE else None
    try:
        if is_dataclass(found) and isinstance(found, type):
            return found(**values)
    except TypeError:
        pass  # its fields were others
    fix = "Choose another folder, or go on with the version that made it"
    raise FileError(f"the run holds a {name}, which is unknown to this graphprune", fix)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Fills a buffer, or puts another in its place where it cannot be filled: training may have given it another shape."""
    now = own_buffers(module)[name]
    if now is None or now.shape != value.shape or now.dtype != value.dtype or 0 in now.stride():
        own_buffers(module)[name] = value if now is None else value.to(now.device)
    else:
        now.copy_(value)
