"""Config lists: which layers lose channels, and how many of them.

A config list is a list of entries, each a dict::

    [
        {"sparsity": 0.5, "op_types": ["Conv2d", "Linear"]},
        {"sparsity": 0.2, "op_names": ["layer1.0.conv1"]},
        {"exclude": True, "op_partial_names": ["downsample"]},
    ]

================================  ===========================================================================================
key                               meaning
================================  ===========================================================================================
``sparsity``                      fraction of each selected layer's channels to remove, in [0, 1); alias ``sparsity_per_layer``
``total_sparsity``                fraction of the channels of all layers of the entry, ranked together, in [0, 1)
``max_sparsity_per_layer``        the most that one layer may lose, in (0, 1]: a number, or a dict from layer name to number
``op_types``                      class names; ``"default"`` is every layer that produces channels
``op_names``                      qualified names
``op_partial_names``              parts of qualified names
``exclude``                       True: the selected layers keep all their channels
``rho``                           `ADMMPruner` only: weight of its penalty on the selected layers, above 0
================================  ===========================================================================================

Names and partial names add up; types narrow them down. An entry with a sparsity and no selector takes every layer that produces
channels. The last entry that selects a layer wins, whether it prunes or excludes.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from graphprune.errors import ConfigError, nearest
from graphprune.pruners.selectors import CHANNELS, DEFAULT_TYPE, SELECTORS, Names, Trait, check_name, select

ConfigList: TypeAlias = Sequence[Mapping[str, object]]

AMOUNTS = ("sparsity", "sparsity_per_layer", "total_sparsity")
_KEYS = (*AMOUNTS, "max_sparsity_per_layer", *SELECTORS, "exclude")
_OWN_KEYS = {"rho": "ADMMPruner"}  # keys that one pruner alone understands
_SCHEDULE_KEYS = frozenset({"initial_sparsity", "final_sparsity", "start_epoch", "end_epoch", "frequency"})


@dataclass(frozen=True)
class LayerConfig:
    """What the config list asks of one layer; exactly one of `sparsity` and `total` is set.

    Attributes:
        entry: index in the config list of the entry that won; layers with a `total` and the same entry share one ranking.
        sparsity: fraction of this layer's channels to remove, in [0, 1), already lowered to `max_sparsity`.
        total: fraction of the channels of all layers of the entry to remove, in [0, 1).
        max_sparsity: the most that this layer may lose, in (0, 1].
        asked: `sparsity` before it was lowered, for reports.
    """

    entry: int
    sparsity: float | None = None
    total: float | None = None
    max_sparsity: float = 1.0
    asked: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ResolvedConfig:
    """A config list applied to a model.

    Attributes:
        layers: what is asked of each layer that loses channels, in the model's order.
        excluded: the layers whose last matching entry excludes them.
    """

    layers: Mapping[str, LayerConfig]
    excluded: frozenset[str]


@dataclass(frozen=True)
class _Entry:
    """One validated entry of a config list, not yet applied to a model."""

    index: int
    exclude: bool = False
    sparsity: float | None = None
    total: float | None = None
    cap: float = 1.0
    caps: Mapping[str, float] = field(default_factory=dict)
    selectors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def layer(self, name: str) -> LayerConfig:
        """Builds the config that this entry gives to the layer `name`."""
        cap = self.caps.get(name, self.cap)
        sparsity = None if self.sparsity is None else min(self.sparsity, cap)
        return LayerConfig(entry=self.index, sparsity=sparsity, total=self.total, max_sparsity=cap, asked=self.sparsity)


def check_sparsity(value: object, where: str) -> float:
    """Returns `value` as a float when it is a fraction in [0, 1).

    Args:
        value: anything; integers, floats and NumPy scalars can be fractions, booleans and strings cannot.
        where: what the value was given for, as it opens the error message, such as ``"config_list[0]['sparsity']"``.

    Raises:
        ConfigError: if it is no real number, NaN, below 0, or 1 and above.
    """
    fix = "Give the fraction of the channels to remove, such as 0.5 for one half"
    number = _number(value, where, fix)
    if not 0 <= number < 1:
        what = f"{where} is {value!r}, outside [0, 1)"
        raise ConfigError(what, fix)
    return number


def resolve(
    config_list: ConfigList,
    layers: Mapping[str, str],
    others: Mapping[str, str] | None = None,
    trait: Trait = CHANNELS,
    *,
    amounts: bool = True,
) -> ResolvedConfig:
    """Decides for every layer which entry of the config list applies to it.

    Args:
        config_list: the entries, see the module's table.
        layers: qualified name to class name of every layer that can be selected, in the model's order.
        others: qualified name to class name of the model's other modules; only used to say more in errors.
        trait: what the layers have in common, in words for the errors.
        amounts: whether entries say how much goes; with a budget they only say where.

    Raises:
        ConfigError: if the list or an entry is malformed, contradicts itself, or selects no layer.
    """
    entries = [_parse(index, entry, amounts=amounts) for index, entry in enumerate(_entries(config_list))]
    if not layers:
        what = f"the config list cannot select anything: the model has no layer that {trait.has}"
        raise ConfigError(what, "Pass a model with convolutions, linear layers or embeddings that are not frozen")
    names = Names(layers, others or {}, trait)
    winner: dict[str, _Entry] = {}
    for entry in entries:
        where = f"config_list[{entry.index}]"
        for name in entry.caps:
            check_name(name, f"{where}['max_sparsity_per_layer']", names)
        winner.update(dict.fromkeys(select(entry.selectors, where, names), entry))
    return ResolvedConfig(
        layers={name: winner[name].layer(name) for name in layers if name in winner and not winner[name].exclude},
        excluded=frozenset(name for name, entry in winner.items() if entry.exclude),
    )


def _entries(config_list: object) -> Iterable[Mapping[object, object]]:
    """Returns the entries of `config_list` after checking that it is a list of dicts."""
    example = "[{'sparsity': 0.5, 'op_types': ['default']}]"
    if not isinstance(config_list, (list, tuple)):
        what = f"config_list is a {type(config_list).__name__}, not a list of dicts"
        raise ConfigError(what, f"Pass a list, such as {example}")
    if not config_list:
        what = "config_list is empty, so no layer would lose a channel"
        raise ConfigError(what, f"Pass at least one entry, such as {example}")
    for index, entry in enumerate(config_list):
        if not isinstance(entry, Mapping):
            what = f"config_list[{index}] is a {type(entry).__name__}, not a dict"
            raise ConfigError(what, f"Pass dicts, such as {example}")
    return config_list


def _parse(index: int, entry: Mapping[object, object], *, amounts: bool) -> _Entry:
    """Turns one dict into a validated entry."""
    for key in entry:
        _check_key(index, key)
    given = {str(key): value for key, value in entry.items()}
    exclude = given.get("exclude", False)
    if not isinstance(exclude, bool):
        what = f"config_list[{index}]['exclude'] is {exclude!r}, neither True nor False"
        raise ConfigError(what, "Write 'exclude': True, or leave the key out")
    _check_combination(index, given, exclude=exclude, amounts=amounts)
    given_amounts = {key: check_sparsity(given[key], f"config_list[{index}][{key!r}]") for key in AMOUNTS if key in given}
    cap, caps = _parse_caps(given.get("max_sparsity_per_layer", 1.0), f"config_list[{index}]['max_sparsity_per_layer']")
    for key, amount in given_amounts.items():
        if amount > cap:
            what = f"config_list[{index}] asks for {key} {amount:g} but allows a max_sparsity_per_layer of {cap:g}"
            raise ConfigError(what, "Raise the maximum or lower the sparsity")
    return _Entry(
        index=index,
        exclude=exclude,
        sparsity=given_amounts.get("sparsity", given_amounts.get("sparsity_per_layer")),
        total=given_amounts.get("total_sparsity"),
        cap=cap,
        caps=caps,
        selectors={key: _parse_names(given[key], key, f"config_list[{index}][{key!r}]") for key in SELECTORS if key in given},
    )


def _check_key(index: int, key: object) -> None:
    """Raises unless `key` is one of the known keys."""
    if key in _KEYS:
        return
    if key in _OWN_KEYS:
        what = f"config_list[{index}] has the key {key!r}, which only {_OWN_KEYS[str(key)]} understands"
        raise ConfigError(what, f"Remove the key, or use {_OWN_KEYS[str(key)]}")
    if key in _SCHEDULE_KEYS:
        what = f"config_list[{index}] has the key {key!r}, which describes a schedule over time and no layer"
        raise ConfigError(what, "Write the sparsity to reach as 'sparsity' and drop the other keys of the schedule")
    hint = nearest(str(key), _KEYS)
    what = f"config_list[{index}] has the unknown key {key!r}{f' ({hint})' if hint else ''}"
    raise ConfigError(what, f"Use the keys {', '.join(_KEYS)}")


def _check_combination(index: int, given: Mapping[str, object], *, exclude: bool, amounts: bool) -> None:
    """Raises unless an entry prunes by one amount (by none where a budget says how much goes) or excludes, and not both."""
    found = [key for key in AMOUNTS if key in given]
    entry = f"config_list[{index}]"
    if exclude:
        surplus = [key for key in (*AMOUNTS, "max_sparsity_per_layer") if key in given]
        if surplus:
            what = f"{entry} excludes layers and gives {' and '.join(surplus)} at the same time"
            raise ConfigError(what, f"Remove either 'exclude' or {surplus[0]!r}")
        if not any(key in given for key in SELECTORS):
            what = f"{entry} excludes every layer, because it selects none in particular"
            raise ConfigError(what, f"Add one of {', '.join(SELECTORS)}")
    elif not amounts and found:
        raise ConfigError(f"{entry} gives {found[0]}, and a budget says already how much goes", f"Remove {found[0]!r}, or the budget")
    elif len(found) > 1:
        what = f"{entry} gives both {' and '.join(found)}"
        raise ConfigError(what, "Keep one of them: sparsity is per layer, total_sparsity is for all layers of the entry together")
    elif amounts and not found:
        what = f"{entry} gives no sparsity and does not exclude"
        raise ConfigError(what, "Add 'sparsity' or 'total_sparsity', or 'exclude': True")


def _parse_caps(value: object, where: str) -> tuple[float, dict[str, float]]:
    """Splits `max_sparsity_per_layer` into the maximum of all layers and those of single layers."""
    if not isinstance(value, Mapping):
        return _check_cap(value, where), {}
    return 1.0, {str(name): _check_cap(cap, f"{where}[{name!r}]") for name, cap in value.items()}


def _check_cap(value: object, where: str) -> float:
    """Returns `value` as a float when it is a fraction in (0, 1]."""
    number = _number(value, where, "Give a fraction, such as 0.9, or a dict from layer name to fraction")
    if not 0 < number <= 1:
        what = f"{where} is {value!r}, outside (0, 1]"
        raise ConfigError(what, "Give a fraction, such as 0.9; use 'exclude': True to keep a layer whole")
    return number


def split_rho(config_list: ConfigList, default: float) -> tuple[list[Any], list[float]]:
    """Returns the entries without their "rho", and the rho of every entry, for the pruner that understands this key.

    Args:
        config_list: the entries.
        default: rho of entries that have none.

    Raises:
        ConfigError: the list is no list of dicts, a rho is no finite number above 0, or its entry excludes layers.
    """
    entries, found = [], []
    for index, entry in enumerate(_entries(config_list)):
        where = f"config_list[{index}]"
        value = entry.get("rho", default)
        if "rho" in entry and entry.get("exclude") is True:
            raise ConfigError(f"{where} excludes layers and gives rho at the same time", "Remove either 'exclude' or 'rho'")
        fix = "Give a number above 0, such as 1e-4"
        if not 0 < (number := _number(value, f"{where}['rho']", fix)) < math.inf:
            raise ConfigError(f"{where}['rho'] is {value!r}, not above 0 and finite", fix)
        found.append(number)
        entries.append({key: item for key, item in entry.items() if key != "rho"})
    return entries, found


def _number(value: object, where: str, fix: str) -> float:
    """Returns a real number as a float; infinities and NaN pass, for the range checks to refuse."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        what = f"{where} is {value!r}, not a number"
        raise ConfigError(what, fix)
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def _parse_names(value: object, key: str, where: str) -> tuple[str, ...]:
    """Returns a selector's strings, without repetition."""
    if key == "op_types" and value == DEFAULT_TYPE:
        return (DEFAULT_TYPE,)
    if isinstance(value, str):
        what = f"{where} is the string {value!r}, not a list"
        raise ConfigError(what, f"Write [{value!r}]")
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) and name for name in value):
        what = f"{where} is {value!r}, not a list of names"
        raise ConfigError(what, "Write a list of strings that are not empty")
    if not value:
        what = f"{where} is empty and so selects nothing"
        raise ConfigError(what, "List at least one name, or leave the key out")
    return tuple(dict.fromkeys(value))
