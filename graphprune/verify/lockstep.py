"""Running the masked and the shrunk model so that both decide alike, where what they do depends on the values that they compute.

The masked model is run in Python, not from its recording, since masks may change what it decides. Every decision is noted: what went into
it and what came out, kept channels only. The shrunk model must bring the same to each decision, up to rounding, and is then given the same
outcome. So a tie that rounding breaks the other way, or a random number, does not end the comparison; everything else is compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune.errors import GraphPruneError, InputError
from graphprune.groups.decisions import freeze_decided
from graphprune.groups.propagate import Analysis, extend, operators
from graphprune.surgery.rewriting import Removal
from graphprune.torch_private import is_mutable, name_of
from graphprune.trace.data_dependent import decision, rounds_matter
from graphprune.trace.inputs import tensors_in
from graphprune.trace.program import info
from graphprune.trace.recorder import record
from graphprune.verify.replay import difference, gathered, over_kept

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.trace.inputs import Inputs
    from graphprune.trace.members import Members
    from graphprune.trace.program import Program, Where

_ATTEMPTS = 4


@dataclass(frozen=True, eq=False)
class Entry:
    """What one operator did, kept channels only.

    Attributes:
        name: of the operator.
        module: path of the module that ran it.
        inputs: the tensors that went into a decision.
        outputs: what came out: tensors, or one Python number.
        decides: whether it is a decision that rounding or random numbers could change.
        literal: whether it draws whole numbers that depend on nothing else, which a GraphModule holds as a table.
    """

    name: str
    module: str
    inputs: list[torch.Tensor]
    outputs: list[Any]
    decides: bool
    literal: bool = False

    @property
    def place(self) -> str:
        """Operator and module path, as error messages name them."""
        return f"{self.name.removeprefix('aten::')} in {self.module or 'the model itself'}"


@dataclass(eq=False)
class Run:
    """One run of a model at full width.

    Attributes:
        entries: its decisions, or all operators.
        departed: whether it ran other operators than the recording that it followed.
        program: its recording, once it has ended.
    """

    entries: list[Entry] = field(default_factory=list)
    departed: bool = False
    program: Program | None = None

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The tensors that the model returned."""
        return self.program.outputs if self.program is not None else []


class DepartureError(GraphPruneError):
    """The shrunk model does something else than the masked model."""


# -- the masked model --------------------------------------------------------------------------------------------------------------


