"""Sensitivity analysis, on an evaluator whose scores have a closed form: minus the squared L1 mass that is gone from every layer."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.search.evaluators import DataEvaluator
from graphprune.sensitivity.curves import last_admissible
from tests.support.sensitivity_cases import INPUTS, WIDTHS, Chain, Mass, masses
from tests.support.untouched import changes, snapshot

ROOT = Path(__file__).parents[2]
GRID = (0.2, 0.5, 0.8)


def expected(group: str, kept: int) -> float:
    """Returns the score of the network whose group keeps so many channels, from the weights alone, in plain loops."""
    model = Chain()
    rows, columns = model.get_parameter(f"{group}.weight").detach().double(), model.get_parameter(f"{chr(ord(group) + 1)}.weight")
    weigh = [sum(abs(float(w)) for w in row) for row in rows]
    gone = sorted(range(len(weigh)), key=lambda channel: weigh[channel])[: len(weigh) - kept]
    lost = sum(weigh[channel] for channel in gone)
    read = sum(abs(float(w)) for channel in gone for w in columns.detach().double()[:, channel])
    return -(lost**2) - read**2


def interrupted(kind: str, folder: Path, limit: int) -> None:
    """Runs an analysis or a pruner in a process that is killed after so many evaluations or trainings."""
    code = f"from tests.support.sensitivity_cases import interrupted; interrupted({kind!r}, {str(folder)!r}, {limit})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)  # noqa: S603 - our own code
    assert done.returncode == -9, done.stderr


# -- what is measured ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("physical", [True, False])
def test_scores_are_those_of_the_closed_form(physical: bool) -> None:
    """Every group is pruned by itself, at every sparsity, and put back; a group of n channels keeps int(n (1 - s)), and at least one."""
    found = gp.sensitivity(Chain(), INPUTS, Mass(), physical=physical)
    assert found.dense == 0.0
    assert found.groups == ("a", "b", "c")
    for name, width in WIDTHS.items():
        taken = found.of(name)
        assert [m.sparsity for m in taken] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        assert [m.kept for m in taken] == [max(1, int(round(width * (1 - m.sparsity), 9))) for m in taken]
        for m in taken:
            assert m.score == pytest.approx(expected(name, m.kept), rel=1e-6)
            assert m.drop == found.dense - m.score


def test_costs_are_those_of_the_shrunk_model() -> None:
    """The parameters and MACs of a measurement are what the model has that was evaluated."""
    seen: list[gp.Cost] = []

    def evaluator(model: nn.Module) -> float:
        seen.append(gp.count(model, INPUTS))
        return 0.0

    found = gp.sensitivity(Chain(), INPUTS, evaluator, sparsities=GRID)
    assert [found.cost, *(gp.Cost(m.params, m.macs) for m in found.measurements)] == seen


def test_the_model_and_the_random_numbers_stay_as_they_are() -> None:
    """Whatever the evaluator does to what it is given and to random numbers, the user's are bit-identical afterwards."""
    model = Chain()
    before, numbers = snapshot(model), (random.getstate(), str(np.random.get_state()))  # noqa: NPY002 (what users draw from)

    def evaluator(model: nn.Module) -> float:
        assert not model.training
        for parameter in model.parameters():
            parameter.data.mul_(float(torch.rand(1)) + np.random.rand() + random.random())  # noqa: NPY002, S311 (what users may do)
        return float(torch.rand(1)) + np.random.rand() + random.random()  # noqa: NPY002, S311

    both = gp.sensitivity(model, INPUTS, evaluator, sparsities=GRID)
    assert changes(before, snapshot(model)) == []
    assert numbers == (random.getstate(), str(np.random.get_state()))  # noqa: NPY002 (what users draw from)
    torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002, S311 (the generators go on)
    one = gp.sensitivity(model, INPUTS, evaluator, sparsities=GRID[2:])
    assert set(one.measurements) <= set(both.measurements)


def test_config_lists_say_where_and_how_much_at_most() -> None:
    """Excluded layers are not looked at, and no sparsity is measured above a layer's maximum; amounts do not matter."""
    entries = [{"sparsity": 0.1, "max_sparsity_per_layer": {"a": 0.5}}, {"exclude": True, "op_names": ["c"]}]
    found = gp.sensitivity(Chain(), INPUTS, Mass(), config_list=entries)
    assert found.whole == {"c": "c is excluded"}
    assert {name: found.of(name)[-1].sparsity for name in found.groups} == {"a": 0.5, "b": 0.9}
    assert found.stopped == {"a": "max_sparsity_per_layer is 0.5"}


