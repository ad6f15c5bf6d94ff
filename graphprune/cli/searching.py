"""``graphprune search``: how much of every group of channels goes, found by trying, under a budget or as a front of score against cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from graphprune.cli import arguments, evaluating, files, pruning
from graphprune.cli.screen import Screen, to_json
from graphprune.errors import ConfigError

if TYPE_CHECKING:
    from graphprune.cli.loading import Loaded
    from graphprune.masks.channels import Masks
    from graphprune.search.base import SearchResult
    from graphprune.search.evaluators import DataEvaluator
    from graphprune.search.objective import Objective, Trial

_TRIALS = 50
_POPULATION = 16  # of nsga-ii: optuna's own 50 are more than most searches here have trials


class Sampler(str, Enum):
    """What proposes."""

    annealing = "annealing"
    amc = "amc"
    netadapt = "netadapt"
    tpe = "tpe"
    cma_es = "cma-es"
    nsga_ii = "nsga-ii"
    random = "random"


_STUDIES = ("tpe", "cma-es", "nsga-ii", "random")
_FRONTS = ("tpe", "nsga-ii", "random")


@dataclass(frozen=True)
class Plan:
    """How is searched.

    Attributes:
        sampler: as the option of that name, and so on.
        trials: likewise.
        processes: likewise.
        storage: likewise.
        latency: likewise.
        pick: likewise.
        demanding: whether a budget or the config list says how much is to go.

    Raises:
        ConfigError: two of them exclude each other, or nothing says how much is to go.
    """

    sampler: str
    trials: int | None
    processes: int
    storage: str | None
    latency: bool
    pick: int | None
    demanding: bool

    def __post_init__(self) -> None:
        wrong = {
            "--processes": self.processes > 1 and self.sampler not in _STUDIES,
            "--storage": self.storage is not None and self.sampler not in _STUDIES,
            "--latency": self.latency and self.sampler not in _FRONTS,
            "--trials": self.trials is not None and self.sampler == "netadapt",
            "--pick": self.pick is not None and self.sampler == "netadapt",
        }
        reasons = {
            "--processes": f"each proposal of {self.sampler} waits for the score of the one before",
            "--storage": f"{self.sampler} keeps its trials in the folder of --out",
            "--latency": f"{self.sampler} has one objective only",
            "--trials": "netadapt ends when the budget is met",
            "--pick": "netadapt carries weights from one trial to the next, and keeps those of the best",
        }
        found = next((name for name, refused in wrong.items() if refused), None)
        if found is not None:
            able = {"--processes": _STUDIES, "--storage": _STUDIES, "--latency": _FRONTS}.get(found)
            fix = f"Leave it out{f', or use --sampler {able[0]}' if able else ''}"
            raise ConfigError(f"{found} is given, but {reasons[found]}", fix)
        if not self.demanding and not self.latency and self.sampler != "nsga-ii":
            fix = "Give --macs 0.5 or --params 0.5, a 'total_sparsity' in --config, or --sampler nsga-ii for a front"
            raise ConfigError("nothing says how much is to go, and nothing scores better than the whole model", fix)

    @property
    def fronts(self) -> bool:
        """Whether a second measure is to be small."""
        return self.latency or (self.sampler == "nsga-ii" and not self.demanding)

    def chosen(self, found: SearchResult) -> Trial:
        """Returns the trial whose model is to be written.

        Raises:
            ConfigError: there is none of that number.
        """
        trial = found.best if self.pick is None else next((t for t in found.history if t.number == self.pick), None)
        if trial is None:
            raise ConfigError(f"--pick is {self.pick}, and there are trials 0 to {found.history[-1].number}", "Give the number of one")
        return trial

    def facts(self) -> dict[str, Any]:
        """Returns what was asked for, for JSON."""
        names = ("sampler", "trials", "processes", "storage", "latency", "pick")
        return {name: getattr(self, name) for name in names}


def search(
    ctx: typer.Context,
    model: arguments.Model,
    *,
    data: evaluating.Data,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files, made when absent; a second run goes on there.")],
    sampler: Annotated[Sampler, typer.Option("--sampler", help="What proposes; nsga-ii without a budget: a front.")] = Sampler.annealing,
    macs: Annotated[float | None, typer.Option("--macs", help="Share of the MACs to remove.")] = None,
    params: Annotated[float | None, typer.Option("--params", help="Share of the parameters to remove.")] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, metavar="N", help=f"How many models to score in all. Default: {_TRIALS}.")
    ] = None,
    metric: evaluating.MetricOption = None,
    loss: arguments.Loss = None,
    limit: evaluating.Limit = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Re-estimate BatchNorm statistics on the data before a model is scored.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Make the time in ONNX Runtime small as well: a front of score against milliseconds.")
    ] = False,
    criterion: arguments.Criterion = "l1",
    processes: evaluating.Processes = 1,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="Database that processes and machines share. Default: a SQLite file in DIR."),
    ] = None,
    pick: Annotated[
        int | None, typer.Option("--pick", min=0, metavar="TRIAL", help="Write the model of this trial, not that of the best score.")
    ] = None,
    inputs: arguments.Inputs = None,
    weights: arguments.Weights = None,
    dtype: arguments.DtypeOption = None,
    seed: arguments.Seed = 0,
    config: evaluating.Config = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the scores as well.")] = True,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write the dense and the pruned model as ONNX as well.")] = True,
) -> None:
    """Find how much of every group of channels goes: writes search.json, search.csv, search.png, masks.safetensors and the pruned model.

    Every trial is kept in the folder as well: after an interruption, the same command goes on where it was, and ends as if it had not been
    interrupted.
    """
    from graphprune.cli.loading import Request
    from graphprune.sensitivity.bench import same_random
    from graphprune.speedup.speedup import speedup

    screen, scoring = cast("Screen", ctx.obj), evaluating.Scoring.asked(data, metric, loss, limit, seed)
    entries = files.read_config(config) if config is not None else None
    request = Request(model, inputs or (), weights, dtype and dtype.value, seed)
    space = evaluating.Space(request, scoring, criterion, pruning.amount(None, macs, params, None)[1], entries, recalibrate)
    plan = Plan(sampler.value, trials, processes, storage, latency, pick, space.demanding)
    settings = {**scoring.facts(), "recalibrate": recalibrate}
    asked: dict[str, Any] = {**settings, **plan.facts(), "criterion": criterion, "macs": macs, "params": params, "config_list": entries}
    with files.collected(out) as folder:
        with screen.busy(f"building {model}"):
            loaded, evaluator = request.load(), scoring.evaluator()
        job = (_by_study if plan.sampler in _STUDIES else _by_pruner)(plan, space, loaded, evaluator, out, settings, not screen.quiet)
        with screen.busy("scoring the model as it is"):
            dense = _dense(job.objective, evaluator, out, settings, seed)
        with same_random(seed):
            found = job.run()
        trial = plan.chosen(found)
        masks = job.objective.masks(trial.sparsities) if job.masks is None else job.masks()
        small, report = speedup(loaded.model, masks)
        space.prepare(small, evaluator)
        exported = pruning.write_models(screen, folder, loaded, small, onnx=onnx)
        masks.save(folder / "masks.safetensors")
        found.to_csv(folder / "search.csv")
        if plot:
            found.plot(folder / "search.png")
        names = sorted([*(file.name for file in folder.iterdir()), "search.json"])
        facts = {**loaded.facts(), "asked": asked, "dense": dense, **_facts(found), "written": trial.number, "speedup": report.to_dict(),
                 "onnx": exported, "files": [out / name for name in names]}  # fmt: skip
        (folder / "search.json").write_text(to_json(facts), encoding="utf-8")
    said = f"Trial {trial.number} is written: its score is {trial.score:.4g}, that of the whole model {dense:.4g}"
    screen.result(facts, loaded.title(), found, *_fronts(found), report, said, f"Wrote {', '.join(names)} into {out}")


@dataclass(frozen=True, eq=False)
class _Job:
    """A search that is ready to run.

    Attributes:
        objective: what is searched.
        run: searches.
        masks: returns the masks of the best trial, where its sparsities do not say which they are.
    """

    objective: Objective
    run: Callable[[], SearchResult]
    masks: Callable[[], Masks] | None = None


def _by_study(
    plan: Plan, space: evaluating.Space, loaded: Loaded, evaluator: DataEvaluator, out: Path, settings: Mapping[str, Any], shown: bool
) -> _Job:
    """Returns a search by one of optuna's samplers."""
    from graphprune.search.parallel import run_study
    from graphprune.search.timing import OnnxLatency

    objective = space.objective(loaded, evaluator)
    given = space if plan.processes > 1 else objective
    how: dict[str, Any] = {
        "storage": plan.storage or out / "study.db",
        "seed": space.scoring.seed,
        "minimize": OnnxLatency(loaded.inputs) if plan.latency else "macs" if plan.fronts else None,
        "options": {"population_size": _POPULATION} if plan.sampler == "nsga-ii" else None,
        "settings": settings,
        "processes": plan.processes,
        "progress": shown,
    }
    return _Job(objective, lambda: run_study(given, plan.trials or _TRIALS, cast("Any", plan.sampler), **how))


