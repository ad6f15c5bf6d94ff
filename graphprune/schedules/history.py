"""What happened round by round, or epoch by epoch: records, a table, CSV and a plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from graphprune.errors import ConfigError
from graphprune.runs.records import Column, RecordSequence

_SPARSITY, _SCORE, _SECONDS = Column("sparsity", "sparsity", ".1%"), Column("score", "score", ".4f"), Column("seconds", "seconds", ".1f")


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

    columns: ClassVar[tuple[Column, ...]] = (
        Column("number", "round"),
        Column("asked", "asked", ".1%"),
        _SPARSITY,
        Column("params", "parameters", ","),
        Column("macs", "MACs", ","),
        _SCORE,
        _SECONDS,
    )
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

    columns: ClassVar[tuple[Column, ...]] = (
        Column("epoch", "epoch"),
        Column("steps", "steps", ","),
        Column("stage", "stage", ".1%"),
        _SPARSITY,
        _SCORE,
        _SECONDS,
    )
    epoch: int
    steps: int
    stage: float
    sparsity: float
    score: float | None = None
    seconds: float = field(default=0.0, compare=False)


class History(RecordSequence[Round]):
    """The rounds, in order; see `RecordSequence`."""

    kind = Round

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

    @property
    def _columns(self) -> tuple[Column, ...]:
        top = self.best if any(r.number for r in self) and any(r.score is not None for r in self) else None
        return (*self.kind.columns, Column("", "", value=lambda r: "best" if r is top else ""))


class Movements(RecordSequence[Movement]):
    """The epochs of movement pruning, in order; see `RecordSequence`."""

    kind = Movement


def said(record: Round | Movement) -> str:
    """Returns what a record comes to, for a bar."""
    return f"sparsity {record.sparsity:.1%}" + ("" if record.score is None else f", score {record.score:.4g}")
