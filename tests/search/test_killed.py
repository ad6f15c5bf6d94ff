"""Searches and analyses that are killed at random moments and started again end exactly as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.search.amc import AMCPruner
from graphprune.search.base import SearchResult
from graphprune.search.netadapt import NetAdaptPruner
from tests.support import sensitivity_cases
from tests.support.analytic import network
from tests.support.killing import FORKS, ROOT, kill
from tests.support.operators import images

EVERYWHERE = [{"op_types": ["Conv2d"]}]
BUDGET = gp.Budget(macs=0.5)


def drawn() -> float:
    """Returns the sum of a random number of torch, one of numpy and one of Python."""
    return float(torch.rand(())) + float(np.random.rand()) + random.random()  # noqa: NPY002, S311 (as users' code draws)


def seeded() -> nn.Module:
    """Returns the network, with all global generators at their beginnings."""
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002 (what users seed)
    torch.manual_seed(4)
    return network()


def tune(model: nn.Module) -> None:
    """Trains for two steps on random images with dropped-out gradients, by an optimizer of its own."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3 * (1.0 + drawn()))
    for _ in range(2):
        x = torch.randn(4, 3, 8, 8, dtype=images(1).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.randint(0, 5, (4,))).backward()
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad = F.dropout(parameter.grad, 0.2)
        optimizer.step()


def score(model: nn.Module) -> float:
    """Scores a model by its answers on random images, with noise."""
    module: Any = model
    with torch.no_grad():
        answers: Tensor = model(torch.randn(4, 3, 8, 8, dtype=images(1).dtype))
    return 0.1 * float(answers.std()) + 1e-3 * drawn() + 0.02 * float(module.a.out_channels + module.c.out_channels)


def trials(result: SearchResult) -> list[Any]:
    """Returns the trials as plain values, and which is the best and which the last; not their seconds."""
    return [[{**t.to_dict(), "seconds": 0.0} for t in result.history], result.best.number, result.last.number]


def left(found: NetAdaptPruner | AMCPruner) -> dict[str, Any]:
    """Returns everything that a search leaves, the global generators included."""
    result = trials(found.search())
    number, masked, masks, best, entries = found.get_best_result()
    flags = {name: torch.as_tensor(masks[name]) for name in masks}
    return {"trials": result, "best": [number, best, entries], "model": masked.state_dict(), "masks": flags, "random": drawn()}


def netadapt(folder: Path | None) -> dict[str, Any]:
    """Adapts the network to half of its MACs."""
    model = seeded()
    shape: dict[str, Any] = {"example_inputs": images(1), "budget": BUDGET, "sparsity_per_iteration": 0.08, "folder": folder}
    found = NetAdaptPruner(model, EVERYWHERE, tune, score, **shape)
    return {**left(found), "steps": [asdict(step) for step in found.steps], "reason": found.reason}


def amc(folder: Path | None) -> dict[str, Any]:
    """Lets an agent prune the network to half of its MACs, sixteen times; it learns from the sixth on."""
    model = seeded()
    agent = {"hidden": 16, "batch": 8, "warm_up": 5}
    shape: dict[str, Any] = {"example_inputs": images(1), "budget": BUDGET, "finetune": tune, "folder": folder, "ddpg_params": agent}
    found = AMCPruner(16, model, EVERYWHERE, score, **shape)
    return {**left(found), "episodes": [asdict(episode) for episode in found.episodes]}


def sensitivity(folder: Path | None) -> dict[str, Any]:
    """Analyses the network."""
    found = gp.sensitivity(seeded(), images(1), score, folder=folder, sparsities=np.linspace(0.05, 0.95, 19).tolist(), early_stop=0.25)
    table = [{**asdict(m), "seconds": 0.0} for m in found.measurements]
    return {"table": table, "dense": found.dense, "cost": asdict(found.cost), "stopped": found.stopped, "random": drawn()}


def sensitivity_pruner(folder: Path | None) -> dict[str, Any]:
    """Prunes by analyses, with random training in between."""
    found = sensitivity_cases.pruner(folder)
    masked, masks = found.compress()
    flags = {name: torch.as_tensor(masks[name]) for name in masks}
    return {"history": [{**asdict(r), "seconds": 0.0} for r in found.history], "model": masked.state_dict(), "masks": flags}


SEARCHES: tuple[Callable[[Path | None], dict[str, Any]], ...] = (netadapt, amc, sensitivity, sensitivity_pruner)


@pytest.mark.slow
@FORKS
@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: str(search.__name__))
def test_killed_at_ten_random_moments_ends_as_uninterrupted(search: Callable[..., Any], tmp_path: Path) -> None:
    """After ten SIGKILLs trials, records, masks, weights and the global generators are those of an uninterrupted run, bit by bit."""
    kill("tests.search.test_killed", search.__name__, tmp_path)


@dataclass
class Signed:
    """Scores a model by its widths, slowly, and leaves the number of its process in a folder."""

    folder: Path

    def __call__(self, model: nn.Module) -> float:
        """Returns the score."""
        (self.folder / str(os.getpid())).touch()
        time.sleep(0.1)
        return float(sum(p.numel() for p in model.parameters()))


def analysis(folder: str) -> None:
    """Analyses a network in two processes besides this one."""
    gp.sensitivity(sensitivity_cases.Chain(), sensitivity_cases.INPUTS, Signed(Path(folder)), processes=2)


def alive(process: int) -> bool:
    """Returns whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_processes_that_evaluate_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Where the first process gets SIGKILL in the middle of an analysis, those that it started are gone soon after."""
    code = f"from tests.search.test_killed import analysis; analysis({str(tmp_path)!r})"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S603 (ourselves)
    end = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 3 and first.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    first.kill()
    first.wait()
    others = {int(path.name) for path in tmp_path.iterdir()} - {first.pid}
    assert len(others) == 2
    end = time.monotonic() + 20
    while any(map(alive, others)) and time.monotonic() < end:
        time.sleep(0.05)
    left_over = list(filter(alive, others))
    for process in left_over:
        os.kill(process, signal.SIGKILL)
    assert not left_over
