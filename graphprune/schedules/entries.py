"""Config lists over time: what each entry asks for at a step, of the original model and of one that is smaller already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from graphprune.errors import ConfigError
from graphprune.pruners.budgets import kept_count, least_kept
from graphprune.schedules.functions import AGP, Schedule

if TYPE_CHECKING:
    from graphprune.masks.channels import Masks
    from graphprune.pruners.base import Pruner

Family: TypeAlias = Callable[[float], Schedule]
"""From the sparsity to reach to a schedule that reaches it."""

_AMOUNTS = ("sparsity", "sparsity_per_layer", "total_sparsity")
_TIMES = {"initial_sparsity": 0.0, "final_sparsity": None, "start_epoch": 0, "end_epoch": None, "frequency": 1}  # None: must be given


@dataclass(frozen=True)
class Planned:
    """A config list whose sparsities follow schedules.

    Attributes:
        entries: with the sparsities that they reach, as pruners understand them.
        schedules: one per entry; None for entries that exclude.
    """

    entries: tuple[dict[str, Any], ...]
    schedules: tuple[Schedule | None, ...]

    @property
    def end(self) -> int:
        """The step from which nothing changes any more."""
        return max((s.end for s in self.schedules if s is not None), default=0)

    def at(self, step: int) -> list[dict[str, Any]]:
        """Returns the entries with the sparsities of a step."""
        pairs = zip(self.entries, self.schedules, strict=True)
        return [dict(e) if s is None else {**e, amount_of(e): s(step)} for e, s in pairs]

    def asked(self, step: int) -> tuple[float, ...]:
        """Returns the sparsity of every entry that prunes, at a step."""
        return tuple(s(step) for s in self.schedules if s is not None)


def planned(config_list: Sequence[Mapping[str, Any]], who: str, family: Family | None, *, own: bool) -> Planned:
    """Returns a config list with a schedule for each entry.

    Args:
        config_list: entries with a `sparsity` (or `sparsity_per_layer`, `total_sparsity`) to reach, by the family's schedule; or with
            `final_sparsity`, `end_epoch` and, if they differ from 0, 0 and 1, `initial_sparsity`, `start_epoch` and `frequency`.
        who: the pruner, for errors.
        family: of schedules; None where every entry must have its own.
        own: whether entries may have schedules of their own, as in the second form.

    Raises:
        ConfigError: it is no list of dicts, or the schedule of an entry cannot be followed.
    """
    check_entries(config_list, who, "'sparsity': 0.8" if family else "'final_sparsity': 0.8, 'end_epoch': 10")
    entries: list[dict[str, Any]] = []
    schedules: list[Schedule | None] = []
    for index, entry in enumerate(config_list):
        where = f"config_list[{index}] of {who}"
        times = [key for key in _TIMES if key in entry]
        if entry.get("exclude"):
            entries.append(dict(entry))
            schedules.append(None)
            continue
        if times and not own:
            raise ConfigError(f"{where} gives {times[0]!r}, and {who} has one schedule for all", "Write the 'sparsity' to reach")
        schedule = _own(entry, where) if family is None or times else _of_family(entry, where, family)
        asks = any(key in entry for key in _AMOUNTS)
        entries.append({**{k: v for k, v in entry.items() if k not in _TIMES}, **({} if asks else {"sparsity": schedule(schedule.end)})})
        schedules.append(schedule)
    return Planned(tuple(entries), tuple(schedules))


def check_entries(config_list: object, who: str, example: str) -> None:
    """Raises where a config list is no list of dicts.

    Args:
        config_list: what was given as one.
        who: the pruner, for errors.
        example: what an entry of it has in front of its selector.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(config_list, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in config_list):
        what = f"config_list of {who} is not a list of dicts"
        raise ConfigError(what, f"Pass one such as [{{{example}, 'op_types': ['default']}}]")


def amount_of(entry: Mapping[str, Any]) -> str:
    """Returns the key of the sparsity that an entry gives."""
    return next(key for key in _AMOUNTS if key in entry)


