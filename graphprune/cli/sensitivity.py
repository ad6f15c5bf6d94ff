"""``graphprune sensitivity``: what each group of channels can lose by itself, and what the score then is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graphprune.cli import arguments, evaluating, files
from graphprune.cli.screen import Screen, to_json


def sensitivity(
    ctx: typer.Context,
    model: arguments.Model,
    *,
    data: evaluating.Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files, made when absent; a second run goes on there.")],
    metric: evaluating.MetricOption = None,
    loss: arguments.Loss = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option("--sparsity", help="Share of a group's channels to remove. Repeat it for several. Default: 0.1 to 0.9."),
    ] = None,
    early_stop: Annotated[
        float | None,
        typer.Option("--early-stop", min=0.0, metavar="DROP", help="Go no further with a group once the score dropped by more."),
    ] = None,
    drop: Annotated[float, typer.Option("--drop", min=0.0, help="Say what each group can lose with this drop of the score.")] = 0.05,
    criterion: arguments.Criterion = "l1",
    inputs: arguments.Inputs = None,
    weights: arguments.Weights = None,
    dtype: arguments.DtypeOption = None,
    seed: arguments.Seed = 0,
    config: evaluating.Config = None,
    limit: evaluating.Limit = None,
    processes: evaluating.Processes = 1,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the curves as well.")] = True,
) -> None:
    """Prune one group of channels at a time and score the model: writes sensitivity.csv, sensitivity.png and sensitivity.json.

    Every score is kept in the folder as well: after an interruption, the same command goes on where it was.
    """
    from graphprune.cli.loading import Request
    from graphprune.sensitivity.sensitivity import SPARSITIES
    from graphprune.sensitivity.sensitivity import sensitivity as analysis

    screen: Screen = ctx.obj
    scoring = evaluating.Scoring.asked(data, metric, loss, limit, seed)
    asked: dict[str, Any] = {
        **scoring.facts(),
        "criterion": criterion,
        "early_stop": early_stop,
        "sparsities": list(sparsity or SPARSITIES),
    }
    entries = files.read_config(config) if config is not None else None
    with files.collected(out) as folder:
        with screen.busy(f"building {model}"):
            loaded, scorer = Request(model, inputs or (), weights, dtype and dtype.value, seed).load(), evaluating.Scorer(model, scoring)
        with screen.bars() as bars:
            known_as = f"{data} {scoring.metric} {loss or ''} {limit or ''}"
            options: dict[str, Any] = {"criterion": criterion, "early_stop": early_stop, "config_list": entries, "seed": seed,
                                       "data": scorer.evaluator.batches, "loss": scorer.evaluator.loss, "name": known_as,
                                       "processes": processes}  # fmt: skip
            found = analysis(loaded.model, loaded.inputs, scorer, sparsities=asked["sparsities"], folder=out, progress=bars, **options)
        found.to_csv(folder / "sensitivity.csv")
        if plot:
            found.plot(folder / "sensitivity.png")
        names = sorted([*(file.name for file in folder.iterdir()), "sensitivity.json"])
        admissible = found.admissible(drop)
        facts = {**loaded.facts(), "asked": asked, **found.to_dict(), "drop": drop,
                 "admissible": admissible, "files": [out / name for name in names]}  # fmt: skip
        (folder / "sensitivity.json").write_text(to_json(facts), encoding="utf-8")
    able = ", ".join(f"{name} {share:.0%}" for name, share in admissible.items())
    known = f"{found.evaluations} evaluations; {len(found.measurements) + 1} scores, those of earlier runs and equal counts included"
    screen.result(facts, loaded.title(), found, f"With a drop of {drop:g} at most: {able}", known, f"Wrote {', '.join(names)} into {out}")
