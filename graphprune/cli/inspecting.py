"""``graphprune inspect``: the groups of a model, what is frozen and why, and one layer explained."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli import arguments
from graphprune.cli.screen import Screen

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from graphprune.groups.graph import DependencyGraph, Frozen, Group

_LAYERS_SHOWN = 2
_OPERATORS_SHOWN = 3


def inspect(
    ctx: typer.Context,
    model: arguments.Model,
    *,
    inputs: arguments.Inputs = None,
    weights: arguments.Weights = None,
    dtype: arguments.DtypeOption = None,
    seed: arguments.Seed = 0,
    explain: Annotated[str | None, typer.Option("--explain", metavar="LAYER", help="Say what one layer's channels hang on.")] = None,
) -> None:
    """Show what can be removed from a model, what is frozen, and why."""
    from graphprune.cli.loading import Request
    from graphprune.groups.build import trace

    screen: Screen = ctx.obj
    with screen.busy(f"building {model}"):
        loaded = Request(model, inputs or (), weights, dtype and dtype.value, seed).load()
    with screen.busy("tracing"):
        graph = trace(loaded.model, loaded.inputs)
    if explain is not None:
        text = graph.explain(explain)
        screen.result({**loaded.facts(), "layer": explain, "explanation": text.splitlines()}, text)
        return
    trained = {name for name, _ in loaded.model.named_parameters()}
    sizes = {group.name: parameters_of(group, graph, trained) for group in graph.groups}
    screen.result({**loaded.facts(), **_facts(graph, sizes)}, loaded.title(), *_tables(graph, sizes))


def parameters_of(group: Group, graph: DependencyGraph, trained: Iterable[str]) -> int:
    """Returns how many elements of parameters lie in some slice of a group; buffers do not count.

    An element of a weight whose rows and columns both belong to the group counts once: of a weight of shape (a, b) with p rows and q
    columns in the group, a b - (a - p) (b - q) elements do.
    """
    known = set(trained)
    owned: dict[str, dict[int, int]] = {}
    for s in group.slices:
        if s.parameter in known:
            dims = owned.setdefault(s.parameter, {})
            dims[s.dim] = dims.get(s.dim, 0) + s.index.size
    untouched = {name: prod(size - owned[name].get(dim, 0) for dim, size in enumerate(graph.shapes[name])) for name in owned}
    return sum(prod(graph.shapes[name]) - rest for name, rest in untouched.items())


def _by_reason(frozen: Iterable[Frozen]) -> dict[str, list[Frozen]]:
    """Returns reason -> what is frozen for it, the reason that concerns the most parameters first."""
    reasons: dict[str, list[Frozen]] = {}
    for item in frozen:
        reasons.setdefault(item.reason, []).append(item)
    return dict(sorted(reasons.items(), key=lambda pair: -len(_distinct(i.parameter for i in pair[1]))))


def _distinct(names: Iterable[str]) -> list[str]:
    """Returns names that are not empty, each once, in order."""
    return list(dict.fromkeys(name for name in names if name))


def _facts(graph: DependencyGraph, sizes: dict[str, int]) -> dict[str, Any]:
    """Returns the graph as plain values for JSON."""
    return {
        "fingerprint": graph.fingerprint,
        "reachable": graph.reachable(),
        "seconds": dict(graph.seconds),
        "groups": [
            {
                "name": group.name,
                "channels": group.channels,
                "verdict": group.verdict,
                "role": group.role,
                "why": list(group.why),
                "layers": list(group.layers),
                "parameters": sizes[group.name],
                "slices": [
                    {"parameter": s.parameter, "dim": s.dim, "rows": s.index.shape[1], "produces": s.produces} for s in group.slices
                ],
            }
            for group in graph.groups
        ],
        "frozen": [
            {
                "parameter": item.parameter,
                "dim": item.dim,
                "positions": int(item.index.size),
                "reason": item.reason,
                "operator": item.operator,
                "module": item.module,
                "remedy": item.remedy,
            }
            for item in graph.frozen
        ],
        "unknown": [{"operator": u.operator, "module": u.module, "channels": u.channels} for u in graph.unknown],
    }


def _tables(graph: DependencyGraph, sizes: dict[str, int]) -> list[Any]:
    """Returns the graph as tables and lines for the terminal."""
    parts: list[Any] = [_groups(graph, sizes), _frozen(graph)]
    if graph.unknown:
        parts.append(_unknown(graph))
    channels = sum(group.channels for group in graph.groups)
    parts.append(
        f"{len(graph.groups)} groups, {channels:,} channels; {graph.reachable():.1%} of all parameters and statistics can be reached by "
        "removing channels. Say --explain LAYER for one layer."
    )
    return parts


def _groups(graph: DependencyGraph, sizes: dict[str, int]) -> Table:
    """Returns the table of groups."""
    table = new_table("Groups", "group", "channels>", "verdict", "role", "layers that produce them", "parameters>")
    for group in graph.groups:
        names = group.layers
        layers = ", ".join(names[:_LAYERS_SHOWN]) + (f" and {len(names) - _LAYERS_SHOWN} more" if len(names) > _LAYERS_SHOWN else "")
        table.add_row(group.name, f"{group.channels:,}", group.verdict, group.role, layers, f"{sizes[group.name]:,}")
    return table


def _frozen(graph: DependencyGraph) -> Table:
    """Returns the table of reasons for which something is frozen."""
    table = new_table("Frozen", "reason", "operators", "tensors>", "positions>", "for example", "remedy")
    for reason, items in _by_reason(graph.frozen).items():
        operators = _distinct(item.operator.rpartition("::")[2] for item in items)
        tensors = _distinct(item.parameter for item in items)
        table.add_row(
            reason,
            ", ".join(operators[:_OPERATORS_SHOWN]) + (" ..." if len(operators) > _OPERATORS_SHOWN else ""),
            f"{len(tensors):,}",
            f"{sum(item.index.size for item in items):,}",
            f"{tensors[0]} dim {items[0].dim}",
            next((item.remedy for item in items if item.remedy), ""),
        )
    return table


def _unknown(graph: DependencyGraph) -> Table:
    """Returns the table of operators without a rule."""
    table = new_table("Operators without a rule", "operator", "module", "channels frozen>")
    for item in graph.unknown:
        table.add_row(item.operator, item.module or "the model itself", f"{item.channels:,}")
    return table


def new_table(title: str, *headings: str) -> Table:
    """Returns an empty table; a heading that ends in ">" is that of a column of numbers."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading.removesuffix(">"), justify="right" if heading.endswith(">") else "left", overflow="fold")
    return table
