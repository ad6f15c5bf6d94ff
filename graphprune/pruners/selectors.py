"""Selectors: which of a model's layers a list of types, names and parts of names means.

Names and parts of names add up, types narrow them down, and whatever matches nothing is an error that suggests the nearest name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from graphprune.errors import ConfigError, nearest

DEFAULT_TYPE = "default"
SELECTORS = ("op_types", "op_names", "op_partial_names")

_SHOWN = 5  # names listed in a message before it says how many more there are


@dataclass(frozen=True)
class Trait:
    """What the layers that can be selected have in common and other modules do not, in the words of error messages.

    Attributes:
        has: of one layer that has it.
        lacks: of one module that does not.
        lack: of several.
    """

    has: str
    lacks: str
    lack: str


CHANNELS = Trait("produces channels", "produces no channels", "produce no channels")


@dataclass(frozen=True)
class Names:
    """The names of a model, each with the class name of its module.

    Attributes:
        layers: the layers that can be selected (as a rule those that produce channels), in the model's order.
        others: all other modules; only used to say more in errors.
        trait: what sets the layers apart.
    """

    layers: Mapping[str, str]
    others: Mapping[str, str]
    trait: Trait = CHANNELS


def select(selectors: Mapping[str, tuple[str, ...]], where: str, names: Names) -> list[str]:
    """Returns the layers that the selectors of one config entry mean, in the model's order; without selectors, all of them.

    Args:
        selectors: from the keys in `SELECTORS` that the entry has to the strings that it lists.
        where: the entry, as it opens error messages, such as ``"config_list[0]"``.
        names: the model's names.

    Raises:
        ConfigError: if a string matches nothing, or all selectors together match nothing.
    """
    from_names, from_parts, types = (selectors.get(key) for key in ("op_names", "op_partial_names", "op_types"))
    chosen = set(names.layers)
    if from_names is not None or from_parts is not None:
        exact = [check_name(name, f"{where}['op_names']", names) for name in from_names or ()]
        containing = [_containing(part, f"{where}['op_partial_names']", names) for part in from_parts or ()]
        chosen = set(exact).union(*containing)
    if types is not None:
        for name in types:
            _check_type(name, f"{where}['op_types']", names)
        chosen = {name for name in chosen if DEFAULT_TYPE in types or names.layers[name] in types}
    if not chosen:
        what = f"{where} selects no layer: none of those it names is of the types {_listed(types or ())}"
        raise ConfigError(what, "Drop op_types, or name layers of these types")
    return [name for name in names.layers if name in chosen]


def _containing(part: str, where: str, names: Names) -> set[str]:
    """Returns the layers whose name contains `part`; raises if there are none."""
    matching = {name for name in names.layers if part in name}
    if matching:
        return matching
    touched = [name for name in names.others if part in name]
    if touched:
        what = f"{where} lists {part!r}, which only occurs in modules that {names.trait.lack}: {_listed(touched)}"
    else:
        pieces = dict.fromkeys((*(piece for name in names.layers for piece in name.split(".")), *names.layers))
        what = f"{where} lists {part!r}, which occurs in no layer's name{_hint(part, pieces)}"
    raise ConfigError(what, f"Use a part of a layer's name, such as those of {_listed(names.layers)}")


def check_name(name: str, where: str, names: Names) -> str:
    """Returns `name` if it is a layer that can be selected; raises ConfigError, with a suggestion, if not."""
    if name in names.layers:
        return name
    if name in names.others:
        what = f"{where} names {name!r}, a {names.others[name]}, which {names.trait.lacks} of its own"
        inside = any(layer.startswith(f"{name}.") for layer in names.layers)
        fix = f"Write 'op_partial_names': ['{name}.'] for the layers inside it" if inside else f"Name one of {_listed(names.layers)}"
        raise ConfigError(what, fix)
    what = f"{where} names {name!r}, which the model does not have{_hint(name, names.layers)}"
    raise ConfigError(what, f"Name a layer that {names.trait.has}: {_listed(names.layers)}")


def _check_type(name: str, where: str, names: Names) -> None:
    """Raises unless some layer that can be selected is of the type `name`."""
    types = dict.fromkeys((DEFAULT_TYPE, *names.layers.values()))
    if name in types:
        return
    if name in names.others.values():
        what = f"{where} lists {name!r}, but the model's modules of this type {names.trait.lack} of their own"
    else:
        what = f"{where} lists {name!r}, and the model has no layer of this type{_hint(name, types)}"
    raise ConfigError(what, f"Use one of {', '.join(types)}")


def _hint(name: str, known: Iterable[str]) -> str:
    """Returns the suggestion of the nearest known name in parentheses, or nothing."""
    suggestion = nearest(name, known)
    return f" ({suggestion})" if suggestion else ""


def _listed(names: Iterable[str]) -> str:
    """Joins the first few names, and say how many more there are."""
    every = list(names)
    shown = ", ".join(every[:_SHOWN])
    return f"{shown} and {len(every) - _SHOWN} more" if len(every) > _SHOWN else shown
