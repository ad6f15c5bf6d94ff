"""What an optimizer remembers, nested in any way, as plain values and tensors for a run; put back bit by bit.

PyTorch's `load_state_dict` is no help there: it casts what it is given to the parameters' types, and makes new parameter groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from graphprune.errors import ConfigError

_FIX = "Leave folder= out, or use what keeps tensors, numbers, strings, lists, tuples and dicts alone"
_CONSTRUCTED = ("state", "param_groups", "defaults")  # of an optimizer: kept on their own, or not changed by training


class Packer:
    """Takes nested values apart into what JSON can hold and named tensors.

    Args:
        prefix: begins the names of the tensors.
        owner: whose values they are, as messages say it.
        known: tensors that are there anyway (an optimizer's parameters), and are kept as their position in this list.

    Attributes:
        tensors: name -> tensor; one that is met twice is kept once.
    """

    def __init__(self, prefix: str, owner: str, known: Sequence[Tensor] = ()) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._prefix, self._owner = prefix, owner
        self._known = {id(tensor): index for index, tensor in enumerate(known)}
        self._names: dict[int, str] = {}

    def pack(self, value: Any, where: str) -> Any:
        """Returns a value as JSON can hold it.

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
        if kind in {list, tuple}:
            return {kind.__name__: [self.pack(item, f"{where}[{index}]") for index, item in enumerate(value)]}
        if isinstance(value, dict):
            return {"dict": [[self.pack(key, where), self.pack(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        named = f"a {kind.__name__}" if not isinstance(value, Tensor) else "a sparse or quantized tensor"
        raise ConfigError(f"{where} of {self._owner} is {named}, which cannot be kept in a folder", _FIX)

    def _tensor(self, value: Tensor) -> dict[str, Any]:
        if id(value) in self._known:
            return {"known": self._known[id(value)]}
        if id(value) not in self._names:
            self._names[id(value)] = f"{self._prefix}{len(self._names)}"
            self.tensors[self._names[id(value)]] = value
        return {"tensor": self._names[id(value)], "device": str(value.device), "stride": list(value.stride())}


class Unpacker:
    """Puts together again what a `Packer` took apart.

    Args:
        tensors: by name.
        known: as of the packer.
    """

    def __init__(self, tensors: Mapping[str, Tensor], known: Sequence[Tensor] = ()) -> None:
        self._tensors, self._known = tensors, known
        self._made: dict[str, Tensor] = {}

    def unpack(self, value: Any) -> Any:
        """Returns the value; tensors in it are copies, with the strides and on the device of then."""
        if not isinstance(value, dict):
            return value
        if "known" in value:
            return self._known[value["known"]]
        if "tensor" in value:
            return self._tensor(value["tensor"], value["stride"], torch.device(value["device"]))
        if "numpy" in value:
            return np.dtype(value["numpy"]).type(value["value"])
        if "dict" in value:
            return {self.unpack(key): self.unpack(item) for key, item in value["dict"]}
        (kind,) = value
        items = [self.unpack(item) for item in value[kind]]
        return tuple(items) if kind == "tuple" else items

    def _tensor(self, name: str, stride: list[int], device: torch.device) -> Tensor:
        if name not in self._made:
            found = self._tensors[name]
            if 0 in stride:  # expanded: one number at many places, which cannot be filled
                self._made[name] = found.to(device, copy=True)
            else:
                self._made[name] = torch.empty_strided(found.shape, stride, dtype=found.dtype, device=device).copy_(found)
        return self._made[name]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Returns all parameters of an optimizer, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def settings_of(optimizer: Any) -> list[Any] | None:
    """Returns an optimizer's class and the plain settings of its groups, for a run's settings; None for a function that makes one."""
    if not isinstance(optimizer, Optimizer):
        return None
    packer = Packer("", type(optimizer).__name__)
    groups = [{key: value for key, value in _settings(group).items() if _is_plain(value)} for group in optimizer.param_groups]
    return [type(optimizer).__name__, packer.pack(groups, "the groups")]


def packed_optimizer(optimizer: Optimizer, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns what an optimizer remembers: settings of its groups, state, attributes of its own, and optimizers within it.

    Functions (of a group, such as a closure) are not kept; whoever makes the optimizer again gives them again.

    Args:
        optimizer: whose parameters are kept by somebody else.
        prefix: begins the names of the tensors.

    Raises:
        ConfigError: something in it cannot be kept.
    """
    known = parameters_of(optimizer)
    packer = Packer(prefix, f"the optimizer {type(optimizer).__name__}", known)
    places = {id(parameter): index for index, parameter in enumerate(known)}
    remembered: dict[Any, Any] = optimizer.state  # by parameter, and some optimizers have a state of all of them by a string
    state = []
    for key, values in remembered.items():
        if isinstance(key, Tensor) and id(key) not in places:
            what = f"the optimizer {type(optimizer).__name__} keeps a state for a tensor that is in none of its groups"
            raise ConfigError(what, _FIX)
        place: Any = places[id(key)] if isinstance(key, Tensor) else {"key": packer.pack(key, "state")}
        state.append([place, packer.pack(values, "state")])
    plain: dict[str, Any] = {
        "groups": packer.pack([_settings(group) for group in optimizer.param_groups], "param_groups"),
        "state": state,
        "own": packer.pack(_attributes(optimizer, lambda value: not isinstance(value, Optimizer)), "attribute "),
        "inner": {},
    }
    for name, inner in _attributes(optimizer, lambda value: isinstance(value, Optimizer)).items():
        plain["inner"][name], tensors = packed_optimizer(inner, f"{prefix}{name}/")
        packer.tensors |= tensors
    return plain, packer.tensors


def restore_optimizer(optimizer: Optimizer, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts an optimizer that was made anew, with the same groups, where it was; its groups stay the same dicts."""
    known = parameters_of(optimizer)
    unpacker = Unpacker(tensors, known)
    for group, settings in zip(optimizer.param_groups, unpacker.unpack(plain["groups"]), strict=True):
        group.update(settings)
    optimizer.state.clear()
    for place, values in plain["state"]:
        key = known[place] if isinstance(place, int) else unpacker.unpack(place["key"])
        optimizer.state[key] = unpacker.unpack(values)
    for name, value in unpacker.unpack(plain["own"]).items():
        setattr(optimizer, name, value)
    for name, inner in plain["inner"].items():
        restore_optimizer(getattr(optimizer, name), inner, tensors)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params" and not callable(value)}


def _attributes(optimizer: Optimizer, wanted: Callable[[object], bool]) -> dict[str, Any]:
    """Returns what an optimizer has besides what all have."""
    found = {name: value for name, value in vars(optimizer).items() if name not in _CONSTRUCTED and not name.endswith("_hooks")}
    return {name: value for name, value in found.items() if wanted(value) and (isinstance(value, Tensor) or not callable(value))}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, np.number, np.bool_))