def test_early_stop_ends_a_group_with_the_first_drop_that_is_too_large() -> None:
    """The last measurement of a group that was stopped is the first whose drop is too large, and nothing is evaluated beyond it."""
    whole, evaluator = gp.sensitivity(Chain(), INPUTS, Mass()), Mass()
    limit = 30.0
    found = gp.sensitivity(Chain(), INPUTS, evaluator, early_stop=limit)
    assert set(found.stopped) == {"a", "b", "c"}
    for name in found.groups:
        curve = whole.of(name)
        first = next(number for number, m in enumerate(curve) if m.drop > limit)
        assert found.of(name) == curve[: first + 1]
    assert found.evaluations == evaluator.calls < whole.evaluations
    assert found.admissible(limit) == whole.admissible(limit)


def test_the_last_admissible_sparsity_is_not_the_first_that_violates() -> None:
    """Of each curve the last sparsity before the first violation counts; a later recovery does not, and 0 where all violate."""
    curves = {
        "falls": {0.3: 0.7, 0.1: 0.9, 0.2: 0.85},
        "recovers": {0.1: 0.9, 0.2: 0.5, 0.3: 0.9},
        "breaks": {0.1: 0.2},
        "stays": {0.1: 0.9, 0.2: 0.95},
    }
    assert last_admissible(0.9, 0.05, curves) == {"falls": 0.2, "recovers": 0.1, "breaks": 0.0, "stays": 0.2}


# -- what is kept ----------------------------------------------------------------------------------------------------------------


def test_what_is_known_is_not_evaluated_again(tmp_path: Path) -> None:
    """A second run does not call the evaluator, further sparsities cost as many calls as there are new counts, other weights all."""
    first, second, third, fourth, fifth = (Mass() for _ in range(5))
    found = gp.sensitivity(Chain(), INPUTS, first, sparsities=GRID, folder=tmp_path)
    assert first.calls == found.evaluations == 1 + 3 * len(GRID)
    again = gp.sensitivity(Chain(), INPUTS, second, sparsities=GRID, folder=tmp_path)
    assert again == found
    assert second.calls == again.evaluations == 0
    gp.sensitivity(Chain(), INPUTS, third, sparsities=(*GRID, 0.3), folder=tmp_path)
    assert third.calls == 2  # c keeps 4 of its 6 at 0.2 and at 0.3
    gp.sensitivity(Chain(), INPUTS, fourth, sparsities=GRID, folder=tmp_path, name="other data")
    assert fourth.calls == first.calls
    model = Chain()
    model.a.weight.data[0, 0] += 1e-3
    gp.sensitivity(model, INPUTS, fifth, sparsities=GRID, folder=tmp_path)
    assert fifth.calls == first.calls


def test_equal_counts_are_evaluated_once() -> None:
    """Sparsities that leave a group with as many channels share one evaluation, and none is spent where no channel goes."""
    evaluator = Mass()
    found = gp.sensitivity(Chain(), INPUTS, evaluator, rounding="ceil")  # of 6 channels 0.1 takes none
    assert found.of("c")[0].kept == 6
    assert found.of("c")[0].drop == 0.0
    assert evaluator.calls == 1 + len({(m.group, m.kept) for m in found.measurements if m.kept < m.channels})


def test_a_killed_analysis_goes_on_where_it_was(tmp_path: Path) -> None:
    """After kill -9 in the middle of an evaluation, only what is missing is evaluated, and the table is that of an uninterrupted run."""
    interrupted("analysis", tmp_path, 8)
    evaluator = Mass()
    found = gp.sensitivity(Chain(), INPUTS, evaluator, folder=tmp_path)
    whole = gp.sensitivity(Chain(), INPUTS, Mass())
    assert found == whole
    assert evaluator.calls == whole.evaluations - 8


