"""Studies by optuna's samplers: as good as trying everything, fronts, storages that are shared and survive, and clear refusals."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import ConfigError, FileError
from graphprune.search.objective import Objective, Trial
from graphprune.search.parallel import run_study
from graphprune.search.studies import Point, Sampler, Study, front
from graphprune.search.timing import OnnxLatency
from tests.support.analytic import Analytic, Stopped, network
from tests.support.killing import FORKS, kill
from tests.support.operators import images

ROOT = Path(__file__).resolve().parents[2]
optuna = pytest.importorskip("optuna")
pytest.importorskip("cmaes")


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_best_is_close_to_the_best_of_all_points_and_better_than_uniform(sampler: Sampler) -> None:
    """Within three hundredths of the best of thousands in sixty trials, where the even point is far below; three seeds."""
    for seed in range(3):
        target = Analytic()
        result = Study(target, sampler, seed=seed).run(60)
        assert target.optimum - 0.03 <= result.best.score <= target.optimum
        assert target.uniform < target.optimum - 0.2
        assert result.history[0].score == target.uniform
        assert [t.number for t in result.history] == list(range(60))
        assert result.front == ()


@pytest.mark.parametrize("sampler", ["tpe", "cma-es", "nsga-ii", "random"])
def test_interrupted_at_any_trial_ends_as_uninterrupted(tmp_path: Path, sampler: Sampler) -> None:
    """Stopped in each of two trials one after the other, the study ends with the same trials; another seed gives others."""
    options = {"population_size": 4} if sampler == "nsga-ii" else {}

    def go(storage: Path | None, stop_at: int | None = None, seed: int = 0) -> Any:
        return Study(Analytic(stop_at=stop_at), sampler, storage=storage, seed=seed, options=options).run(10)

    whole = go(None)
    for stop_at in (0, 6):
        with pytest.raises(Stopped):
            go(tmp_path / "study.db", stop_at)
    assert go(tmp_path / "study.db") == whole
    assert go(tmp_path / "study.db", 0) == whole  # finished: nothing is evaluated again
    assert go(None) == whole
    assert go(None, seed=1) != whole


@pytest.mark.parametrize("dead", [2**22 + 1, os.getpid()])
def test_trial_of_a_dead_process_is_taken_over_and_that_of_a_living_one_is_not(tmp_path: Path, dead: int) -> None:
    """What a process of this machine left unfinished is evaluated by the next, also where that has got the same number."""
    target = Analytic()
    whole = Study(target).run(6)
    left = Study(target, storage=tmp_path / "study.db")
    left.run(3)
    point = dict(left.propose())
    number = left.study.get_trials(deepcopy=False)[-1].number
    living = Study(target, storage=tmp_path / "study.db")
    assert dict(living.propose()) != point
    for trial, owner in ((number, f"{socket.gethostname()} {dead} none"), (number + 1, "another-machine 1 none")):
        frozen = left.study.get_trials(deepcopy=False)[trial]
        left.study._storage.set_trial_user_attr(frozen._trial_id, "graphprune.owner", owner)  # noqa: SLF001 (as another process would)
    again = Study(target, storage=tmp_path / "study.db")
    assert dict(again.propose()) == point
    assert again.study.get_trials(deepcopy=False)[number].user_attrs["graphprune.owner"].split()[1] == str(os.getpid())
    again.tell(target.project(point), target.formula(target.project(point)))
    assert again.history()[3].sparsities == whole.history[3].sparsities


def test_random_numbers_of_a_trial_depend_on_seed_and_number_alone() -> None:
    """Evaluators that draw from torch score the same whatever was drawn before, and the global generator is left alone."""
    target = Objective(network(), images(1), lambda _: float(torch.rand(())), budget=gp.Budget(macs=0.5))

    def scores() -> list[float]:
        return [t.score for t in Study(target, "random").run(3).history]

    state = torch.get_rng_state()
    first = scores()
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert scores() == first
    assert len(set(first)) == 3


@pytest.mark.parametrize("sampler", ["tpe", "cma-es", "nsga-ii", "random"])
@pytest.mark.parametrize("finished", [3, 12])
def test_process_killed_between_two_parameters_of_a_proposal_changes_nothing(
    sampler: Sampler, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes over a trial of which the storage holds the first parameter proposes the others as the first process would have."""
    target, options = Analytic(), {"population_size": 4} if sampler == "nsga-ii" else {}
    study = Study(target, sampler, options=options)
    study.run(finished)
    expected = dict(study.propose())
    killed = Study(target, sampler, storage=tmp_path / "study.db", options=options)
    killed.run(finished)
    suggest, calls = optuna.Trial.suggest_float, list[str]()

    def dying(trial: Any, name: str, low: float, high: float) -> float:
        calls.append(name)
        if len(calls) > 1:
            raise Stopped
        return float(suggest(trial, name, low, high))

    monkeypatch.setattr(optuna.Trial, "suggest_float", dying)
    with pytest.raises(Stopped):
        killed.propose()
    monkeypatch.undo()
    frozen = killed.study.get_trials(deepcopy=False)[-1]
    assert list(frozen.params) == calls[:1]
    killed.study._storage.set_trial_user_attr(frozen._trial_id, "graphprune.owner", "nobody")  # noqa: SLF001 (as if the process were dead)
    assert dict(Study(target, sampler, storage=tmp_path / "study.db", options=options).propose()) == expected


