"""What a shrunk model is compared with: the masked model, replayed from its recording or run anew where values decide what it does."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from graphprune.cost.predict import MacCounter, macs_of
from graphprune.errors import GraphPruneError, InputError
from graphprune.torch_private import is_operator, name_of
from graphprune.trace.data_dependent import is_delicate
from graphprune.trace.inputs import preserve_state
from graphprune.trace.outline import calls_of, outline
from graphprune.trace.outputs import output_tensors
from graphprune.trace.program import info
from graphprune.trace.recorder import record
from graphprune.verify.lockstep import DepartureError, Entry, Replay, Run, follow, lead
from graphprune.verify.replay import Check, MaskedModel, difference, first_difference, tolerance_for

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.surgery.rewriting import Removal
    from graphprune.trace.members import Members
    from graphprune.trace.program import Where


class Reference(Protocol):
    """The masked model, ready to be compared with."""

    def check(self, small: nn.Module, caches: list[Where] | None = None, members: Members | None = None) -> Check:
        """Runs a shrunk model and compares.

        Args:
            small: the shrunk model, left as it is.
            caches: where it keeps tensors of earlier runs, if that is known; they are empty then.
            members: its modules and tensors, if they have been gathered already.
        """

    def where(self, small: nn.Module) -> str:
        """Returns where a shrunk model first departs: operator and module path."""


def reference_for(masked: MaskedModel, dense: list[torch.Tensor] | None = None) -> Reference:
    """Runs a model masked, and all of it, to be compared with.

    Args:
        masked: the model and its masks.
        dense: what the model as it is now returns on the recorded inputs, where that is known.

    Raises:
        InputError: the model or the masked model gives values that nothing can be compared with, or their comparison needs other inputs.
    """
    if is_delicate(masked.program):
        return _LockstepReference.of(masked)
    if dense is None:
        with preserve_state(masked.model, draws=False):
            dense = output_tensors(masked.program.inputs.copied().call(masked.model))
    outputs = masked.outputs()

    def first_without_values(*, of_masked: bool) -> str:
        watch = _NotFinite()
        if of_masked:
            masked.outputs(watch)
        else:
            record(masked.model, masked.program.inputs, on_value=watch)
        return watch.first

    _require_values(dense, outputs, first_without_values)
    return _ReplayedReference(masked, outputs, difference(dense, outputs))


# -- replayed ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _ReplayedReference:
    """The masked model as its recording says, in which nothing depends on values."""

    masked: MaskedModel
    outputs: list[torch.Tensor]
    effect: float

    def check(self, small: nn.Module, caches: list[Where] | None = None, members: Members | None = None) -> Check:
        """Runs a shrunk model, as it is and watched, and compares what it returns."""
        program = self.masked.program
        tolerance, ran, counter = tolerance_for(program), None, MacCounter()
        try:
            with preserve_state(small, members, draws=False):
                error = difference(self.outputs, output_tensors(program.inputs.copied().call(small)))
        except GraphPruneError:
            raise
        except Exception:  # noqa: BLE001 (whatever the user's forward raises on new sizes counts as different)
            error = float("inf")
        if error <= tolerance:
            with suppress(Exception):  # (it runs, but cannot be watched: then it is not known to do what was recorded)
                ran = outline(small, program.inputs, caches, counter, members)
        if ran is None:
            return Check(error, self.effect, tolerance)
        error = max(error, difference(self.outputs, ran.outputs))
        return Check(error, self.effect, tolerance, calls=ran.calls, macs=counter.macs)

    def where(self, small: nn.Module) -> str:
        """Returns the first operator at which the two differ."""
        try:
            return first_difference(small, self.masked, tolerance_for(self.masked.program))
        except GraphPruneError as error:
            return error.what


# -- led ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _LockstepReference:
    """The masked model run in Python, whose decisions the shrunk model is led by."""

    model: nn.Module
    removal: Removal
    run: Run
    effect: float
    tolerance: float

    @staticmethod
    def of(masked: MaskedModel) -> _LockstepReference:
        masked_module = masked.module()
        dense = follow(masked.model, masked.removal, masked=False).run
        found = follow(masked_module, masked.removal)

        def first_without_values(*, of_masked: bool) -> str:
            watch = _NotFinite()
            record(masked_module if of_masked else masked.model, masked.program.inputs, on_value=watch)
            return watch.first

        _require_values(dense.outputs, found.run.outputs, first_without_values)
        return _LockstepReference(masked_module, found.removal, found.run, _effect(dense, found.run), tolerance_for(masked.program))

    def check(self, small: nn.Module, caches: list[Where] | None = None, members: Members | None = None) -> Check:
        """Runs a shrunk model and compares what it decides by, and what it returns."""
        leader, program = Replay(self.run.entries, self.tolerance), None
        try:
            program = lead(small, self.removal.analysis.program.inputs, leader, caches, members)
        except DepartureError:
            error = leader.error if leader.error > self.tolerance else float("inf")
        except InputError:
            error = float("inf")
        else:
            error = max(leader.error, difference(self.run.outputs, program.outputs))
        empty = not any(t.numel() for t in self.run.outputs)
        calls, macs = (None, None) if program is None else (calls_of(program), macs_of(program))
        return Check(error, self.effect, self.tolerance, leader.ties, empty, calls, macs)

    def where(self, small: nn.Module) -> str:
        """Returns the first operator at which the two differ."""
        run = follow(self.model, self.removal, everything=True).run
        leader = Replay(run.entries, self.tolerance, everything=True)
        try:
            lead(small, self.removal.analysis.program.inputs, leader)
        except InputError as error:
            entry = next(leader.entries, None)
            return f"{entry.place}: {error.what}" if entry is not None else error.what
        except GraphPruneError as error:
            return error.what
        return "no single operator: the programs agree node by node"


def _effect(dense: Run, masked: Run) -> float:
    """Returns how much the masks change: the outputs where they can be compared, else what goes into decisions that both take."""
    outputs = difference(dense.outputs, masked.outputs)
    if 0 < outputs < float("inf"):
        return outputs
    worst = 0.0
    for a, b in zip(dense.entries, masked.entries, strict=False):
        found = difference(a.inputs, b.inputs) if a.name == b.name else float("inf")
        if found == float("inf"):
            break
        worst = max(worst, found)
        if not _alike(a, b):
            break
    return worst


def _alike(a: Entry, b: Entry) -> bool:
    """Returns whether two runs decided alike."""
    return difference([t for t in a.outputs if isinstance(t, torch.Tensor)], [t for t in b.outputs if isinstance(t, torch.Tensor)]) == 0.0


# -- values that cannot be compared ------------------------------------------------------------------------------------------------


class _NotFinite:
    """Remembers the first operator that gives NaN though none went in."""

    def __init__(self) -> None:
        self.first = ""
        self.seen: set[fx.Node] = set()

    def __call__(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
            self.seen.add(node)
            if not self.first and not any(n in self.seen for n in node.all_input_nodes):
                name = (name_of(node.target) if is_operator(node.target) else str(node.target)).removeprefix("aten::")
                self.first = f", first at {name} in {info(node).place}"


def _require_values(dense: list[torch.Tensor], masked: list[torch.Tensor], first: Any) -> None:
    """Raises where outputs are NaN in a way that leaves nothing to compare.

    NaN in the same places of both (a row of attention that is masked altogether) is no obstacle if finite values differ elsewhere.

    Raises:
        InputError: naming the model and the first operator that gives NaN.
    """
    for outputs, which in ((dense, "model"), (masked, "masked model")):
        floats = [t for t in outputs if t.is_floating_point() and t.numel()]
        other = masked if outputs is dense else dense
        lost = any(bool(t.isnan().any()) for t in floats)
        if any(not bool(t.isfinite().any()) for t in floats) or (lost and not _same_gaps(outputs, other)):
            place = first(of_masked=outputs is masked)
            what = f"the output of the {which} on the example inputs is not finite, so nothing can be verified{place}"
            raise InputError(what, "Pass other inputs")


def _same_gaps(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Returns whether two outputs are NaN in the same places, and differ in others."""
    pairs = [(x, y) for x, y in zip(a, b, strict=False) if x.is_floating_point() and x.numel()]
    alike = all(x.shape == y.shape and torch.equal(x.isnan(), y.isnan()) for x, y in pairs)
    return alike and any(not torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)
