"""``graphprune sensitivity``: files, JSON, what a second run does, and wrong inputs as one line with exit code 2."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli.app import app
from graphprune.cli.sources import find
from tests.support.cli_models import DATA

MODELS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))
'''
IMAGE = ("--input", "2,3,8,8")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file with a tiny model and its data."""
    path = tmp_path_factory.mktemp("models") / "sensitive_models.py"
    path.write_text(MODELS + DATA)
    return path


def run(models: Path, *arguments: object, data: str = "batches") -> Any:
    """Runs the command; stdout and stderr are apart."""
    options = ("--data", f"{models}:{data}", *IMAGE, *arguments)
    return CliRunner().invoke(app, ["sensitivity", f"{models}:Net", *map(str, options)])


def test_it_writes_a_table_a_plot_and_a_report(models: Path, tmp_path: Path) -> None:
    """The JSON has the scores that the call finds, the CSV the same, and the plot is a picture; the screen shows a row per group."""
    out = tmp_path / "a" / "b"
    arguments = ("--loss", "cross_entropy", "--sparsity", 0.5, "--sparsity", 0.75, "--out", out)
    result = run(models, *arguments, "--json")
    assert result.exit_code == 0, result.stderr or result.exception
    facts = json.loads(result.stdout)
    batches = find(f"{models}:batches").make()

    def minus_loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            return -sum(float(torch.nn.functional.cross_entropy(model(x), y)) for x, y in batches) / 3

    expected = gp.sensitivity(find(f"{models}:Net").build(), torch.randn(2, 3, 8, 8), minus_loss, sparsities=(0.5, 0.75))
    assert facts["dense"] == pytest.approx(expected.dense, rel=1e-6)
    assert [m["score"] for m in facts["measurements"]] == pytest.approx([m.score for m in expected.measurements], rel=1e-6)
    assert [(m["group"], m["kept"]) for m in facts["measurements"]] == [("a", 4), ("a", 2), ("b", 3), ("b", 1)]
    assert facts["asked"]["metric"] == "loss"
    assert facts["admissible"] == expected.admissible(0.05)
    assert facts["files"] == [str(out / f"sensitivity.{kind}") for kind in ("csv", "json", "png")]
    with (out / "sensitivity.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == [m["score"] for m in facts["measurements"]]
    assert (out / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "sensitivity.json").read_text()) == facts
    shown = run(models, *arguments)
    assert re.search(r"│ a +│ +8 │ +-?\d", shown.stdout)
    assert "0 evaluations" in shown.stdout


def test_a_second_run_evaluates_only_what_is_new(models: Path, tmp_path: Path) -> None:
    """The scores stay in the folder: the same command calls nothing, another sparsity once per group, other data anew."""
    arguments = ("--out", tmp_path, "--json", "--no-plot")
    counts = []
    for more in (("--sparsity", 0.5), ("--sparsity", 0.5), ("--sparsity", 0.5, "--sparsity", 0.25), ("--sparsity", 0.5, "--limit", 1)):
        result = run(models, *arguments, *more)
        assert result.exit_code == 0, result.stderr or result.exception
        counts.append(json.loads(result.stdout)["evaluations"])
    assert counts == [3, 0, 2, 3]
    assert not (tmp_path / "sensitivity.png").exists()


def test_two_processes_give_the_same_scores(models: Path, tmp_path: Path) -> None:
    """Other processes make model and data anew by their names, also where these are in one file; the scores are those of one process."""
    arguments = ("--loss", "cross_entropy", "--sparsity", 0.5, "--json", "--no-plot")
    results = [run(models, *arguments, "--out", tmp_path / str(count), "--processes", count) for count in (1, 2)]
    assert [result.exit_code for result in results] == [0, 0], results[1].stderr or results[1].exception
    one, two = ([(m["group"], m["kept"], m["score"]) for m in json.loads(result.stdout)["measurements"]] for result in results)
    assert one == two
    assert len(one) == 2


def test_accuracy_is_the_score_unless_a_loss_is_given(models: Path, tmp_path: Path) -> None:
    """Without a loss the score is the accuracy, a multiple of a twelfth here; an early stop and a config list are heeded."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps([{"op_names": ["a"], "max_sparsity_per_layer": 0.5}]))
    result = run(models, "--out", tmp_path / "out", "--json", "--config", config, "--early-stop", 1.0)
    assert result.exit_code == 0, result.stderr or result.exception
    facts = json.loads(result.stdout)
    assert facts["asked"]["metric"] == "accuracy"
    assert facts["dense"] * 12 == pytest.approx(round(facts["dense"] * 12))
    assert [m["sparsity"] for m in facts["measurements"]] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert {m["group"] for m in facts["measurements"]} == {"a"}


@pytest.mark.parametrize(
    ("arguments", "data", "words"),
    [
        (("--metric", "loss"), "batches", "--metric loss is given without a loss"),
        (("--metric", "top1"), "batches", "top1"),
        (("--sparsity", 1.5), "batches", "sparsities[0] is 1.5"),
        (("--loss", "no_such_loss"), "batches", "'no_such_loss' is no loss function"),
        ((), "once", "gives every batch only once"),
        ((), "nothing", "has no 'nothing'"),
        (("--criterion", "l3"), "batches", "l3"),
        (("--config", "missing.json"), "batches", "cannot read the config list"),
    ],
)
def test_wrong_inputs_are_one_line(models: Path, tmp_path: Path, arguments: tuple[object, ...], data: str, words: str) -> None:
    """Each wrong input is one line on stderr with exit code 2, and nothing is left behind."""
    result = run(models, "--out", tmp_path / "out", *arguments, data=data)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_loss_that_fails_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    """A loss that raises is told in one line, and the folder is not there afterwards."""
    result = run(models, "--out", tmp_path / "out", "--loss", f"{models}:broken")
    assert result.exit_code == 2
    assert "the loss cannot be computed: ValueError: out of order" in result.stderr
    assert not (tmp_path / "out").exists()
