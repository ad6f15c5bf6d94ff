"""What a sensitivity analysis found: one record per group and sparsity, as a table, as CSV and as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rich.table import Table

from graphprune.cost.count import Cost
from graphprune.runs.records import Column, Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOLERANCE = 1e-12  # a drop that exceeds the admissible one by no more than the rounding of a difference is admissible


@dataclass(frozen=True)
class Measurement:
    """The score of the model when one group alone has lost channels.

    Attributes:
        group: its name.
        layers: the layers that produce its channels.
        channels: how many it had.
        kept: how many it kept.
        sparsity: the share that was asked for.
        score: what the evaluator said, higher = better.
        drop: how much less that is than the score of the whole model.
        params: parameters of the shrunk model.
        macs: its multiply-accumulates for the example inputs.
        seconds: wall time of shrinking and evaluating; measurements that differ only in this are equal.
    """

    columns: ClassVar[tuple[Column, ...]] = tuple(
        map(Column, ("group", "layers", "channels", "kept", "sparsity", "score", "drop", "params", "macs", "seconds"))
    )
    group: str
    layers: tuple[str, ...]
    channels: int
    kept: int
    sparsity: float
    score: float
    drop: float
    params: int
    macs: int
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class Sensitivity(Records[Measurement]):
    """How much each group's channels matter, each group by itself; see `Records` for its CSV and plot.

    Attributes:
        dense: the score of the whole model.
        cost: parameters and MACs of the whole model.
        measurements: by group, in the model's order, with rising sparsities.
        stopped: group -> why it was not pruned further.
        whole: group -> why it was not looked at.
        evaluations: how often the evaluator was called; scores that were known from an earlier run are not counted.
    """

    what: ClassVar[str] = "the measurements"
    inches: ClassVar[tuple[float, float]] = (9, 5)
    dense: float
    cost: Cost
    measurements: tuple[Measurement, ...]
    stopped: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    evaluations: int = field(default=0, compare=False)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that were measured."""
        return tuple(dict.fromkeys(m.group for m in self.measurements))

    def of(self, group: str) -> tuple[Measurement, ...]:
        """Returns the measurements of one group, with rising sparsities."""
        return tuple(m for m in self.measurements if m.group == group)

    def scores(self) -> dict[str, dict[float, float]]:
        """Returns group -> sparsity -> score."""
        return {name: {m.sparsity: m.score for m in self.of(name)} for name in self.groups}

    def admissible(self, drop: float) -> dict[str, float]:
        """Returns group -> the last sparsity before the score first drops by more than `drop`; 0 where the first does so already."""
        return last_admissible(self.dense, drop, self.scores())

    def table(self) -> Table:
        """Returns the drops as a table for the terminal: a row per group, a column per sparsity."""
        sparsities = sorted({m.sparsity for m in self.measurements})
        out = Table(title=f"Drop of the score when one group alone is pruned (whole: {self.dense:.4g})")
        out.add_column("group", overflow="fold")
        out.add_column("channels", justify="right")
        for sparsity in sparsities:
            out.add_column(f"{100 * sparsity:g}%", justify="right", no_wrap=True)
        for name in self.groups:
            found = {m.sparsity: m for m in self.of(name)}
            cells = [f"{found[s].drop:.4g}" if s in found else "" for s in sparsities]
            out.add_row(name, str(self.of(name)[0].channels), *cells)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return asdict(self)

    @property
    def _rows(self) -> tuple[Measurement, ...]:
        return self.measurements

    @property
    def _columns(self) -> tuple[Column, ...]:
        return Measurement.columns

    def _draw(self, figure: Figure) -> None:
        """Draws score over sparsity, a curve per group."""
        from matplotlib import colormaps  # noqa: PLC0415 (an extra)

        axes = figure.subplots()
        axes.axhline(self.dense, color="grey", linestyle=":", label="whole model")
        shades = colormaps["turbo"].resampled(max(2, len(self.groups)))
        for number, name in enumerate(self.groups):
            points = [(0.0, self.dense), *((m.sparsity, m.score) for m in self.of(name))]
            axes.plot(*zip(*points, strict=True), marker=".", color=shades(number), label=name)
        axes.set(xlabel="share of the group's channels that go", ylabel="score", xlim=(0, 1))
        axes.legend(fontsize="small", ncols=1 + len(self.groups) // 20, loc="center left", bbox_to_anchor=(1, 0.5))


def last_admissible(dense: float, drop: float, scores: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """Returns group -> the last sparsity before the score first falls below dense - drop; 0 where the first does so already.

    Args:
        dense: the score of the whole model.
        drop: by how much the score may fall.
        scores: group -> sparsity -> score.
    """
    out = {}
    for name, curve in scores.items():
        out[name] = 0.0
        for sparsity in sorted(curve):
            if exceeds(dense - curve[sparsity], drop):
                break
            out[name] = sparsity
    return out


def exceeds(drop: float, limit: float) -> bool:
    """Returns whether a drop is more than the limit, and not by rounding alone: 0.9 - 0.85 is 0.05."""
    return drop > limit + _TOLERANCE * max(1.0, abs(limit))