def test_a_line_that_was_not_finished_is_dropped(tmp_path: Path) -> None:
    """A score that was cut off while it was written is measured again; a line that is no score is an error that says what to do."""
    found = gp.sensitivity(Chain(), INPUTS, Mass(), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_bytes()
    path.write_bytes(text[:-4])
    evaluator = Mass()
    assert gp.sensitivity(Chain(), INPUTS, evaluator, folder=tmp_path) == found
    assert evaluator.calls == 1
    assert len(path.read_bytes().splitlines()) == len(text.splitlines())
    assert gp.sensitivity(Chain(), INPUTS, Mass(), folder=tmp_path).evaluations == 0
    path.write_bytes(text + b'{"not": "a score"}\n')
    with pytest.raises(gp.FileError, match=r"are damaged.*Delete the file"):
        gp.sensitivity(Chain(), INPUTS, Mass(), folder=tmp_path)


def test_two_processes_give_the_same_table(tmp_path: Path) -> None:
    """Evaluations in other processes lead to the same records and stop where they would, and their scores are kept."""
    alone = gp.sensitivity(Chain(), INPUTS, Mass(), sparsities=GRID, early_stop=20.0)
    evaluator = Mass()
    found = gp.sensitivity(Chain(), INPUTS, evaluator, sparsities=GRID, early_stop=20.0, processes=2, folder=tmp_path)
    assert found == alone
    assert found.evaluations == alone.evaluations
    assert evaluator.calls == 1  # the whole model; all others elsewhere
    assert gp.sensitivity(Chain(), INPUTS, Mass(), sparsities=GRID, early_stop=20.0, folder=tmp_path).evaluations == 0


def test_a_process_that_dies_is_an_error_and_its_scores_stay(tmp_path: Path) -> None:
    """Where a process is killed, an error says so; what was evaluated until then is not evaluated again."""
    with pytest.raises(gp.ConfigError, match=r"ended before its work was done.*__main__"):
        gp.sensitivity(Chain(), INPUTS, Mass(deadline=3), folder=tmp_path, processes=2)  # the first call is made in this process
    evaluator = Mass()
    found = gp.sensitivity(Chain(), INPUTS, evaluator, folder=tmp_path)
    assert found == gp.sensitivity(Chain(), INPUTS, Mass())
    assert evaluator.calls == found.evaluations < 22 - 2  # all of them, without what two processes did before


def test_what_cannot_be_sent_to_a_process_is_refused() -> None:
    """A function of a function cannot be sent to another process, and the error says what to do."""
    with pytest.raises(gp.ConfigError, match=r"cannot be sent to another process: .*processes=1"):
        gp.sensitivity(Chain(), INPUTS, lambda model: 0.0, processes=2)  # noqa: ARG005 (an evaluator)


# -- how it is shown -------------------------------------------------------------------------------------------------------------


def test_csv_holds_all_measurements(tmp_path: Path) -> None:
    """Read back, the file has one row per measurement with exact numbers."""
    found = gp.sensitivity(Chain(), INPUTS, Mass(), sparsities=GRID)
    found.to_csv(tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["group"], r["layers"], int(r["kept"]), float(r["sparsity"]), float(r["score"]), int(r["macs"])) for r in rows] == [
        (m.group, " ".join(m.layers), m.kept, m.sparsity, m.score, m.macs) for m in found.measurements
    ]
    assert json.loads(json.dumps(found.to_dict()))["measurements"][0]["group"] == "a"
    with pytest.raises(gp.FileError, match="cannot write the measurements"):
        found.to_csv(tmp_path / "missing" / "curves.csv")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.csv"]


