"""What the zoo demands of a network's record, and the record as tables."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]

# key, relation, bound, what it is called
THRESHOLDS: Final[tuple[tuple[str, str, Any, str], ...]] = (
    ("unknown", "==", [], "operators without a rule"),
    ("off_target", "==", [], "sparsity of every group"),
    ("coverage_faults", "==", 0, "coverage"),
    ("permutation_error", "<", 1e-9, "permutation"),
    ("control", ">", 1e-3, "permutation control"),
    ("error", "<", 1e-9, "speedup error"),
    ("effect", ">", 1e-3, "speedup effect"),
    ("reference_error", "<", 1e-9, "error against the reference"),
    ("shape_kept", "==", True, "output shape"),
    ("train_ok", "==", True, "training"),
    ("onnx_error", "<", 1e-3, "ONNX Runtime"),
)
# Errors above are for float64; a float32 run is held to these.
FLOAT32_BOUND: Final = 1e-3
_RELATIONS: Final[dict[str, Callable[[Any, Any], bool]]] = {"<": operator.lt, ">": operator.gt, "==": operator.eq}
_DASH: Final = "-"


def console() -> Console:
    """Returns a console that is wide enough for the tables, also where the output is a file."""
    screen = Console()
    return screen if screen.is_terminal and screen.width >= 150 else Console(width=150)


def faults(record: Record) -> list[tuple[str, str]]:
    """Returns (cause, detail) for each failed measurement, and each threshold that a measured value misses.

    A value that is missing though nothing failed is a fault as well, unless the process ended before it could be measured.
    """
    found = [(f"{stage} failed", detail) for stage, detail in record["failures"].items()]
    for key, relation, bound, cause in THRESHOLDS:
        limit: Any = FLOAT32_BOUND if relation == "<" and record["dtype"] == "float32" else bound
        value = record.get(key)
        if value is None:
            found += [] if record["failures"] else [(cause, "not measured")]
        elif not _RELATIONS[relation](value, limit):
            found.append((cause, f"{key} is {_shown(value)}, must be {relation} {limit}"))
    return found


def print_report(records: list[Record]) -> None:
    """Prints what holds, what it costs, and what fails."""
    screen = console()
    screen.print(_correctness(records))
    screen.print(_cost(records))
    failures = _failures(records)
    if failures.row_count:
        screen.print(failures)
    passing = sum(not faults(record) for record in records)
    screen.print(f"{passing} of {len(records)} networks meet every threshold", style="green" if passing == len(records) else "red")


def _shown(value: object) -> str:
    if value is None:
        return _DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _correctness(records: list[Record]) -> Table:
    columns = ("groups", "channels", "reach", "permut.", "control", "error", "effect", "reference", "shape", "train", "ONNX", "kind", "")
    table = _table("What holds (relative errors)", "network", *columns)
    keys = ("permutation_error", "control", "error", "effect", "reference_error", "shape_kept", "train_ok", "onnx_error", "kind")
    for record in records:
        counts = [_shown(record.get("groups")), _shown(record.get("channels")), _percent(record.get("reach"))]
        verdict = "[red]FAILS" if faults(record) else "[green]passes"
        table.add_row(_name(record), *counts, *(_shown(record.get(key)) for key in keys), verdict)
    return table


def _cost(records: list[Record]) -> Table:
    stages = ("trace", "groups", "score", "shrink", "verify")
    titles = ("input", "params", "after", "", "MACs", "after", "", *stages, "all", "MiB")
    table = _table(
        "What it costs (MACs for the whole batch; seconds; peak memory of the measuring process, copies included)", "network", *titles
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
        images = "x".join(map(str, record.get("input_shape", []))) or _DASH
        table.add_row(_name(record), images, *sizes, *times, f"{record.get('wall_seconds', 0):.0f}", _DASH if rss is None else f"{rss:.0f}")
    return table


def _failures(records: list[Record]) -> Table:
    causes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in records:
        for cause, detail in faults(record):
            causes[cause].append((_name(record), detail))
    table = Table(title="What fails, by cause", title_justify="left", show_lines=True)
    for column in ("cause", "networks", "which", "the first says"):
        table.add_column(column, overflow="fold")
    for cause, entries in sorted(causes.items(), key=lambda item: -len(item[1])):
        table.add_row(cause, str(len(entries)), ", ".join(name for name, _ in entries), entries[0][1].replace("[", r"\["))
    return table


def _name(record: Record) -> str:
    return str(record["name"]).removeprefix("torchvision:")


def _percent(share: float | None) -> str:
    return _DASH if share is None else f"{share:.1%}"
