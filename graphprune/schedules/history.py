"""What happened round by round, or epoch by epoch: records, a table, CSV and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graphprune.errors import ConfigError
from graphprune.runs.records import Records, bar

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["History", "Movement", "Movements", "Round", "bar"]


@dataclass(frozen=True)
class Round:
    """One round of pruning and training.

    Attributes:
        number: counted from 1; 0 is the training of the whole model, where there is one.
        asked: the sparsity that each entry of the config list asked for, of the original model.
        sparsity: what is gone of the original model: of the listed weights, or of the channels of all groups.
        params: parameters that are left.
        macs: multiply-accumulates for the example inputs, or None where single weights or single layers are masked, which saves none.
        score: what the evaluator said, higher = better; None without an evaluator.
        seconds: wall time; rounds that differ only in this are equal.
    """

    number: int
    asked: tuple[float, ...]
    sparsity: float
    params: int
    macs: int | None = None
    score: float | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Movement:
    """Where movement pruning stood behind an epoch.

    Attributes:
        epoch: counted from 1.
        steps: how many steps the optimizer had taken.
        stage: how far the schedule had come, from 0 (nothing masked) to 1 (all that is asked for).
        sparsity: the share of all scores whose weights were masked.
        score: what the evaluator said of the masked model, higher = better; None without an evaluator.
        seconds: wall time; epochs that differ only in this are equal.
    """

    epoch: int
    steps: int
    stage: float
    sparsity: float
    score: float | None = None
    seconds: float = field(default=0.0, compare=False)


class History(Records[Round]):
    """The rounds, in order.

    Args:
        records: one record each.
        title: above the table.
    """

    kind = Round
    counted, axis = "number", "round"

    def __init__(self, records: Sequence[Round], title: str = "Rounds") -> None:
        super().__init__(records, title)

    @property
    def best(self) -> Round:
        """The round with the highest score, of equal ones the sparser; the last where there are no scores. Round 0 is not among them.

        Raises:
            ConfigError: there is no round yet.
        """
        pruned = [r for r in self if r.number]
        if not pruned:
            raise ConfigError("there is no round yet", "Call compress() first")
        return max(pruned, key=lambda r: (0.0 if r.score is None else r.score, r.number))

    def __rich__(self) -> Table:
        """Returns the table for the terminal."""
        from rich.table import Table  # noqa: PLC0415 (only where something is shown)

        table = Table(title=self._title)
        for head in ("round", "asked", "sparsity", "parameters", "MACs", "score", "seconds", ""):
            table.add_column(head, justify="right" if head else "left")
        top = self.best.number if any(r.number for r in self) and any(r.score is not None for r in self) else None
        for r in self:
            macs, score = ("" if r.macs is None else f"{r.macs:,}"), ("" if r.score is None else f"{r.score:.4f}")
            asked = " ".join(f"{a:.1%}" for a in dict.fromkeys(r.asked))
            mark = "best" if r.number == top else ""
            table.add_row(str(r.number), asked, f"{r.sparsity:.1%}", f"{r.params:,}", macs, score, f"{r.seconds:.1f}", mark)
        return table


class Movements(Records[Movement]):
    """The epochs of movement pruning, in order; see `Records`."""

    kind = Movement
    counted, axis = "epoch", "epoch"

    def __rich__(self) -> Table:
        """Returns the table for the terminal."""
        from rich.table import Table  # noqa: PLC0415 (only where something is shown)

        table = Table(title=self._title)
        for head in ("epoch", "steps", "stage", "sparsity", "score", "seconds"):
            table.add_column(head, justify="right")
        for r in self:
            score = "" if r.score is None else f"{r.score:.4f}"
            table.add_row(str(r.epoch), f"{r.steps:,}", f"{r.stage:.1%}", f"{r.sparsity:.1%}", score, f"{r.seconds:.1f}")
        return table
