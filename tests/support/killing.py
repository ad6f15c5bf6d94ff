"""Processes that are killed at random moments, until what they do is done; what the last one left is compared with an uninterrupted run.

    python -m tests.support.killing tests.test_module function FOLDER KILLS [ARGUMENT ...]

calls `function(None, *arguments)` for what should come out, and `function(folder, *arguments)` in forked processes. Every process is killed
with SIGKILL at a random moment within the time that the whole takes, every other one not before it has saved something; where one is done
before its time, the result is compared and the folder emptied. Prints how many were killed, and how many of them had saved.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes that are killed are forked")


def kill(module: str, function: str, folder: Path, *arguments: str, kills: int = 10) -> None:
    """Kills processes that call a function of a test module until so many were killed, and compares the result.

    Args:
        module: dotted name.
        function: from a folder (or None) and arguments to what comes out: tensors, plain values, sequences and mappings of these.
        folder: an empty one.
        arguments: of the function, besides the folder.
        kills: how many.
    """
    command = [sys.executable, "-m", "tests.support.killing", module, function, str(folder / "run"), str(kills), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)  # noqa: S603
    assert done.returncode == 0, done.stderr[-5000:]
    killed, saved = map(int, done.stdout.split())
    assert killed == kills
    assert saved >= kills // 4  # else the kills came too early to be of use


def same(one: Any, two: Any) -> bool:
    """Returns whether two results are equal bit by bit."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, Mapping):
        return list(one) == list(two) and all(same(one[name], two[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(itertools.starmap(same, zip(one, two, strict=True)))
    return bool(one == two)


def _main(module: str, name: str, place: str, number: str, *arguments: str) -> None:
    torch.set_num_threads(1)  # a process that is forked has none of the threads that others would wait for
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    folder, result, kills, chance = Path(place), Path(place).with_suffix(".result"), int(number), random.Random(name)  # noqa: S311 (moments)
    whole = function(None, *arguments)
    start = time.perf_counter()
    assert same(function(folder, *arguments), whole), "the result with a folder differs from that without one"
    took = time.perf_counter() - start  # of a process that has loaded everything, as those have that are forked from it
    shutil.rmtree(folder)
    killed = saved = 0
    while True:
        before = _present(folder)
        child = os.fork()
        if not child:
            result.write_bytes(pickle.dumps(function(folder, *arguments)))
            os._exit(0)
        status = None
        if killed < kills:
            while killed % 2 and _present(folder) == before and status is None:
                time.sleep(0.001)
                status = _ended(child)
            if status is None:
                time.sleep(chance.uniform(0.0, took))
                os.kill(child, signal.SIGKILL)
        if status is None:
            status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            saved += _present(folder) != before
            continue
        assert status == 0
        assert same(pickle.loads(result.read_bytes()), whole), "the result differs from the uninterrupted one"  # noqa: S301 (our own)
        if killed == kills:
            break
        shutil.rmtree(folder)
    print(killed, saved)  # noqa: T201 (for the process that started this one)


def _present(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns which files there are, and of what time and size; not those that are being written."""
    found = {}
    for path in folder.glob("*"):
        if not path.name.startswith("."):
            about = path.stat()
            found[path.name] = (about.st_mtime_ns, about.st_size)
    return found


def _ended(child: int) -> int | None:
    found, status = os.waitpid(child, os.WNOHANG)
    return status if found else None


if __name__ == "__main__":
    _main(*sys.argv[1:])