def _by_pruner(
    plan: Plan, space: evaluating.Space, loaded: Loaded, evaluator: DataEvaluator, out: Path, _settings: Mapping[str, Any], shown: bool
) -> _Job:
    """Returns a search by one of the pruners that search."""
    from graphprune.search import amc, annealing, netadapt

    entries = space.entries if space.entries is not None else [{"op_types": ["default"]}]
    how: dict[str, Any] = {"example_inputs": loaded.inputs, "base_algo": space.criterion, "seed": space.scoring.seed, "folder": out,
                           "progress": shown, **space.options(evaluator)}  # fmt: skip
    trials = plan.trials or _TRIALS
    if plan.sampler == "netadapt":
        tuner = how.pop("finetune")
        pruner = netadapt.NetAdaptPruner(loaded.model, entries, tuner, evaluator, **how)
        return _Job(pruner.objective, pruner.search, lambda: pruner.compress()[1])
    if plan.sampler == "amc":
        learner = amc.AMCPruner(trials, loaded.model, entries, evaluator, **how)
        return _Job(learner.objective, learner.search)
    cooler = annealing.SimulatedAnnealingPruner(loaded.model, entries, evaluator, trials=trials, **how)
    return _Job(cooler.objective, cooler.search)


def _dense(objective: Objective, evaluator: DataEvaluator, out: Path, settings: Mapping[str, Any], seed: int) -> float:
    """Returns the score of the whole model, from the folder where it is known.

    Raises:
        FileError: the folder holds a search of another model, with another budget, or on other data.
    """
    from graphprune.runs.checkpoint import Run
    from graphprune.sensitivity.bench import finite, same_random

    kept = Run(out, "whole-model", {**objective.settings(), **settings})
    with same_random(seed):
        saved = kept.load()
    if saved is not None:
        return float(saved.state["score"])
    with same_random(seed):
        score = finite(evaluator(objective.model))
    kept.save({"score": score})
    return score


def _facts(found: SearchResult) -> dict[str, Any]:
    """Returns what was found, for JSON."""
    front = [{"trial": point.trial.number, "score": point.trial.score, "measured": point.measured} for point in getattr(found, "front", ())]
    trials = [trial.to_dict() for trial in found.history]
    return {"best": found.best.to_dict(), "last": found.last.to_dict(), "front": front, "trials": trials}


def _fronts(found: SearchResult) -> list[Table]:
    """Returns the front as a table, where there is one."""
    points = getattr(found, "front", ())
    out = Table(title="Front")
    for heading in ("trial", "score", "measured", "parameters", "MACs"):
        out.add_column(heading, justify="right")
    for point in points:
        cost = point.trial.cost
        out.add_row(str(point.trial.number), f"{point.trial.score:.4f}", f"{point.measured:,.4g}", f"{cost.params:,}", f"{cost.macs:,}")
    return [out] if points else []