def test_plot_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot is a picture, the table has a row per group; without matplotlib an error says what to install."""
    found = gp.sensitivity(Chain(), INPUTS, Mass(), sparsities=GRID)
    found.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(gp.FileError, match="an ending that fits"):
        found.plot(tmp_path / "curves.nonsense")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert found.table().row_count == 3
    assert [str(column.header) for column in found.table().columns] == ["group", "channels", "20%", "50%", "80%"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(gp.ConfigError, match="pip install matplotlib"):
        found.plot(tmp_path / "curves.png")


def test_progress_reaches_its_end() -> None:
    """A function that is told the progress hears every step, and all of them where groups end early."""
    told: list[tuple[str, int, int]] = []
    gp.sensitivity(Chain(), INPUTS, Mass(), early_stop=0.0, progress=lambda *step: told.append(step))
    assert told[-1] == ("sensitivity", 27, 27)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


# -- evaluators from data --------------------------------------------------------------------------------------------------------


def test_accuracy_and_loss_from_data() -> None:
    """Accuracy is the share of labels that are right, the loss is weighted by the samples of its batches; limits hold."""
    model = Chain()
    batches = [(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), torch.arange(n) % 3) for n in (5, 2)]
    images, labels = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    output = model(images).detach()
    right = sum(int(scores.argmax()) == int(label) for scores, label in zip(output, labels, strict=True))
    assert DataEvaluator(batches)(model) == right / 7
    loss = float(nn.functional.cross_entropy(output, labels))
    assert DataEvaluator(batches, "loss", nn.functional.cross_entropy)(model) == pytest.approx(-loss, rel=1e-6)
    first = float(nn.functional.cross_entropy(output[:5], labels[:5]))
    assert DataEvaluator(batches, "loss", nn.functional.cross_entropy, limit=1)(model) == pytest.approx(-first, rel=1e-6)
    dicts = [{"x": x, "labels": y} for x, y in batches]
    taking = nn.Module()
    taking.forward = lambda x, labels: model(x)  # noqa: ARG005 (a model that is given its labels)
    assert DataEvaluator(dicts)(taking) == right / 7


WRONG_DATA: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"batches": [INPUTS]}, gp.InputError, "has no target"),
    ({"batches": []}, gp.InputError, "has no batches"),
    ({"batches": [(INPUTS, torch.zeros(2, 2))]}, gp.InputError, r"\[2, 3\] have classes for \[2\], but the labels are \[2, 2\]"),
    ({"batches": [(INPUTS, "labels")]}, gp.InputError, "accuracy needs labels"),
    ({"batches": [(INPUTS, INPUTS)], "metric": "loss"}, gp.ConfigError, "Pass loss="),
    ({"batches": [(INPUTS, INPUTS)], "metric": "acuracy"}, gp.ConfigError, "did you mean 'accuracy'"),
    ({"batches": iter([(INPUTS, INPUTS)])}, gp.ConfigError, "only once"),
    ({"batches": [(INPUTS, INPUTS)], "metric": "loss", "loss": nn.functional.cross_entropy}, gp.InputError, "the loss cannot be computed"),
)


@pytest.mark.parametrize(("given", "error", "words"), WRONG_DATA)
def test_data_that_cannot_score_is_refused(given: dict[str, Any], error: type[Exception], words: str) -> None:
    """Each wrong batch, metric or loss is one clear sentence."""
    with pytest.raises(error, match=words):
        DataEvaluator(**given)(Chain())


# -- refusals --------------------------------------------------------------------------------------------------------------------

WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"sparsities": ()}, "sparsities is"),
    ({"sparsities": (0.0, 0.5)}, "all above 0"),
    ({"sparsities": (1.0,)}, r"sparsities\[0\] is 1.0"),
    ({"early_stop": -1.0}, "early_stop is -1.0"),
    ({"early_stop": float("nan")}, "early_stop is nan"),
    ({"processes": 0}, "processes is 0"),
    ({"mode": "global"}, "one group at a time"),
    ({"budget": gp.Budget(macs=0.5)}, "asks for nothing"),
    ({"keep_class": True}, "Leave it out"),
    ({"criterion": "l3"}, "l3"),
    ({"config_list": "a"}, "config_list is a str"),
    ({"config_list": [{"exclude": True, "op_names": ["a", "b", "c", "d"]}]}, "no group of channels can be pruned"),
    ({"evaluator": lambda model: "high"}, "returned a str, no number"),  # noqa: ARG005 (an evaluator)
    ({"evaluator": lambda model: float("nan")}, "returned nan"),  # noqa: ARG005 (an evaluator)
)


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_wrong_arguments_are_refused(given: dict[str, Any], words: str) -> None:
    """Each wrong argument is one clear sentence."""
    with pytest.raises(gp.ConfigError, match=words):
        gp.sensitivity(Chain(), INPUTS, **{"evaluator": Mass(), **given})


def test_scores_may_be_tensors_with_gradients() -> None:
    """An evaluator may return a loss as it comes, a tensor with a gradient."""
    found = gp.sensitivity(Chain(), INPUTS, lambda model: -model(INPUTS).square().mean(), sparsities=(0.5,))
    assert found.dense == pytest.approx(-float(Chain()(INPUTS).detach().square().mean()))


@pytest.mark.parametrize("error", [StopIteration, ValueError])
def test_what_the_evaluator_raises_comes_through(error: type[Exception]) -> None:
    """An error of the user's own is neither hidden nor taken for the end of a group, and the random numbers are as they were."""
    calls: list[int] = []

    def evaluator(_model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return 0.0

    model, before = Chain(), torch.get_rng_state()
    with pytest.raises(error):
        gp.sensitivity(model, INPUTS, evaluator)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mass_of_the_cases_is_what_it_says() -> None:
    """The evaluator of these tests scores the whole network 0 and knows every layer."""
    assert Mass()(Chain()) == 0.0
    assert set(masses(Chain())) == set("abcd")