# -- two objectives ------------------------------------------------------------------------------------------------------------------


def test_front_of_score_against_macs() -> None:
    """No trial beats one of the front in both, every other trial is beaten or equalled by one, and less costs score."""
    target = Analytic(budget=None)
    result = Study(target, "nsga-ii", minimize="macs", options={"population_size": 10}).run(60)
    assert len(result.front) >= 5
    for trial in result.history:
        ahead = [p for p in result.front if p.trial.score >= trial.score and p.measured <= trial.cost.macs]
        assert ahead
        strictly = [p for p in ahead if p.trial.score > trial.score or p.measured < trial.cost.macs]
        assert (not strictly) == any(p.trial.score == trial.score and p.measured == trial.cost.macs for p in result.front)
    assert [p.measured for p in result.front] == sorted(p.measured for p in result.front)
    assert [p.trial.score for p in result.front] == sorted(p.trial.score for p in result.front)


def channels(model: nn.Module) -> float:
    """Measures a shrunk model by the width of its second convolution."""
    module: Any = model
    return float(module.b.out_channels)


def test_measure_is_given_the_shrunk_model() -> None:
    """A function that is to be small sees the model of each trial."""
    target = Analytic(budget=None)
    result = Study(target, "random", minimize=channels).run(8)
    name = next(n for n in target.groups if n.startswith("b"))
    assert result.front
    assert all(p.measured == round(20 * (1 - p.trial.sparsities[name])) for p in result.front)


def test_latency_is_measured_of_exported_models() -> None:
    """A front of score against milliseconds, each those of a file that ONNX Runtime ran; a wide model takes longer than a narrow one."""
    example = images(1).float()
    target = Objective(network().float(), example, channels)
    result = Study(target, "nsga-ii", minimize=OnnxLatency(example, rounds=5)).run(2)
    assert result.front
    assert all(0 < p.measured < 1000 for p in result.front)
    small, large = (nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)) for width in (2, 256))
    latency = OnnxLatency(torch.randn(1, 3, 32, 32), rounds=5)
    assert latency(large) > latency(small)


def test_front_keeps_the_first_of_equal_points() -> None:
    """By hand: points beaten in one and equal in the other go, and of two alike the later."""
    made = [(1.0, 5.0), (1.0, 4.0), (2.0, 4.0), (2.0, 4.0), (0.5, 1.0), (3.0, 9.0), (2.5, 9.0)]
    points = [Point(Trial(n, {}, score, gp.Cost(0, 0), 0.0), measured) for n, (score, measured) in enumerate(made)]
    assert [p.trial.number for p in front(points)] == [4, 2, 5]


# -- many processes ------------------------------------------------------------------------------------------------------------------