def _of_family(entry: Mapping[str, Any], where: str, family: Family) -> Schedule:
    found = [key for key in _AMOUNTS if key in entry]
    if len(found) != 1:
        given = f"gives both {' and '.join(found)}" if found else "gives no sparsity and does not exclude"
        raise ConfigError(f"{where} {given}", "Write the 'sparsity' to reach, or 'total_sparsity' for all layers of the entry together")
    try:
        return family(entry[found[0]])
    except ConfigError as error:
        raise ConfigError(f"{where} cannot be followed: {error.what}", error.fix) from error


def _own(entry: Mapping[str, Any], where: str) -> Schedule:
    surplus = [key for key in _AMOUNTS if key in entry]
    if surplus and not any(key in entry for key in _TIMES):
        what = f"{where} gives {surplus[0]!r}, which is one sparsity and no schedule"
        raise ConfigError(what, "Write 'final_sparsity' and 'end_epoch'")
    if surplus:
        raise ConfigError(f"{where} gives {surplus[0]!r} besides a schedule", "Remove it, or the keys of the schedule")
    missing = [key for key, default in _TIMES.items() if default is None and key not in entry]
    if missing:
        raise ConfigError(f"{where} has no {missing[0]!r}", "Add it to the entry's schedule")
    initial, final, start, end, frequency = (entry.get(key, default) for key, default in _TIMES.items())
    try:
        return AGP(final, end, initial, start, frequency)
    except ConfigError as error:
        raise ConfigError(f"{where} cannot be followed: {error.what}", error.fix) from error


def relative(plan: Planned, step: int, pruner: Pruner, masks: Masks) -> list[dict[str, Any]]:
    """Returns what to ask of a smaller model, so that what is gone of the ORIGINAL channels is what a step asks for.

    Where c of a group's n channels are gone and n s_t are to be, (n s_t - c) of the n - c that are left go: s = (s_t - c/n) / (1 - c/n),
    with both counts whole. Entries name layers and no types, as a smaller model may be a recorded program without classes.

    Args:
        plan: of the original model.
        step: of its schedules.
        pruner: of the original model, with the plan's entries.
        masks: of the original model: what is left.
    """
    asked = {index: s(step) for index, s in enumerate(plan.schedules) if s is not None}
    groups = [(g.channels, int(masks[g.name].sum()), pruner.selectable(g)) for g in pruner.graph.groups]
    layers = pruner.config.layers
    out: list[dict[str, Any]] = []
    totals: dict[int, list[str]] = {}
    for name, config in layers.items():
        mine = [(n, left) for n, left, members in groups if name in members]
        if config.total is not None or pruner.mode == "global":
            totals.setdefault(config.entry, []).append(name)
        elif mine:
            share = min(asked[config.entry], config.max_sparsity)
            shares = [
                _share(left, max(kept_count(n, share, pruner.rounding, pruner.round_to), _least(n, config.max_sparsity, pruner)))
                for n, left in mine
            ]
            out.append({**_others(plan.entries[config.entry]), "op_names": [name], "sparsity": min(shares)})
    for entry, names in totals.items():
        mine = [(n, left) for n, left, members in groups if members and all(m in names for m in members)]
        target = kept_count(sum(n for n, _ in mine), asked[entry], pruner.rounding) if mine else 0
        caps = {}
        for name in names:
            most = layers[name].max_sparsity
            own = [_share(left, _least(n, most, pruner)) for n, left, members in groups if name in members]
            caps[name] = max(min(own, default=1.0), 1e-9) if most < 1.0 else 1.0
        share = _share(sum(left for _, left in mine), target)
        extra = _others(plan.entries[entry])
        out.append({**extra, "op_names": names, "total_sparsity": share, "max_sparsity_per_layer": caps})
    return out


def _share(left: int, target: int) -> float:
    """Returns which share of the channels that are left has to go for a number of them to stay."""
    return max(0.0, 1.0 - target / left) if left else 0.0


def _least(channels: int, most: float, pruner: Pruner) -> int:
    return least_kept(channels, most, pruner.round_to) if most < 1.0 else 0


def _others(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of an entry that are neither amounts nor selectors."""
    return {key: entry[key] for key in ("rho",) if key in entry}
