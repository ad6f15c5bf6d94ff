"""Rounds that are killed and started again end exactly as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.schedules import LinearPruner

_SCRIPT = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from torch import nn
from torch.nn import functional as F
from graphprune.schedules import AGPPruner, LotteryTicketPruner

torch.set_num_threads(1)
KIND, FOLDER, KILLS = sys.argv[1], Path(sys.argv[2]), 10

def pruner(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 12, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(192, 3))
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,))

    def train(now, optimizer, criterion):
        order = torch.randperm(64)
        for i in range(0, 64, 16):
            optimizer.zero_grad()
            criterion(now(x[order[i : i + 16]]), y[order[i : i + 16]]).backward()
            optimizer.step()

    def evaluator(now):
        now.eval()
        with torch.no_grad():
            return -float(F.cross_entropy(now(x), y))

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    extra = dict(trainer=train, optimizer=optimizer, criterion=F.cross_entropy, evaluator=evaluator, example_inputs=x[:1], folder=folder,
                 training_epochs=2)
    entries = [{"sparsity": 0.7, "op_types": ["default"]}]
    if KIND == "agp":
        return AGPPruner(model, entries, "level", 10, **extra)
    if KIND == "agp physical":
        return AGPPruner(model, entries, "taylorfo", 6, speedup=True, **extra)
    step = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5)
    return LotteryTicketPruner(model, entries, "l1", 4, speedup=True, rewind_epoch=1, lr_scheduler=step, **extra)

def result(made):
    model, masks = made.compress()
    best = made.best
    return {"model": model.state_dict(), "masks": {n: torch.as_tensor(masks[n]) for n in masks}, "history": made.history.to_dicts(),
            "best": best.model.state_dict(), "best_masks": {n: torch.as_tensor(best.masks[n]) for n in best.masks},
            "number": best.round.number}

start = time.perf_counter()
whole = result(pruner(None))
took = time.perf_counter() - start
chance, kills = random.Random(KIND), 0
while True:
    child = os.fork()
    if not child:
        torch.save(result(pruner(FOLDER)), FOLDER / "result.pt")
        os._exit(0)
    if kills < KILLS:
        time.sleep(chance.uniform(0.0, took / 3))
        os.kill(child, signal.SIGKILL)
        kills += 1
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and kills == KILLS:
        assert status == 0
        break
again = torch.load(FOLDER / "result.pt", weights_only=False)
for name in ("model", "masks", "best", "best_masks"):
    assert set(whole[name]) == set(again[name]), name
    for key, value in whole[name].items():
        assert torch.equal(value, again[name][key]), (name, key)
assert whole["number"] == again["number"]
plain = [[{k: v for k, v in r.items() if k != "seconds"} for r in found["history"]] for found in (whole, again)]
assert plain[0] == plain[1]
print(kills, len(plain[0]), whole["number"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")
@pytest.mark.parametrize("kind", ["agp", "agp physical", "lottery"])
def test_killed_runs_end_like_uninterrupted_ones(kind: str, tmp_path: Path) -> None:
    """After ten SIGKILLs at random moments weights, masks, scores and the best round are bit-identical to an uninterrupted run's."""
    command = [sys.executable, "-c", _SCRIPT, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)  # noqa: S603 (ourselves)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 ")


def test_a_folder_of_another_run_is_refused_and_a_finished_one_is_read(tmp_path: Path) -> None:
    """Other weights, sparsities or algorithms do not go on with a run; the same call again returns its result without training."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    entries = [{"sparsity": 0.5, "op_names": ["0"]}]
    calls: list[nn.Module] = []

    def pruner(now: nn.Module = model, share: float = 0.5, algorithm: str = "l1", **options: Any) -> LinearPruner:
        given: dict[str, Any] = {"example_inputs": x, "folder": tmp_path, "finetune": calls.append, **options}
        return LinearPruner(now, [{**entries[0], "sparsity": share}], algorithm, 2, **given)

    small, masks = pruner(speedup=True).compress()
    assert len(calls) == 2
    again = pruner(speedup=True)
    read, read_masks = again.compress()
    assert len(calls) == 2
    assert {n: masks[n].tolist() for n in masks} == {n: read_masks[n].tolist() for n in read_masks}
    assert torch.equal(read(x), small(x))
    assert len(again.history) == 2
    with pytest.raises(gp.FileError, match="other settings: speedup was true and is false now"):
        pruner().compress()
    with pytest.raises(gp.FileError, match="other settings: entries was"):
        pruner(speedup=True, share=0.25).compress()
    with pytest.raises(gp.FileError, match='algorithm was "L1NormPruner" and is "L2NormPruner" now'):
        pruner(speedup=True, algorithm="l2").compress()
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(gp.FileError, match="other settings: model was"):
        pruner(other, speedup=True).compress()
