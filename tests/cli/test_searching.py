"""``graphprune search``: the same as the Python calls, interruptions that change nothing, fronts, files, and refusals in one line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli.app import app
from graphprune.cli.sources import find
from graphprune.search.evaluators import DataEvaluator
from tests.support.cli_models import DATA

pytest.importorskip("optuna")
pytest.importorskip("cmaes")

MODELS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Three convolutions with batch normalisation, and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 1)
        self.c, self.fc = nn.Conv2d(16, 10, 1), nn.Linear(10, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.n(self.a(x)))))
        return self.fc(torch.relu(self.c(x)).mean((2, 3)))
'''
IMAGE = ("--input", "2,3,8,8")
BUDGET = gp.Budget(macs=0.5)
EVERYWHERE = [{"op_types": ["default"]}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file with a small model, its data and its losses."""
    path = tmp_path_factory.mktemp("models") / "searched_models.py"
    path.write_text(MODELS + DATA)
    return path


def run(models: Path, *arguments: object, data: str = "batches") -> Any:
    """Runs the command; stdout and stderr are apart."""
    options = ("--data", f"{models}:{data}", *IMAGE, "--no-onnx", *arguments)
    return CliRunner().invoke(app, ["search", f"{models}:Net", *map(str, options)])


def facts_of(models: Path, out: Path, *arguments: object) -> dict[str, Any]:
    """Runs the command with cross-entropy as its score, and returns the JSON that it prints."""
    loss = () if "--loss" in arguments else ("--loss", "cross_entropy")
    result = run(models, "--out", out, "--json", *loss, *arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    facts: dict[str, Any] = json.loads(result.stdout)
    assert json.loads((out / "search.json").read_text()) == facts
    return facts


def plain(trials: Any) -> list[tuple[int, dict[str, float], float]]:
    """Returns number, sparsities and score of trials, be they records or facts."""
    return [(t["number"], t["sparsities"], t["score"]) for t in (t if isinstance(t, dict) else t.to_dict() for t in trials)]


def evaluator(models: Path) -> DataEvaluator:
    """Returns what scores models by minus their cross-entropy."""
    return DataEvaluator(find(f"{models}:batches").make(), "loss", nn.functional.cross_entropy)


def shrunk(models: Path, out: Path, seed: int = 0) -> nn.Module:
    """Returns the model that the command has written."""
    return gp.load(find(f"{models}:Net", seed).build(), out / "pruned.safetensors", torch.randn(2, 3, 8, 8)).eval()


def python_pruner(sampler: str, models: Path) -> Any:
    """Returns the pruner that the command should have run, for eight trials where it takes a number of them."""
    model = find(f"{models}:Net", 3).build()
    how: dict[str, Any] = {"budget": BUDGET, "example_inputs": torch.randn(2, 3, 8, 8), "seed": 3}
    if sampler == "annealing":
        return gp.SimulatedAnnealingPruner(model, EVERYWHERE, evaluator(models), trials=8, **how)
    if sampler == "amc":
        return gp.AMCPruner(8, model, EVERYWHERE, evaluator(models), **how)
    return gp.NetAdaptPruner(model, EVERYWHERE, None, evaluator(models), **how)


@pytest.mark.parametrize("sampler", ["annealing", "amc", "netadapt"])
def test_it_finds_what_the_pruner_finds(models: Path, tmp_path: Path, sampler: str) -> None:
    """The same trials as the Python call with the same seed; the written model is that of the best, and scores what its trial says."""
    trials = () if sampler == "netadapt" else ("--trials", 8)
    facts = facts_of(models, tmp_path, "--macs", 0.5, "--sampler", sampler, "--seed", 3, "--no-plot", *trials)
    pruner = python_pruner(sampler, models)
    found = pruner.search()
    assert plain(facts["trials"]) == plain(found.history)
    assert plain([facts["best"], facts["last"]]) == plain([found.best, found.last])
    assert facts["written"] == found.best.number
    assert facts["dense"] == evaluator(models)(pruner.model)
    masks = pruner.compress()[1]
    assert dict(gp.Masks.load(tmp_path / "masks.safetensors", masks.graph)).keys() == dict(masks).keys()
    assert all((gp.Masks.load(tmp_path / "masks.safetensors", masks.graph)[name] == masks[name]).all() for name in masks)
    assert evaluator(models)(shrunk(models, tmp_path, 3)) == pytest.approx(found.best.score, rel=1e-6)
    assert facts["speedup"]["verified"]


@pytest.mark.parametrize("sampler", ["tpe", "cma-es", "random"])
def test_it_finds_what_the_study_finds(models: Path, tmp_path: Path, sampler: Any) -> None:
    """The same trials as a study of the same seed, in the file, in the table and in the picture."""
    facts = facts_of(models, tmp_path, "--params", 0.4, "--sampler", sampler, "--seed", 3, "--trials", 6)
    model = find(f"{models}:Net", 3).build()
    objective = gp.Objective(model, torch.randn(2, 3, 8, 8), evaluator(models), budget=gp.Budget(params=0.4))
    found = gp.Study(objective, sampler, seed=3).run(6)
    assert plain(facts["trials"]) == plain(found.history)
    assert facts["front"] == []
    assert facts["files"] == [str(tmp_path / name) for name in ("masks.safetensors", "pruned.safetensors", *FILES)]
    with (tmp_path / "search.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["trial"]), float(r["score"]), int(r["macs"])) for r in rows] == [(t.number, t.score, t.cost.macs) for t in found.history]
    assert [{name: float(r[name]) for name in objective.groups} for r in rows] == [t.sparsities for t in found.history]
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


FILES = ("search.csv", "search.json", "search.png")


@pytest.mark.parametrize("sampler", ["annealing", "tpe"])
def test_interrupted_and_resumed_is_as_uninterrupted(models: Path, tmp_path: Path, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within the fourth and again within the sixth trial, the same command ends with the same trials and the same model."""
    arguments = ("--macs", 0.5, "--sampler", sampler, "--trials", 8, "--no-plot")
    whole = facts_of(models, tmp_path / "whole", *arguments)
    for evaluation in (1 + 3, 2):  # the first run also scores the whole model
        count_calls(monkeypatch, evaluation)
        stopped = run(models, "--out", tmp_path / "cut", "--loss", "cross_entropy", *arguments)
        assert stopped.exit_code not in (0, 2), stopped.stderr
        assert not (tmp_path / "cut" / "search.json").exists()
        monkeypatch.undo()
    calls = count_calls(monkeypatch)
    again = facts_of(models, tmp_path / "cut", *arguments)
    assert len(calls) == 8 - 5
    assert plain(again["trials"]) == plain(whole["trials"])
    assert again["dense"] == whole["dense"]
    one, other = (load_file(tmp_path / name / "pruned.safetensors") for name in ("cut", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def count_calls(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Returns a list that grows by one with every evaluation; the one of that number is interrupted from the keyboard."""
    calls: list[int] = []
    original = DataEvaluator.__call__

    def counted(self: DataEvaluator, model: nn.Module) -> float:
        calls.append(len(calls))
        if calls[-1] == stop_at:
            raise KeyboardInterrupt
        return original(self, model)

    monkeypatch.setattr(DataEvaluator, "__call__", counted)
    return calls


def test_a_second_run_adds_what_is_missing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is finished evaluates nothing, three trials more are three evaluations more, and other data are refused."""
    calls = count_calls(monkeypatch)
    arguments = ("--macs", 0.5, "--sampler", "random", "--no-plot")
    first = facts_of(models, tmp_path, *arguments, "--trials", 4)
    assert len(calls) == 1 + 4
    assert facts_of(models, tmp_path, *arguments, "--trials", 4)["trials"] == first["trials"]
    assert len(calls) == 1 + 4
    assert facts_of(models, tmp_path, *arguments, "--trials", 7)["trials"][:4] == first["trials"]
    assert len(calls) == 1 + 7
    for change in (("--limit", 1), ("--recalibrate",), ("--macs", 0.4)):
        refused = run(models, "--loss", "cross_entropy", "--out", tmp_path, *arguments, "--trials", 7, *change)
        assert refused.exit_code == 2
        assert "of a run with other settings" in refused.stderr
    shared = ("--storage", tmp_path / "study.db")
    refused = run(models, "--loss", "cross_entropy", "--out", tmp_path / "b", *arguments, *shared, "--trials", 7, "--limit", 1)
    assert refused.exit_code == 2
    assert "limit differs" in refused.stderr
    assert len(facts_of(models, tmp_path / "c", *arguments, *shared, "--trials", 7)["trials"]) == 7


# -- fronts --------------------------------------------------------------------------------------------------------------------------


def ahead(trials: list[tuple[int, float, float]]) -> list[int]:
    """Returns the numbers of those (number, score, measure) that none beats in both, by comparing all with all."""
    kept = [
        (measure, number)
        for number, score, measure in trials
        if not any(s >= score and m <= measure and (s > score or m < measure or n < number) for n, s, m in trials)
    ]
    return [number for _, number in sorted(kept)]


def test_nsga_without_a_budget_gives_a_front_of_score_against_macs(models: Path, tmp_path: Path) -> None:
    """The front is that of comparing all trials with all, and the model of any of its trials can be written afterwards."""
    arguments = ("--sampler", "nsga-ii", "--trials", 12)
    facts = facts_of(models, tmp_path, *arguments)
    front = [point["trial"] for point in facts["front"]]
    assert front == ahead([(t["number"], t["score"], t["cost"]["macs"]) for t in facts["trials"]])
    assert len(front) >= 2
    assert [point["measured"] for point in facts["front"]] == [facts["trials"][number]["cost"]["macs"] for number in front]
    small = facts_of(models, tmp_path, *arguments, "--pick", front[0])
    assert small["trials"] == facts["trials"]
    assert small["written"] == front[0]
    assert small["speedup"]["after"]["macs"] == facts["trials"][front[0]]["cost"]["macs"]
    shown = run(models, "--out", tmp_path, "--loss", "cross_entropy", "--no-plot", *arguments)
    assert re.search(rf"Front.*│ +{front[0]} │ +-\d", shown.stdout, re.DOTALL)


def test_latency_is_measured_in_onnx_runtime(models: Path, tmp_path: Path) -> None:
    """The front is of score against the milliseconds that the CSV lists beside every trial."""
    facts = facts_of(models, tmp_path, "--sampler", "random", "--latency", "--trials", 3)
    with (tmp_path / "search.csv").open(newline="", encoding="utf-8") as file:
        rows = [(int(row["trial"]), float(row["score"]), float(row["measured"])) for row in csv.DictReader(file)]
    assert len({measured for _, _, measured in rows}) > 1
    assert all(0 < measured < 1000 for _, _, measured in rows)
    assert [point["trial"] for point in facts["front"]] == ahead(rows)


# -- options -------------------------------------------------------------------------------------------------------------------------


def test_statistics_are_estimated_again_before_every_score(models: Path, tmp_path: Path) -> None:
    """Scores are those of recalibrated models, and the model that is written is one."""
    facts = facts_of(models, tmp_path, "--macs", 0.5, "--trials", 4, "--recalibrate")
    objective = gp.Objective(find(f"{models}:Net").build(), torch.randn(2, 3, 8, 8), evaluator(models), budget=BUDGET)
    images = [image for image, _ in find(f"{models}:batches").make()]
    for trial in facts["trials"]:
        expected = evaluator(models)(gp.recalibrate(objective.small(trial["sparsities"]), images))
        assert trial["score"] == pytest.approx(expected, rel=1e-6)
        assert trial["score"] != pytest.approx(objective(trial["sparsities"]).score, rel=1e-6)
    assert evaluator(models)(shrunk(models, tmp_path)) == pytest.approx(facts["best"]["score"], rel=1e-6)


def test_a_config_list_says_where_and_how_much(models: Path, tmp_path: Path) -> None:
    """Without a budget, the sparsity of an entry is that of all its channels; layers that are not mentioned stay whole."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps([{"op_names": ["a", "b"], "total_sparsity": 0.5}]))
    facts = facts_of(models, tmp_path / "out", "--config", config, "--sampler", "random", "--trials", 4)
    assert all(sum(round(s * {"a": 12, "b": 16}[n]) for n, s in t["sparsities"].items()) == 14 for t in facts["trials"])
    assert len({t["score"] for t in facts["trials"]}) > 1


def test_two_processes_share_the_work(models: Path, tmp_path: Path) -> None:
    """Another process can make the model and the data by their names; the study has exactly as many trials as were asked for."""
    shared = ("--storage", tmp_path / "shared.db", "--processes", 2)
    facts = facts_of(models, tmp_path / "out", "--macs", 0.5, "--sampler", "tpe", "--trials", 5, "--no-plot", *shared)
    assert [t["number"] for t in facts["trials"]] == list(range(5))
    assert not (tmp_path / "out" / "study.db").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--macs", 0.5, "--params", 0.5), "--macs and --params are given"),
        ((), "nothing says how much is to go"),
        (("--macs", 1.5), "macs=1.5"),
        (("--macs", 0.999), "at most"),
        (("--macs", 0.5, "--metric", "loss"), "--metric loss is given without a loss"),
        (("--macs", 0.5, "--processes", 2), "--processes is given, but each proposal of annealing waits"),
        (("--macs", 0.5, "--sampler", "amc", "--storage", "x.db"), "--storage is given, but amc keeps"),
        (("--sampler", "cma-es", "--latency"), "--latency is given, but cma-es has one objective"),
        (("--macs", 0.5, "--sampler", "netadapt", "--trials", 3), "--trials is given, but netadapt ends"),
        (("--macs", 0.5, "--sampler", "netadapt", "--pick", 3), "--pick is given, but netadapt carries"),
        (("--macs", 0.5, "--sampler", "tpo"), "tpo"),
        (("--macs", 0.5, "--criterion", "l3"), "l3"),
        (("--macs", 0.5, "--config", "missing.json"), "cannot read the config list"),
        (("--macs", 0.5, "--data", "nothing.py:batches"), "nothing.py"),
    ],
)
def test_wrong_inputs_are_one_line(models: Path, tmp_path: Path, arguments: tuple[object, ...], words: str) -> None:
    """Each wrong input is one line on stderr with exit code 2, and nothing is left behind."""
    result = run(models, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_data_that_come_once_and_losses_that_fail_leave_nothing_behind(models: Path, tmp_path: Path) -> None:
    """Data that cannot be gone through twice and a loss that raises are told in one line, before any trial."""
    for arguments, data, words in ((("--loss", f"{models}:broken"), "batches", "ValueError: out of order"), ((), "once", "only once")):
        result = run(models, "--out", tmp_path / "out", "--macs", 0.5, *arguments, data=data)
        assert result.exit_code == 2
        assert words in result.stderr
        assert not (tmp_path / "out").exists()


def test_a_trial_that_there_is_not_cannot_be_picked(models: Path, tmp_path: Path) -> None:
    """The message says which there are; the trials are kept."""
    arguments = ("--macs", 0.5, "--trials", 3, "--out", tmp_path)
    result = run(models, *arguments, "--pick", 3)
    assert result.exit_code == 2
    assert "--pick is 3, and there are trials 0 to 2" in result.stderr
    assert run(models, *arguments, "--pick", 2).exit_code == 0