def test_trials_of_others_are_counted_and_their_scores_are_used(tmp_path: Path) -> None:
    """Of five trials, one is being evaluated elsewhere: four remain, none is done twice, and all are in every process's result."""
    target = Analytic()
    one, two = (Study(target, storage=tmp_path / "study.db") for _ in range(2))
    point = target.project(one.propose())
    assert [t.number for t in two.run(5).history] == [1, 2, 3, 4]
    one.tell(point, target.formula(point))
    assert one.result() == two.result() == one.run(5)
    assert [t.number for t in one.history()] == [0, 1, 2, 3, 4]
    assert {t.state.name for t in one.study.get_trials()} == {"COMPLETE"}


def study_of(folder: Path | None) -> Any:
    """Returns the trials of a study, stored in a folder; what a process that may be killed does."""
    if folder is None:
        return Study(Analytic()).run(30).history
    folder.mkdir(exist_ok=True)
    return Study(Analytic(pause=0.02), storage=folder / "study.db").run(30).history


@pytest.mark.slow
@FORKS
def test_killed_at_ten_random_moments_ends_as_uninterrupted(tmp_path: Path) -> None:
    """Processes that get SIGKILL at random moments leave a study that ends as one that was left alone."""
    kill("tests.search.test_studies", "study_of", tmp_path)


@pytest.mark.slow
def test_two_processes_share_a_study(tmp_path: Path) -> None:
    """Both evaluate trials, no trial is lost or done twice, and the study has exactly as many as were asked for."""
    result = run_study(functools.partial(Analytic, pause=0.4), 30, storage=tmp_path / "study.db", processes=2)
    assert [t.number for t in result.history][:10] == list(range(10))
    assert len(result.history) == 30
    study = Study(Analytic(), storage=tmp_path / "study.db")
    owners = {t.user_attrs["graphprune.owner"] for t in study.study.get_trials() if t.state.name == "COMPLETE"}
    assert len(owners) == 2
    more = run_study(Analytic(), 33, storage=tmp_path / "study.db")
    assert len(more.history) == 33
    assert more.history[:30] == result.history


def failing_elsewhere(pause: float) -> Analytic:
    """Makes an objective in the process that the study was started in, and fails in any other."""
    if multiprocessing.parent_process() is not None:
        raise ConfigError("this process has no data", "Copy them")
    return Analytic(pause=pause)


def dying_elsewhere(pause: float) -> Analytic:
    """Likewise, but the other process dies."""
    if multiprocessing.parent_process() is not None:
        os._exit(3)
    return Analytic(pause=pause)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "message"), [(failing_elsewhere, "has no data"), (dying_elsewhere, "died.*__main__")])
def test_failure_of_another_process_ends_the_study(tmp_path: Path, make: Any, message: str) -> None:
    """What goes wrong elsewhere is raised here after the trial that is under way, and the next run goes on with what there is."""
    storage = tmp_path / "study.db"
    with pytest.raises(ConfigError, match=message):
        run_study(functools.partial(make, 0.2), 300, storage=storage, processes=2)
    found = Study(Analytic(), storage=storage)
    assert 0 < len(found.history()) < 300
    assert found.run(len(found.history()) + 2).history == Study(Analytic()).run(len(found.history())).history


SHARED = """
import functools, sys
from graphprune.search.parallel import run_study
from tests.support.analytic import Analytic
if __name__ == "__main__":
    run_study(functools.partial(Analytic, pause=0.3), 1000, storage=sys.argv[1], processes=2)
"""


@pytest.mark.slow
def test_process_that_works_for_a_dead_one_ends(tmp_path: Path) -> None:
    """When the process that started the study is killed, the other one starts no further trial, and the study can be gone on with."""
    (tmp_path / "shared.py").write_text(SHARED)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
    started = subprocess.Popen([sys.executable, str(tmp_path / "shared.py"), str(tmp_path / "study.db")], cwd=ROOT, env=environment)  # noqa: S603
    patience = time.monotonic() + 120
    while len(owners(tmp_path / "study.db")) < 2 and time.monotonic() < patience:
        time.sleep(0.5)
    started.kill()
    started.wait()
    assert len(owners(tmp_path / "study.db")) == 2
    time.sleep(5.0)
    study = Study(Analytic(), storage=tmp_path / "study.db")
    before = len(study.history())
    time.sleep(2.0)
    assert len(Study(Analytic(), storage=tmp_path / "study.db").history()) == before
    assert len(study.run(before + 2).history) == before + 2


