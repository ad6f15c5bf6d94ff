"""``graphprune prune`` and ``graphprune verify``: a smaller model in a folder, and a second look at it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphprune.cli import arguments, files
from graphprune.cli.screen import Screen, to_json
from graphprune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from graphprune.cli.loading import Loaded
    from graphprune.pruners.budgets import Budget

_DEFAULT_SPARSITY = 0.5


class Rounding(str, Enum):
    """How a kept count becomes a whole number."""

    floor = "floor"
    ceil = "ceil"


class Cut(str, Enum):
    """What goes where a dimension is cut into equal blocks."""

    blocks = "blocks"
    within = "within"
    both = "both"
    query_key = "query_key"
    value = "value"


def prune(
    ctx: typer.Context,
    model: arguments.Model,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files, made when absent.")],
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="Share of every group's channels to remove, in [0, 1). Default: 0.5.")
    ] = None,
    macs: arguments.Macs = None,
    params: arguments.Params = None,
    criterion: arguments.Criterion = "l1",
    mode: arguments.ModeOption = arguments.Mode.dependency_aware,
    data: arguments.Data = None,
    loss: arguments.Loss = None,
    inputs: arguments.Inputs = None,
    weights: arguments.Weights = None,
    dtype: arguments.DtypeOption = None,
    seed: arguments.Seed = 0,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="LAYER", help="Keep all channels of this layer. Repeat it for several.")
    ] = None,
    round_to: Annotated[int, typer.Option("--round-to", min=1, metavar="N", help="Keep multiples of N channels.")] = 1,
    rounding: Annotated[Rounding, typer.Option("--rounding", help="Which way kept counts are rounded.")] = Rounding.floor,
    cut: Annotated[
        Cut,
        typer.Option(
            "--cut", help="What goes of attention heads and conv groups: whole blocks, positions within, both, or one kind of head width."
        ),
    ] = Cut.blocks,
    keep_class: Annotated[
        bool,
        typer.Option("--keep-class", help="Keep more channels where the model's own code could not state the widths asked for."),
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Config list, a JSON file, in place of --sparsity.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write the dense and the pruned model as ONNX as well.")] = True,
) -> None:
    """Remove channels from a model: writes pruned.safetensors, dense.onnx, pruned.onnx and report.json into one folder."""
    from graphprune.cli.data import batches, loss_named
    from graphprune.cli.loading import Request
    from graphprune.criteria import criterion_named
    from graphprune.speedup.prune import prune as pruned

    screen: Screen = ctx.obj
    share, budget = amount(sparsity, macs, params, config)
    measure = criterion_named(criterion)
    options: dict[str, Any] = {
        "mode": mode.value,
        "config_list": files.read_config(config) if config is not None else None,
        "exclude": list(exclude or ()),
        "rounding": rounding.value,
        "round_to": round_to,
        "cut": cut.value,
        "keep_class": keep_class,
    }
    with files.collected(out) as folder:
        with screen.busy(f"building {model}"):
            loaded = Request(model, inputs or (), weights, dtype and dtype.value, seed).load()
        with screen.busy("pruning and verifying"):
            shown: dict[str, Any] = {"data": batches(data, seed) if data else None, "loss": loss_named(loss) if loss else None}
            small, report = pruned(loaded.model, loaded.inputs, share, measure, budget=budget, **shown, **options)
        exported = write_models(screen, folder, loaded, small, onnx=onnx)
        asked = {"sparsity": None if config is not None or budget is not None else share, "criterion": criterion, "data": data,
                 "loss": loss, **options}  # fmt: skip
        names = sorted([*(file.name for file in folder.iterdir()), "report.json"])
        facts = {**loaded.facts(), "asked": asked, **report.to_dict(), "onnx": exported, "files": [out / name for name in names]}
        (folder / "report.json").write_text(to_json(facts), encoding="utf-8")
    screen.result(facts, loaded.title(), report, f"Wrote {', '.join(names)} into {out}")


def amount(sparsity: float | None, macs: float | None, params: float | None, config: Path | None) -> tuple[float, Budget | None]:
    """Returns the sparsity and the budget that options ask for.

    Raises:
        ConfigError: two of them say how much goes, or one is no such fraction.
    """
    from graphprune.pruners.budgets import Budget
    from graphprune.pruners.config import check_sparsity

    given = [name for name, value in (("--sparsity", sparsity), ("--macs", macs), ("--params", params)) if value is not None]
    if config is not None and sparsity is not None:
        given.append("--config")
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are given, and both say how much goes", "Keep one of them")
    budget = Budget(macs=macs, params=params) if macs is not None or params is not None else None
    return check_sparsity(_DEFAULT_SPARSITY if sparsity is None else sparsity, "--sparsity"), budget


def write_models(screen: Screen, folder: Path, loaded: Loaded, small: nn.Module, *, onnx: bool) -> dict[str, Any]:
    """Writes the tensors and, where asked for, the ONNX files; returns the facts of the latter by name."""
    from graphprune.recipes.files import save

    with screen.busy("saving"):
        save(small, folder / "pruned.safetensors")
    exported: dict[str, Any] = {}
    if onnx:
        from graphprune.export import export_onnx

        for name, network in {"dense": loaded.model, "pruned": small}.items():
            with screen.busy(f"exporting the {name} model"):
                facts = export_onnx(network, loaded.inputs, folder / f"{name}.onnx").to_dict()
            exported[name] = {**facts, "path": f"{name}.onnx"}
    return exported