class ReferenceRun:
    """Runs the operators of a model at full width along a recording of it, whose labels are known."""

    def __init__(self, removal: Removal, *, masked: bool, everything: bool) -> None:
        """Takes the removal, whether it is masked, and whether to note all operators or decisions only."""
        analysis = removal.analysis
        self.removal = Removal(replace(analysis, values=dict(analysis.values), notes=dict(analysis.notes)), removal.flags)
        self.calls = operators(analysis.program)
        self.masked = masked
        self.everything = everything
        self.run = Run()

    def __call__(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operator; statistics are taken over kept channels."""
        twin = None if self.run.departed else next(self.calls, None)
        if twin is None or not _same(node, twin):
            self.run.departed = True
            return plain(node, func, args, kwargs)
        analysis = self.removal.analysis
        for mine, theirs in zip(node.all_input_nodes, twin.all_input_nodes, strict=True):
            analysis.values.setdefault(mine, analysis.values.get(theirs))
        notes = analysis.notes.get(twin)
        if notes is not None:
            analysis.notes[node] = notes
        analysis.values[node] = analysis.values.get(twin)
        before = saved(func, args, kwargs)
        if self.masked and notes is not None and any(self.removal.loses(s) for s in (*notes.statistics, *notes.kept_only)):
            result = over_kept(node, dict(_pairs(node, before)), self.removal)
        else:
            result = plain(node, func, args, kwargs)
        kind = decision(func, args, kwargs, result, constant=info(node).constant)
        decides = rounds_matter(kind, args, kwargs)
        if decides or self.everything:
            pairs = _pairs(node, before) if decides else ()
            inputs = [gathered(t, analysis.values.get(n), self.removal).clone() for n, t in pairs]
            literal = kind == "random" and info(node).constant and not (isinstance(result, torch.Tensor) and result.is_floating_point())
            name = name_of(func)
            self.run.entries.append(Entry(name, info(node).module, inputs, self._outputs(node, result), decides, literal))
        return result

    def _outputs(self, node: fx.Node, result: Any) -> list[Any]:
        values = self.removal.analysis.values.get(node)
        if isinstance(result, torch.Tensor):
            return [gathered(result, values, self.removal).clone()]
        if not isinstance(result, (list, tuple)):
            return [result]
        parts = values if isinstance(values, list) else [None] * len(result)
        return [gathered(t, v, self.removal).clone() if isinstance(t, torch.Tensor) else t for t, v in zip(result, parts, strict=True)]


@dataclass(frozen=True, eq=False)
class Followed:
    """A run of a model along a recording.

    Attributes:
        run: what the model did.
        removal: what goes, on the recording that has the same operators.
    """

    run: Run
    removal: Removal


def follow(model: nn.Module, removal: Removal, *, masked: bool = True, everything: bool = False) -> Followed:
    """Runs a model at full width along a recording of it, or along a new one where it takes another path.

    Args:
        model: of the same class as the recorded one, with all or with masked weights.
        removal: the recorded program and what goes.
        masked: whether statistics are taken over kept channels.
        everything: note all operators, not only decisions.

    Raises:
        InputError: the model takes a path on which channels depend on each other in another way.
    """
    inputs = removal.analysis.program.inputs
    for _ in range(_ATTEMPTS):
        follower = ReferenceRun(removal, masked=masked, everything=everything)
        follower.run.program = program = record(model, inputs, runner=follower)
        if not follower.run.departed:
            return Followed(follower.run, removal)
        removal = _relabelled(removal, program)
    what = "the masked model decides differently in every run, so that it cannot be compared with the shrunk one"
    raise InputError(what, "Pass other example inputs")


def _relabelled(removal: Removal, program: Program) -> Removal:
    """Returns the same removal on another recording of the model.

    Raises:
        InputError: the other path needs channels that go.
    """
    old = removal.analysis
    parameters = {name: replace(value, labels=list(value.labels)) for name, value in old.parameters.items()}
    new = Analysis(program, table=copy.deepcopy(old.table), parameters=parameters, reasons=list(old.reasons))
    extend(new, program)
    freeze_decided(new, program)
    flags = np.zeros(new.table.size, dtype=bool)
    flags[: removal.flags.size] = removal.flags
    made = Removal(new, flags)
    for name, value in parameters.items():
        for d in range(len(value.shape)):
            before = removal.kept(old.parameters[name], d) if name in old.parameters else np.arange(value.shape[d])
            if not np.array_equal(before, made.kept(value, d)):
                what = f"the masked model decides by its values to take a path that was not recorded, on which {name!r} has other channels"
                raise InputError(what, "Trace with example inputs that take both paths, or exclude the layers that decide")
    return made


def _same(mine: fx.Node, theirs: fx.Node) -> bool:
    """Returns whether two recordings run one operator on the same parameters at the same place."""
    if mine.target is not theirs.target or info(mine).module != info(theirs).module:
        return False
    pairs = list(zip(mine.all_input_nodes, theirs.all_input_nodes, strict=False))
    return (
        len(mine.all_input_nodes) == len(theirs.all_input_nodes)
        and all(a.op == b.op for a, b in pairs)
        and not any(a.op == "get_attr" and a.target != b.target and not str(a.target).startswith("constant_") for a, b in pairs)
    )


# -- the shrunk model --------------------------------------------------------------------------------------------------------------


class Replay:
    """Runs the operators of a shrunk model, and gives each decision the outcome that it had in the masked model."""

    def __init__(self, entries: list[Entry], tolerance: float, *, everything: bool = False) -> None:
        """Takes what the masked model did, and how large a difference may be."""
        self.entries = iter(entries)
        self.tolerance = tolerance
        self.everything = everything
        self.error = 0.0
        self.ties = 0

    def __call__(self, node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operator.

        Raises:
            DepartureError: something else than expected arrives at a decision.
        """
        before = saved(func, args, kwargs)
        result = plain(node, func, args, kwargs)
        kind = decision(func, args, kwargs, result, constant=info(node).constant)
        decides = rounds_matter(kind, args, kwargs)
        if not decides and not self.everything:
            return result
        name = name_of(func)
        entry = next((e for e in self.entries if e.name == name or not e.literal), None)
        if entry is None or entry.name != name:
            short = name.removeprefix("aten::")
            if entry is None:
                raise DepartureError(f"{short} in {info(node).place}, which the masked model does not run", "")
            raise DepartureError(f"{entry.place}, where the shrunk model runs {short} instead", "")
        self._compare(entry, before if decides else [], entry.inputs if decides else [])
        if self.everything and kind != "random":
            self._compare(entry, [r for r in _parts(result) if isinstance(r, torch.Tensor) and r.is_floating_point()],
                          [r for r in entry.outputs if isinstance(r, torch.Tensor) and r.is_floating_point()])  # fmt: skip
        return self._led(result, tensors_in((args, kwargs)), entry, kind) if decides else result

    def _compare(self, entry: Entry, mine: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
        error = difference(theirs, mine)
        self.error = max(self.error, error)
        if not error <= self.tolerance:
            sizes = [(tuple(b.shape), tuple(a.shape)) for a, b in zip(theirs, mine, strict=False) if a.shape != b.shape]
            what = f"shape {sizes[0][0]} instead of {sizes[0][1]}" if sizes else f"relative difference {error:.1e}"
            raise DepartureError(f"{entry.place}: {what}", "")

    def _led(self, result: Any, arguments: list[torch.Tensor], entry: Entry, kind: str) -> Any:
        """Returns the result with what was decided as in the masked model; values of the same shape stay the shrunk model's own."""
        mine = _parts(result)
        made = [
            a if kind != "random" and _continuous(a, b) else _in_place_of(a, b, arguments) for a, b in zip(mine, entry.outputs, strict=True)
        ]
        self.ties += kind != "random" and any(_decided_otherwise(a, b) for a, b in zip(mine, entry.outputs, strict=True))
        return type(result)(made) if type(result) in (list, tuple) else made[0] if not isinstance(result, (list, tuple)) else made


def _parts(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _continuous(mine: Any, theirs: Any) -> bool:
    """Returns whether a result may stay what the shrunk model computed: it varies little where its inputs do."""
    if not isinstance(mine, torch.Tensor):
        return False
    gap = torch.where(mine == theirs, 0.0, mine - theirs).abs() if mine.shape == theirs.shape and mine.is_floating_point() else None
    return gap is not None and bool((gap <= 1e-3 * theirs.abs().clamp(min=1e-3)).all())


def _in_place_of(mine: Any, theirs: Any, arguments: list[torch.Tensor]) -> Any:
    if any(mine is a for a in arguments):
        return mine.copy_(theirs)
    return theirs.clone() if isinstance(theirs, torch.Tensor) else theirs


def _decided_otherwise(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor):
        return not mine.is_floating_point() and (mine.shape != theirs.shape or not torch.equal(mine, theirs))
    return isinstance(mine, (bool, int)) and mine != theirs


def lead(small: nn.Module, inputs: Inputs, leader: Replay, caches: list[Where] | None = None, members: Members | None = None) -> Program:
    """Runs a shrunk model with the masked model's decisions; returns its recording.

    Raises:
        DepartureError: it brings something else to a decision.
        InputError: it cannot be run.
    """
    program = record(small, inputs, runner=leader, caches=caches, members=members)
    left = next((e for e in leader.entries if not e.literal), None)
    if left is not None:
        raise DepartureError(f"{left.place}, which the shrunk model does not run", "")
    return program


# -- tensors -----------------------------------------------------------------------------------------------------------------------


def plain(node: fx.Node, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator as it is."""
    return args[0] if info(node).whole else func(*args, **kwargs)


def saved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Returns the tensors that go into an operator, copied where it writes to them."""
    tensors = tensors_in((args, kwargs))
    return [t.clone() for t in tensors] if is_mutable(func) else tensors


def _pairs(node: fx.Node, tensors: list[torch.Tensor]) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """Yields the nodes among a call's arguments with their tensors."""
    return zip(_nodes((node.args, node.kwargs)), tensors, strict=True)


def _nodes(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _nodes(item)
    elif hasattr(value, "all_input_nodes"):
        yield value
