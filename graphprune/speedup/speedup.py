"""Physical removal: masks in, a smaller model out, checked against the masked model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from graphprune.cost.count import Cost, count
from graphprune.cost.predict import macs_of
from graphprune.errors import MaskError, VerificationError
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks, checked_tensors
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.budgets import Plan
from graphprune.sizes.attributes import Undo, assign
from graphprune.speedup.layers import layer_reports
from graphprune.speedup.report import GroupReport, SpeedupReport
from graphprune.surgery.attributes import explained, set_attributes
from graphprune.surgery.discovery import Discovery, discover
from graphprune.surgery.graphmodule import rewritten
from graphprune.surgery.recipe import Before, remember
from graphprune.surgery.rewriting import Removal
from graphprune.surgery.slicing import Old, like, put_back, shrink_in_place, shrunk_copy, sliced
from graphprune.trace.caches import caches, clear
from graphprune.trace.data_dependent import is_delicate
from graphprune.trace.inputs import Inputs, normalise
from graphprune.trace.members import Members
from graphprune.trace.outline import calls_of, outline
from graphprune.trace.recorder import record
from graphprune.trace.turns import in_turn
from graphprune.verify.reference import Reference, reference_for
from graphprune.verify.replay import Check, MaskedModel, relies_on_defaults, require, runs_as_recorded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphprune.groups.graph import DependencyGraph, Group, Slice
    from graphprune.trace.program import Program, Where


@in_turn
def speedup(
    model: nn.Module,
    masks: Masks | ElementMasks,
    example_inputs: object = None,
    *,
    verify: bool = True,
    inplace: bool = False,
    result: Literal["auto", "module", "graph"] = "auto",
    plan: Plan | None = None,
) -> tuple[nn.Module, SpeedupReport]:
    """Returns the model without the masked channels, and a report.

    The result is of the model's own class, its tensors sliced and its attributes set to the truth, wherever that reproduces the masked
    model. Where the forward's own size literals forbid it, the result is a `torch.fx.GraphModule` with rewritten integers; the report
    says which and why.

    Args:
        model: the model that the masks were made for; left as it is unless `inplace`.
        masks: what to keep, see `Masks`. Of masks of single elements, channels go that they remove entirely, all other elements stay zero;
            example inputs are needed then.
        example_inputs: to run the model on; by default those that the masks' graph was traced with.
        verify: compare with the masked model, on every run. Without it, whether a result of the model's own class runs the recorded
            operators is all that is checked.
        inplace: shrink the given model instead of a copy (tensors keep their identity, gradients are dropped). On failure it is put back.
        result: "module" insists on the model's own class, "graph" on a GraphModule.
        plan: what was asked of each group, for the report.

    Raises:
        MaskError: the masks were made for another model, or are of single elements and `inplace` is asked for.
        VerificationError: the result does not compute what the masked model computes; the first operator that differs is named.
    """
    if isinstance(masks, ElementMasks):
        if inplace:
            fix = "Zero them first: masks.apply(model), then speedup(model, masks.channels(graph), inplace=True)"
            raise MaskError("masks of single elements cannot be used in place, as the elements that stay zero could not be put back", fix)
        model, masks = masks.masked(model), masks.channels(trace(model, example_inputs))
    masks = _fitting(model, masks, example_inputs)
    return shrink(model, masks, plan or Plan(), verify=verify, inplace=inplace, result=result)


def shrink(
    model: nn.Module,
    masks: Masks,
    plan: Plan,
    *,
    verify: bool,
    inplace: bool,
    result: Literal["auto", "module", "graph"] = "auto",
    as_recorded: bool = False,
) -> tuple[nn.Module, SpeedupReport]:
    """Returns what `speedup` returns, for masks on a graph whose recording is of the inputs to verify with.

    Args:
        model: see `speedup`.
        masks: see `speedup`.
        plan: see `speedup`.
        verify: see `speedup`.
        inplace: see `speedup`.
        result: see `speedup`.
        as_recorded: whether the model has not changed since it was recorded, so that the recording's outputs and caches are its own.

    Raises:
        MaskError: see `speedup`.
        VerificationError: see `speedup`.
    """
    surgeon = _Surgeon(model, masks, plan, verify=verify, inplace=inplace, as_recorded=as_recorded)
    before = Before.of(model, stays=not inplace)
    try:
        found = surgeon.operate(result)
        report = surgeon.report(found)
    except BaseException:
        surgeon.undo()
        raise
    remember(found.module, before, found.kind, surgeon.masks)
    return found.module, report


def _fitting(model: nn.Module, masks: Masks, example_inputs: object) -> Masks:
    """Returns the masks on a graph whose recording is of these inputs; the given one unless other inputs are given."""
    recorded = masks.graph.engine.program.inputs
    if example_inputs is None or example_inputs is recorded or _same(example_inputs, recorded):
        return masks
    checked_tensors(model, masks.graph)
    graph = trace(model, example_inputs)
    return Masks(graph, {name: masks[name] for name in masks})


def _same(example_inputs: object, recorded: Inputs) -> bool:
    mine, theirs = normalise(example_inputs).tensors(), recorded.tensors()
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True, eq=False)
class _Shrunk:
    """A shrunk model.

    Attributes:
        module: the model.
        kind: whether it is of the original's own class.
        reason: why it is not.
        check: how it compares with the masked model; None where that was not asked for.
    """

    module: nn.Module
    kind: Literal["module", "graph"]
    reason: str
    check: Check | None


class _Surgeon:
    """One speedup: the model, what goes, and how long each step took."""

    def __init__(self, model: nn.Module, masks: Masks, plan: Plan, *, verify: bool, inplace: bool, as_recorded: bool) -> None:
        self.model = model
        self.masks = masks
        self.plan = plan
        self.graph: DependencyGraph = masks.graph
        self.verify = verify
        self.inplace = inplace
        self.as_recorded = as_recorded
        analysis = self.graph.engine
        self.program: Program = analysis.program
        self.removal = Removal(analysis, analysis.removed(masks.removed_causes))
        self.positions = masks.positions()
        self.members = Members.of(model)
        self.tensors = checked_tensors(model, self.graph, self.members)
        self.caches: list[Where] = self.program.caches if as_recorded else caches(model, self.program.inputs, self.members)
        self.old: dict[str, Old] = {}
        self.saved: list[tuple[nn.Module, dict[str, Any]]] = []
        self.unset: list[Undo] = []
        self.seconds = {"shrink": 0.0, "verify": 0.0, "count": 0.0}
        self.before = self._cost(model, macs_of(self.program)) if verify else None

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Adds the time that the block takes to that of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start

    def operate(self, result: str) -> _Shrunk:
        """Shrinks and checks."""
        reference = self._reference() if self.verify else None
        why = "asked for"
        if result != "graph":
            own = self._own_class(reference)
            if isinstance(own, _Shrunk):
                return own
            why = own
            if result == "module":
                fix = "Use result='auto' (keep_class=False) to get a GraphModule instead"
                raise VerificationError(f"the model's own class cannot be kept: {why}", fix)
        if self.inplace:
            fix = "Use inplace=False to get a GraphModule instead, or prune with keep_class=True"
            raise VerificationError(f"the model cannot be shrunk in place: {why}", fix)
        with self._timed("shrink"):
            try:
                small, remark = rewritten(self.model, self.removal, self.masks, self._sliced())
            except VerificationError as error:
                if result == "graph":
                    raise
                raise VerificationError(f"{why}. Besides, {error.what}", "Exclude the layers named above") from error
        check_graph = self._check(small, reference) if reference is not None else None
        if check_graph is not None and not check_graph.passed:
            require(check_graph, reference.where(small) if reference is not None else "")
        return _Shrunk(small, "graph", "; ".join(filter(None, [why, remark])), check_graph)

    # -- own class ---------------------------------------------------------------------------------------------------------------

    def _own_class(self, reference: Reference | None) -> _Shrunk | str:
        """Returns the model's own class shrunk, or why it cannot be kept."""
        modules = self.program.modules
        if any(isinstance(m, torch.jit.ScriptModule) for m in modules.values()):
            return f"{type(self.model).__name__} holds scripted modules, whose code cannot be resized"
        with self._timed("shrink"):
            simple = explained(self.removal, modules)
            found = Discovery({}) if simple else discover(self.model, self.removal, self.plan.demands if self.as_recorded else None)
            small = self._sliced_module()
            set_attributes(small, self.removal)
            self.unset = assign(small, found.values)
            clear(small, self.caches)
        check = self._check(small, reference, Members.of(small)) if reference is not None else None
        why = self._verdict(small, check, reference, found.broken, simple=simple)
        if why:
            self.undo()
            return why
        return _Shrunk(small, "module", "", check)

    def _sliced_module(self) -> nn.Module:
        if not self.inplace:
            return shrunk_copy(self.model, self.tensors, self.positions, self.graph.aliases, self.members)
        self.saved = [(m, dict(vars(m))) for m in self.model.modules()]
        shrink_in_place(self.tensors, self.positions, self.graph.aliases, self.old)
        return self.model

    def undo(self) -> None:
        """Puts a model that was shrunk in place back as it was."""
        for step in self.unset if self.inplace else ():
            step()
        put_back(self.tensors, self.old)
        for module, attributes in self.saved:
            vars(module).clear()
            vars(module).update(attributes)
        self.old, self.saved, self.unset = {}, [], []

    def _verdict(self, small: nn.Module, check: Check | None, reference: Reference | None, broken: Sequence[str], *, simple: bool) -> str:
        """Returns why a shrunk module of the model's own class may not be returned, or ""."""
        name = type(small).__name__
        if not broken if check is None else check.passed:
            return "" if self._runs_as_recorded(small, check) else f"{name}.forward goes by the sizes that it meets"
        if broken:
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            return f"{name}.forward has sizes of its own that no attribute sets right: {broken[0]}{more}; see keep_class"
        where = reference.where(small) if reference is not None else "it cannot be run"
        if simple and check is not None and math.isfinite(check.error) and self._runs_as_recorded(small, check):
            require(check, where)
        return f"{name}.forward has sizes of its own, so its class cannot be kept: {where}"

    def _runs_as_recorded(self, small: nn.Module, check: Check | None) -> bool:
        """Returns whether a shrunk module runs the recorded operators; it is run now unless the check has done so."""
        if relies_on_defaults(self.removal):
            return False  # whatever it runs
        try:
            calls = check.calls if check is not None else None
            if calls is None:
                calls = outline(small, self.program.inputs, self.caches, draws=is_delicate(self.program)).calls
            if runs_as_recorded(calls, self.removal):
                return True
            again = record(small, self.program.inputs, caches=self.caches)  # what holds a tensor may change which operators PyTorch runs
            return runs_as_recorded(calls_of(again), self.removal)
        except Exception:  # noqa: BLE001 (whatever the user's forward raises on new sizes means that it does something else)
            return False

    # -- checking ----------------------------------------------------------------------------------------------------------------

    def _reference(self) -> Reference:
        with self._timed("verify"):
            dense = self.program.outputs if self.as_recorded else None
            return reference_for(MaskedModel(self.model, self.masks, self.removal, {n: t.detach() for n, t in self.tensors.items()}), dense)

    def _check(self, small: nn.Module, reference: Reference, members: Members | None = None) -> Check:
        with self._timed("verify"):
            return reference.check(small, self.caches if type(small) is type(self.model) else None, members)

    def _cost(self, model: nn.Module, macs: int | None) -> Cost:
        """Returns the cost of a model; its MACs are counted where they are not known."""
        with self._timed("count"):
            if macs is None:
                return count(model, self.program.inputs)
            return Cost(sum(parameter.numel() for parameter in model.parameters()), macs)

    # -- results -----------------------------------------------------------------------------------------------------------------

    def _sliced(self) -> dict[str, torch.Tensor]:
        tensors = {n: self.tensors.get(n, t) for n, t in self.program.tensors.items()}
        tensors |= {n: t for n, t in self.tensors.items() if n not in self.program.aliases}
        kept = {n: self.positions.get(n, {}) for n in tensors}
        return {n: like(t, sliced(t, kept[n]) if kept[n] else t.detach().clone()) for n, t in tensors.items()}

    def report(self, found: _Shrunk) -> SpeedupReport:
        """Returns the report on the finished speedup."""
        plan, check = self.plan, found.check
        after = self._cost(found.module, check.macs) if check is not None else None
        return SpeedupReport(
            kind=found.kind,
            reason=found.reason,
            verified=check is not None,
            error=check.error if check else 0.0,
            effect=check.effect if check else 0.0,
            tolerance=check.tolerance if check else 0.0,
            before=self.before,
            after=after,
            groups=tuple(self._group_report(g, plan) for g in self.graph.groups),
            frozen=self.graph.frozen,
            unknown=self.graph.unknown,
            remarks=check.remarks if check else (),
            seconds={**self.graph.seconds, **plan.seconds, **self.seconds},
            layers=tuple(layer_reports(self.model, self.masks, plan)),
            budget=plan.budget,
        )

    def _group_report(self, group: Group, plan: Plan) -> GroupReport:
        kept = int(self.masks[group.name].sum())
        params = sum(self._elements(s) * (group.channels - kept) for s in group.slices)
        requested, note = plan.requested.get(group.name), plan.notes.get(group.name, "")
        return GroupReport(group.name, group.layers, group.channels, kept, group.verdict, requested, note, params)

    def _elements(self, s: Slice) -> int:
        """Returns how many parameter elements one channel owns in a slice, with all other dimensions at full width."""
        if not isinstance(self.tensors.get(s.parameter), nn.Parameter):
            return 0
        shape = self.graph.shapes[s.parameter]
        return int(math.prod(shape) // shape[s.dim] * s.index.shape[1])
