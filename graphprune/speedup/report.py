"""What a speedup did, in numbers and reasons."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Group as Renderable

    from graphprune.cost.count import Cost
    from graphprune.groups.graph import Frozen, Unknown
    from graphprune.pruners.budgets import Budget


@dataclass(frozen=True)
class GroupReport:
    """What happened to one group.

    Attributes:
        name: of the group.
        layers: that produce its channels.
        channels: before.
        kept: after.
        requested: the sparsity asked for, or None when masks came from elsewhere.
        verdict: "exact", "repaired" or "changed".
        note: why it lost less than it could, or "".
        params: parameters that went with its channels alone (others of its tensors' dimensions at full width).
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    kept: int
    verdict: str
    requested: float | None = None
    note: str = ""
    params: int = 0


@dataclass(frozen=True)
class LayerReport:
    """What was asked of one layer, and what it lost: with its own channels and with those that it reads.

    Attributes:
        name: qualified name of the module, "" for the model itself.
        kind: class name of the module.
        before: its parameters and MACs.
        after: what is left of them.
        channels: how many channels it produces that may be removed or frozen, 0 for a layer that produces none.
        kept: how many of them are left.
        requested: the sparsity asked for, or None when a budget or a ranking decided.
        note: why it lost less than was asked for, or "".
    """

    name: str
    kind: str
    before: Cost
    after: Cost
    channels: int = 0
    kept: int = 0
    requested: float | None = None
    note: str = ""

    @property
    def achieved(self) -> float:
        """The share of its channels that went, in [0, 1)."""
        return 1.0 - self.kept / self.channels if self.channels else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the entry as plain values, for JSON."""
        return {**vars(self), "before": self.before.to_dict(), "after": self.after.to_dict(), "achieved": self.achieved}


@dataclass(frozen=True)
class SpeedupReport:
    """What `speedup` and `prune` return beside the model; prints as a table.

    Attributes:
        kind: "module" when the result is of the user's own class, "graph" when it is a GraphModule.
        reason: why that kind.
        verified: whether error and effect were measured.
        error: relative difference between shrunk and masked model (0.0 when not verified).
        effect: relative difference between masked and original model (0.0 when not verified).
        tolerance: what the error was held against.
        before: parameters and MACs of the original, or None when not counted.
        after: parameters and MACs of the result, or None when not counted.
        groups: one entry per group.
        layers: one entry per module that has parameters or MACs of its own.
        frozen: what could not be removed, and why.
        unknown: operators without a rule, and what they cost.
        remarks: what somebody who relies on the verification should know.
        budget: what was asked of the whole model, or None.
        seconds: wall time of "trace", "groups", "score", "shrink", "verify", "count".
    """

    kind: Literal["module", "graph"]
    reason: str
    verified: bool
    error: float
    effect: float
    tolerance: float
    before: Cost | None
    after: Cost | None
    groups: tuple[GroupReport, ...]
    frozen: tuple[Frozen, ...]
    unknown: tuple[Unknown, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    budget: Budget | None = None

    @property
    def sparsity(self) -> float:
        """The share of all groups' channels that went."""
        total = sum(g.channels for g in self.groups)
        return 1.0 - sum(g.kept for g in self.groups) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        return {
            "kind": self.kind,
            "reason": self.reason,
            "verified": self.verified,
            "error": self.error,
            "effect": self.effect,
            "tolerance": self.tolerance,
            "before": self.before.to_dict() if self.before else None,
            "after": self.after.to_dict() if self.after else None,
            "sparsity": self.sparsity,
            "budget": None if self.budget is None else {"unit": self.budget.unit, "removed": self.budget.removed},
            "layers": [layer.to_dict() for layer in self.layers],
            "groups": [{**vars(g), "layers": list(g.layers)} for g in self.groups],
            "frozen": [{"parameter": f.parameter, "dim": f.dim, "positions": int(f.index.size), "reason": str(f)} for f in self.frozen],
            "unknown": [vars(u) for u in self.unknown],
            "seconds": dict(self.seconds),
            "remarks": list(self.remarks),
        }

    def __rich__(self) -> Renderable:
        """Renders totals, groups, layers and what is frozen."""
        from rich.console import Group as Renderable  # noqa: PLC0415 (only where something is shown)
        from rich.text import Text  # noqa: PLC0415

        parts = (self._totals(), self._table(), self._layers() if self.layers else None, Text(self._closing()))
        return Renderable(*(part for part in parts if part is not None))

    def _totals(self) -> Any:
        from rich.table import Table  # noqa: PLC0415

        if self.before is None or self.after is None:
            return None
        table = Table(title="Cost")
        for head in ("", "before", "after", "left"):
            table.add_column(head, justify="right" if head else "left")
        left = self.after.relative_to(self.before)
        table.add_row("parameters", f"{self.before.params:,}", f"{self.after.params:,}", f"{left.params:.1%}")
        table.add_row("MACs", f"{self.before.macs:,}", f"{self.after.macs:,}", f"{left.macs:.1%}")
        return table

    def _table(self) -> Any:
        from rich.table import Table  # noqa: PLC0415

        table = Table(title="Groups")
        for head in ("group", "channels", "kept", "verdict", "parameters gone", "note"):
            table.add_column(head, justify="right" if head in {"channels", "kept", "parameters gone"} else "left")
        for g in self.groups:
            others = f" +{len(g.layers) - 1}" if len(g.layers) > 1 else ""
            table.add_row(g.name + others, str(g.channels), str(g.kept), g.verdict, f"{g.params:,}", g.note)
        return table

    def _layers(self) -> Any:
        from rich.table import Table  # noqa: PLC0415

        table = Table(title="Layers")
        for head in ("layer", "type", "channels", "kept", "asked", "gone", "parameters gone", "MACs gone", "note"):
            table.add_column(head, justify="left" if head in {"layer", "type", "note"} else "right")
        for entry in (e for e in self.layers if e.channels or e.before.macs or e.requested is not None):
            left = entry.after.relative_to(entry.before)
            asked = "" if entry.requested is None else f"{entry.requested:.1%}"
            own = (str(entry.channels), str(entry.kept), asked, f"{entry.achieved:.1%}") if entry.channels else ("", "", "", "")
            table.add_row(entry.name, entry.kind, *own, f"{1 - left.params:.1%}", f"{1 - left.macs:.1%}", entry.note)
        return table

    def _closing(self) -> str:
        kind = "the model's own class" if self.kind == "module" else "a GraphModule"
        asked = self._asked()
        lines = [*([asked] if asked else []), f"Result: {kind}" + (f" ({self.reason})" if self.reason else "")]
        if self.verified:
            lines.append(f"Verified: error {self.error:.1e} (at most {self.tolerance:.0e}), effect of the mask {self.effect:.1e}")
        else:
            lines.append("Not verified")
        lines += self.remarks
        lines += [f"No rule for {u.operator} in {u.module or 'the model itself'}: {u.channels} channels frozen" for u in self.unknown]
        return "\n".join(lines)

    def _asked(self) -> str:
        """Returns the budget and what was achieved of it, in words."""
        if self.budget is None or self.before is None or self.after is None:
            return ""
        left: float = getattr(self.after.relative_to(self.before), self.budget.unit)
        return f"Budget: {self.budget} to go, {1.0 - left:.2%} went"

    def __str__(self) -> str:
        """The report as plain text."""
        from rich.console import Console  # noqa: PLC0415

        text = io.StringIO()
        Console(width=140, file=text).print(self)
        return text.getvalue().rstrip()