def owners(path: Path) -> set[str]:
    """Returns the processes that have evaluated trials of a study."""
    if not path.exists():
        return set()
    with contextlib.suppress(optuna.exceptions.OptunaError, KeyError):  # not complete yet
        study = optuna.load_study(study_name="graphprune", storage=f"sqlite:///{path}")
        return {t.user_attrs["graphprune.owner"] for t in study.get_trials() if t.state.name == "COMPLETE"}
    return set()


def test_several_processes_need_a_function_that_can_be_sent() -> None:
    """An objective that is made, and a function without a name, are refused before anything starts."""
    with pytest.raises(ConfigError, match="function that makes it"):
        run_study(Analytic(), 2, processes=2)
    with pytest.raises(ConfigError, match="top of a module"):
        run_study(lambda: Analytic(), 2, processes=2)  # noqa: PLW0108 (what cannot be pickled)
    with pytest.raises(ConfigError, match="processes"):
        run_study(Analytic, 2, processes=0)


# -- refusals ------------------------------------------------------------------------------------------------------------------------


def test_without_optuna_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that names the package and the extra."""
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"optuna, which is not installed.*pip install graphprune\[search\]"):
        Study(Analytic())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "tpo"}, "did you mean 'tpe'"),
        ({"sampler": "cma-es", "minimize": "macs"}, "one objective"),
        ({"minimize": "flops"}, "macs"),
        ({"seed": -1}, "seed"),
        ({"options": {"n_startup": 3}}, "n_startup"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is stored."""
    with pytest.raises(ConfigError, match=message):
        Study(Analytic(), **options)


RACE = """
import multiprocessing, sys
import alembic.config, optuna
from graphprune.search.storages import opened, quietly

def open_all(barrier, said):
    with quietly():
        for number in range(4):
            barrier.wait()
            try:
                said.put(opened(f"{sys.argv[1]}/{number}.db", "study", 1).study_name)
            except Exception as error:
                said.put(repr(error))

context = multiprocessing.get_context("fork")
barrier, said = context.Barrier(3), context.Queue()
others = [context.Process(target=open_all, args=(barrier, said)) for _ in range(3)]
for other in others:
    other.start()
print({said.get() for _ in range(12)})
"""


@FORKS
def test_processes_that_make_a_storage_at_once_all_open_it(tmp_path: Path) -> None:
    """Three processes begin a study at the same moment, four times: none of them trips over the tables that another one makes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RACE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)  # noqa: S603 (our own words)
    assert done.stdout.strip() == "{'study'}", done.stderr


def test_unusable_storages_are_refused(tmp_path: Path) -> None:
    """A file that is no database, an unknown kind of database, and a study with other settings."""
    (tmp_path / "text.db").write_text("no database " * 100)
    with pytest.raises(FileError, match="cannot be opened"):
        Study(Analytic(), storage=tmp_path / "text.db")
    with pytest.raises(FileError, match="cannot be opened"):
        Study(Analytic(), storage="nothing://here/study")
    Study(Analytic(), storage=tmp_path / "study.db").run(1)
    with pytest.raises(FileError, match="constraints differs"):
        Study(Analytic(budget=gp.Budget(macs=0.4)), storage=tmp_path / "study.db")
    with pytest.raises(FileError, match="objectives"):
        Study(Analytic(), storage=tmp_path / "study.db", minimize="macs")
    assert len(Study(Analytic(budget=gp.Budget(macs=0.4)), storage=tmp_path / "study.db", name="other").run(1).history) == 1
    with pytest.raises(FileError, match="study"):
        Study(Analytic()).restore({"study": "another"})
    with pytest.raises(ConfigError, match="propose"):
        Study(Analytic()).tell({}, 1.0)
