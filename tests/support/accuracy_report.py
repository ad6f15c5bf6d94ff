"""What the cells of the accuracy table say together: tables in Markdown, and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphprune.runs.atomic import atomic
from tests.support.accuracy import OURS, PEER, STAGES, Cell, Method, Order, Record, Settings, identity

FAILED, MISSING = "failed", "-"
ORDERS: dict[Order, str] = {"even": "every layer alike", "global": "one ranking of all layers"}


class Results:
    """The records so far, in a file of JSON lines that is replaced as a whole after every cell.

    Args:
        path: the file; what it holds already is read.
        settings: of this table; records for other settings stay in the file and out of the table.

    Raises:
        ValueError: a line of the file is not a record.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self._path = path
        self._settings = settings
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            records: list[Record] = [json.loads(line) for line in lines]
            self._records = {_key(record): record for record in records}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            message = f"{path} is not a results file of this tool ({type(error).__name__}: {error}); name another folder"
            raise ValueError(message) from error

    def add(self, record: Record) -> None:
        """Keeps a record, in place of an earlier one of the same cell, and writes the file."""
        self._records[_key(record)] = record
        text = "".join(f"{json.dumps(one)}\n" for one in self._records.values())
        with atomic(self._path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def of(self, cell: Cell) -> Record | None:
        """Returns the record of a cell, or None where it has not been measured."""
        return self._records.get(_key(identity(cell, self._settings)))

    def is_done(self, cell: Cell) -> bool:
        """Returns whether a cell has been measured; one that failed is to be measured again."""
        record = self.of(cell)
        return record is not None and "error" not in record


def _key(record: Record) -> str:
    return json.dumps([record[name] for name in ("side", "criterion", "order", "options", "removed", "seed", "settings")], sort_keys=True)


@dataclass(frozen=True)
class Difference:
    """How much better we are than the peer, in percentage points: the mean over the seeds, the lowest and the highest of a seed."""

    mean: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        """In points, with signs."""
        return f"{self.mean:+.2f} ({self.lowest:+.2f} to {self.highest:+.2f})"


@dataclass(frozen=True)
class Table:
    """What was measured and how to read it.

    Attributes:
        results: the records.
        methods: the rows.
        budgets: fractions of the MACs removed, the columns.
        seeds: of the networks.
        dense: seed -> accuracy of the network before pruning.
        dense_macs: of that network.
        one_channel: MACs of its dearest channel.
    """

    results: Results
    methods: Sequence[Method]
    budgets: Sequence[float]
    seeds: Sequence[int]
    dense: dict[int, float]
    dense_macs: int
    one_channel: int

    def values(self, method: Method, removed: float, what: str) -> list[float]:
        """Returns one number per seed of a cell, fewer where it failed or has not been measured."""
        records = [self.results.of(Cell(method, removed, seed)) for seed in self.seeds]
        return [record[what] for record in records if record is not None and what in record]

    def mean(self, method: Method, stage: str) -> float | None:
        """Returns a method's mean accuracy over budgets and seeds, None unless all were measured."""
        found = [value for removed in self.budgets for value in self.values(method, removed, stage)]
        return statistics.fmean(found) if len(found) == len(self.budgets) * len(self.seeds) else None

    def difference(self, pairs: Sequence[tuple[Method, Method]], stage: str) -> Difference | None:
        """Returns how much better the first methods of the pairs are than the second, over all budgets; None unless all were measured."""
        per_seed = []
        for seed in self.seeds:
            points = []
            for removed in self.budgets:
                for pair in pairs:
                    ours, theirs = (self.results.of(Cell(method, removed, seed)) or {} for method in pair)
                    if stage not in ours or stage not in theirs:
                        return None
                    points.append(100 * (ours[stage] - theirs[stage]))
            per_seed.append(statistics.fmean(points))
        return Difference(statistics.fmean(per_seed), min(per_seed), max(per_seed)) if pairs else None

    def pairs(self) -> list[tuple[Method, Method]]:
        """Returns our methods together with the peer's that match, where both are rows."""
        found = [(method, method.match) for method in self.methods]
        return [(ours, theirs) for ours, theirs in found if theirs is not None and theirs in self.methods]

    def failures(self) -> list[str]:
        """Returns a line for every cell that failed."""
        lines = []
        for method in self.methods:
            for removed in self.budgets:
                for seed in self.seeds:
                    record = self.results.of(Cell(method, removed, seed))
                    if record is not None and "error" in record:
                        lines.append(f"{method.name}, {method.order}, {removed:.0%}, seed {seed}: {record['error']}")
        return lines

    def off_budget(self) -> list[str]:
        """Returns a line for every cell whose MACs are above its budget, or more than one channel's cost below."""
        lines = []
        for method in self.methods:
            for removed in self.budgets:
                target = self.dense_macs * (1 - removed)
                off = [macs for macs in self.values(method, removed, "macs") if not target - self.one_channel <= macs <= target]
                lines += [f"{method.name}, {method.order}, {removed:.0%}: {macs:,} MACs for a budget of {target:,.0f}" for macs in off]
        return lines

    def to_markdown(self) -> str:
        """Returns the whole report."""
        dense = ", ".join(f"{100 * value:.1f} % (seed {seed})" for seed, value in self.dense.items())
        share = f"{self.one_channel:,} ({self.one_channel / self.dense_macs:.1%})"
        stages = "right after pruning / with BatchNorm statistics estimated again / after fine-tuning"
        parts = [
            f"Dense networks: {dense}; {self.dense_macs:,} MACs, of which the dearest channel costs {share}.",
            f"Accuracy in percent, mean over the seeds: {stages}.",
        ]
        for order, words in ORDERS.items():
            methods = [method for method in self.methods if method.order == order]
            parts += [f"## {words[0].upper()}{words[1:]}", _markdown(self._accuracies(methods))] if methods else []
        parts += ["## MACs removed in percent, lowest to highest of the seeds", _markdown(self._costs())]
        if self.pairs():
            parts += ["## graphprune less Torch-Pruning in points, mean over the budgets (lowest to highest of the seeds)"]
            parts += [_markdown(self._differences())]
        for title, lines in (("Failed", self.failures()), ("Further than one channel from the budget", self.off_budget())):
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)] if lines else []
        return "\n\n".join(parts) + "\n"

    def _accuracies(self, methods: Iterable[Method]) -> list[list[str]]:
        rows = [["method", *(f"{removed:.0%} of MACs" for removed in self.budgets), *(f"mean {stage}" for stage in STAGES)]]
        for method in methods:
            cells = [self._cell(method, removed) for removed in self.budgets]
            means = [self.mean(method, stage) for stage in STAGES]
            rows.append([method.name, *cells, *(MISSING if mean is None else f"{100 * mean:.2f}" for mean in means)])
        return rows

    def _cell(self, method: Method, removed: float) -> str:
        records = [self.results.of(Cell(method, removed, seed)) for seed in self.seeds]
        if any(record is not None and "error" in record for record in records):
            return FAILED
        if any(record is None for record in records):
            return MISSING
        return " / ".join(f"{100 * statistics.fmean(self.values(method, removed, stage)):.1f}" for stage in STAGES)

    def _costs(self) -> list[list[str]]:
        rows = [["method", "order", *(f"{removed:.0%}" for removed in self.budgets)]]
        for method in self.methods:
            cells = []
            for removed in self.budgets:
                gone = [100 * (1 - macs / self.dense_macs) for macs in self.values(method, removed, "macs")]
                cells.append(f"{min(gone):.2f} to {max(gone):.2f}" if gone else MISSING)
            rows.append([method.name, method.order, *cells])
        return rows

    def _differences(self) -> list[list[str]]:
        rows = [["graphprune", "Torch-Pruning", "order", *STAGES]]
        chosen = [([pair], pair[0].name, pair[1].name, pair[0].order) for pair in self.pairs()]
        options = dict.fromkeys(ours.options for ours, _ in self.pairs())
        for order in ORDERS:
            for option in options:
                pairs = [pair for pair in self.pairs() if pair[0].order == order and pair[0].options == option]
                words = " ".join(("all", *(f"{key}={value}" for key, value in option)))
                chosen += [(pairs, words, "all", order)] if len(pairs) > 1 else []
        for pairs, ours, theirs, order in chosen:
            found = [self.difference(pairs, stage) for stage in STAGES]
            rows.append([ours, theirs.removeprefix("Torch-Pruning "), order, *(str(one) if one else MISSING for one in found)])
        return rows

    def plot(self, path: Path) -> None:
        """Draws accuracy over the MACs removed, a panel for each order and stage, ours as lines and the peer's dashed; writes a PNG."""
        import matplotlib as mpl  # noqa: PLC0415 (comes with the demo extra only)

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415

        orders = [order for order in ORDERS if any(method.order == order for method in self.methods)]
        figure, axes = plt.subplots(len(STAGES), len(orders), figsize=(6.5 * len(orders) + 2, 4 * len(STAGES)), squeeze=False)
        colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
        names = list(dict.fromkeys((method.criterion, method.options) for method in self.methods if method.side == OURS))
        for column, order in enumerate(orders):
            for row, stage in enumerate(STAGES):
                panel = axes[row][column]
                for method in (one for one in self.methods if one.order == order):
                    self._draw(panel, method, stage, colours, names)
                panel.set(title=f"{stage}, {ORDERS[order]}", xlabel="MACs removed, %", ylabel="accuracy, %")
                panel.grid(alpha=0.3)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="center right", fontsize="small")
        figure.tight_layout(rect=(0, 0, 1 - 2.2 / figure.get_figwidth(), 1))
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        plt.close(figure)

    def _draw(self, panel: Any, method: Method, stage: str, colours: Sequence[Any], names: Sequence[Any]) -> None:
        """Draws one method; a peer's has the colour of ours that it is compared with."""
        points = [(self.values(method, removed, "macs"), self.values(method, removed, stage)) for removed in self.budgets]
        points = [(macs, accuracies) for macs, accuracies in points if accuracies]
        if not points:
            return
        x = [100 * (1 - statistics.fmean(macs) / self.dense_macs) for macs, _ in points]
        y = [100 * statistics.fmean(accuracies) for _, accuracies in points]
        twins = [number for number, (name, _) in enumerate(names) if Method(OURS, name, method.order).match == method]
        number = names.index((method.criterion, method.options)) if method.side == OURS else (twins or [len(names)])[0]
        style = {"linestyle": "--", "marker": "x", "linewidth": 2.5} if method.side == PEER else {"marker": "o", "alpha": 0.8}
        panel.plot(x, y, label=method.name, color=colours[number % len(colours)], **style)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table, its first row the headings, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(zip(row, widths, strict=True))]
             for row in rows]  # fmt: skip
    lines.insert(1, [f"{'-' * (width - 1)}:" if number else "-" * width for number, width in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
