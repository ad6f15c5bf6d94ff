"""What the zoo found, as tables."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.support.zoo_verdicts import (
    LEAST_REACH,
    Record,
    by_cause,
    exports,
    faults,
    holds,
    is_own_class,
    reaches,
    requirements,
    share_of,
    shown,
    zoo_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH: Final = 170
_DASH: Final = "-"


def console() -> Console:
    """Returns a console that is wide enough for the tables, also where the output is a file."""
    screen = Console()
    return screen if screen.is_terminal and screen.width >= _WIDTH else Console(width=_WIDTH)


def print_report(records: list[Record]) -> bool:
    """Prints what holds, what it costs, what fails and what is required; returns whether all requirements are met."""
    screen = console()
    parts = [_correctness(records), _cost(records), _graphs(records), _held(records), _narrow(records), _failures(records), _zoos(records)]
    for table in parts:
        if table.row_count:
            screen.print(table)
    passing = sum(not faults(record) for record in records)
    screen.print(f"{passing} of {len(records)} networks meet every threshold", style="green" if passing == len(records) else "red")
    lines = requirements(records)
    screen.print(_required(records))
    return all(line.met for line in lines)


def _table(title: str, *columns: str, right: bool = True, folded: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", show_lines=bool(folded))
    for number, column in enumerate(columns):
        is_text = column in folded or not right
        table.add_column(column, justify="right" if number and not is_text else "left", no_wrap=not is_text, overflow="fold")
    return table


def _correctness(records: list[Record]) -> Table:
    columns = ("groups", "reach", "permut.", "control", "error", "effect", "reference", "shape", "train", "ONNX", "kind", "seconds", "")
    table = _table("What holds (relative errors)", "network", *columns)
    keys = ("permutation_error", "control", "error", "effect", "reference_error", "shape_kept", "train_ok")
    for record in records:
        onnx = shown(record.get("onnx_error")) if exports(record) else "not dense"
        verdict = "[red]FAILS" if faults(record) else "[green]passes"
        values = [shown(record.get("groups")), _percent(record.get("reach")), *(shown(record.get(key)) for key in keys)]
        table.add_row(record["name"], *values, onnx, shown(record.get("kind")), f"{record.get('wall_seconds', 0):.0f}", verdict)
    return table


def _cost(records: list[Record]) -> Table:
    stages = ("trace", "groups", "score", "shrink", "verify")
    titles = ("input", "params", "after", "", "MACs", "after", "", *stages, "all", "CPU", "MiB")
    table = _table(
        "What it costs (MACs for the whole batch; seconds; all, CPU and MiB: of the measuring process, copies included)", "network", *titles
    )
    for record in records:
        sizes: list[str] = []
        for what, unit in (("params", 1e6), ("macs", 1e9)):
            before, after = record.get(f"{what}_before"), record.get(f"{what}_after")
            suffix = "M" if what == "params" else "G"
            sizes += [_DASH if count is None else f"{count / unit:.2f}{suffix}" for count in (before, after)]
            sizes.append(_percent(after / before if before and after is not None else None))
        seconds = record.get("seconds", {})
        times = [_DASH if stage not in seconds else f"{seconds[stage]:.2f}" for stage in stages]
        rss = record.get("peak_rss_mib")
        example = "x".join(map(str, record.get("input_shape", []))) or _DASH
        total = [f"{record.get(key, 0):.0f}" for key in ("wall_seconds", "cpu_seconds")]
        table.add_row(record["name"], example, *sizes, *times, *total, _DASH if rss is None else f"{rss:.0f}")
    return table


def _graphs(records: list[Record]) -> Table:
    table = _table("What became a GraphModule, and why", "network", "reason", folded=("reason",))
    for record in records:
        if record.get("kind") == "graph":
            table.add_row(record["name"], escape(str(record.get("reason"))))
    return table


def _held(records: list[Record]) -> Table:
    title = f"Networks of whose parameters less than {LEAST_REACH:.0%} can be pruned, and the reasons that hold most"
    table = _table(title, "network", "reach", "reasons", folded=("reasons",))
    for record in sorted(records, key=lambda known: known.get("reach") or 0.0):
        reach = record.get("reach")
        if reach is not None and reach < LEAST_REACH:
            reasons = "\n".join(f"{share:.1%} {reason}" for reason, share in record.get("held_by", []))
            table.add_row(record["name"], _percent(reach), escape(reasons))
    return table


def _narrow(records: list[Record]) -> Table:
    table = _table("Networks that do not run in the type that was asked for", "network", "ran in", "what it says", folded=("what it says",))
    for record in records:
        if record.get("refused"):
            table.add_row(record["name"], record["ran_in"], escape(record["refused"]))
    return table


def _failures(records: list[Record]) -> Table:
    table = _table("What fails, by cause", "what", "cause", "networks", "which", folded=("what", "cause", "which"))
    for what, cause, names, first in by_cause(records):
        table.add_row(what, escape(first if len(names) == 1 else cause), str(len(names)), ", ".join(names))
    return table


def _zoos(records: list[Record]) -> Table:
    columns = ("networks", "verified", "permuted", "checks", "own class", "ONNX", "reach, median", "reach, worst", "without a rule")
    table = _table("The zoos (ONNX: of those whose original exports, which are in brackets)", "zoo", *columns)
    zoos = list(dict.fromkeys(zoo_of(record) for record in records))
    for zoo in [*zoos, *(["all"] if len(zoos) > 1 else [])]:
        mine = [record for record in records if zoo in ("all", zoo_of(record))]
        shares = [share_of(mine, lambda r, share=share: holds(r, share)) for share in ("verify", "permute", "checks")]  # type: ignore[misc]
        exportable = [record for record in mine if exports(record)]
        onnx = f"{_percent(share_of(exportable, lambda r: holds(r, 'ONNX')))} ({len(exportable)})"
        known = reaches(mine)
        reach = [_percent(statistics.median(known) if known else None), _percent(min(known, default=None))]
        unknown = sorted({name.removeprefix("aten::") for record in mine for name in record.get("unknown", [])})
        values = [*map(_percent, shares), _percent(share_of(mine, is_own_class)), onnx, *reach, ", ".join(unknown) or "none"]
        table.add_row(zoo, str(len(mine)), *values)
    return table


def _required(records: list[Record]) -> Table:
    table = _table("What is required", "zoo", "of which", "measured", "at least", "")
    for line in requirements(records):
        verdict = "[green]met" if line.met else "[red]missed"
        table.add_row(line.zoo, line.what, _percent(line.measured), _percent(line.bound), verdict)
    return table


def _percent(share: float | None) -> str:
    return _DASH if share is None else f"{share:.1%}"
