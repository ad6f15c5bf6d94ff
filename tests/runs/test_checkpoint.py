"""A saved run comes back exactly, whenever its process dies."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import graphprune as gp
from graphprune.runs.checkpoint import Run, digest, plain
from tests.support.killing import FORKS


def _draws() -> list[float]:
    """Returns one number from each global generator."""
    return [float(torch.rand(())), float(np.random.normal()), random.random()]  # noqa: NPY002, S311 (the generators under test)


def test_state_and_tensors_come_back(tmp_path: Path) -> None:
    """Plain values and tensors of every common type, shape and layout are read back equal; a second save replaces the first."""
    tensors = {
        "a": torch.randn(3, 4).t(),
        "half": torch.randn(2).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "nothing": torch.empty(0, 2),
    }
    tensors["same"] = tensors["a"]
    state = {"round": 3, "scores": [0.1, float("inf"), -1e-300], "names": {"x": None}, "on": True}
    run = Run(tmp_path / "deep" / "er", "agp", {"total": 3})
    assert run.load() is None
    run.save({"round": 1})
    run.save(state, tensors)
    saved = Run(tmp_path / "deep" / "er", "agp", {"total": 3}).load()
    assert saved is not None
    assert saved.state == state
    assert set(saved.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert saved.tensors[name].dtype == tensor.dtype
        assert torch.equal(saved.tensors[name], tensor)
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["agp.safetensors"]


def test_random_numbers_go_on_as_they_would_have(tmp_path: Path) -> None:
    """After load the three global generators draw what they drew after the save."""
    np.random.normal()  # noqa: NPY002 (leaves half of a pair of normal numbers in the generator)
    run = Run(tmp_path, "r", {})
    run.save({})
    expected = [_draws() for _ in range(3)]
    random.seed(5)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 (the generator under test)
    assert run.load() is not None
    assert [_draws() for _ in range(3)] == expected


def test_no_folder_keeps_nothing() -> None:
    """With folder None a save does nothing and a load finds nothing."""
    run = Run(None, "r", {"a": 1})
    run.save({"round": 1}, {"t": torch.ones(1)})
    assert run.load() is None
    assert run.path is None


def test_another_runs_settings_are_refused(tmp_path: Path) -> None:
    """The error names the first setting that differs, with both values; tuples and lists are the same."""
    Run(tmp_path, "r", {"seed": 1, "sparsity": 0.5, "shape": (1, 2)}).save({})
    Run(tmp_path, "r", {"seed": 1, "sparsity": 0.5, "shape": [1, 2]})
    with pytest.raises(gp.FileError, match=r"other settings: sparsity was 0\.5 and is 0\.6 now.*Give the same sparsity.*another folder"):
        Run(tmp_path, "r", {"seed": 1, "sparsity": 0.6, "shape": [3, 2]})
    with pytest.raises(gp.FileError, match=r'seed was 1 and is "missing" now'):
        Run(tmp_path, "r", {"sparsity": 0.5, "shape": [1, 2]})
    with pytest.raises(gp.FileError, match=r'more was "missing" and is true now'):
        Run(tmp_path, "r", {"seed": 1, "sparsity": 0.5, "shape": [1, 2], "more": True})
    assert Run(tmp_path, "other", {"seed": 2}).load() is None


@pytest.mark.parametrize("bad", [object(), {1: 2}, [torch.ones(1)], {"a": {2}}])
def test_values_that_are_not_plain_are_refused(tmp_path: Path, bad: Any) -> None:
    """Neither settings nor states may hold what JSON does not give back."""
    with pytest.raises(gp.ConfigError, match=r"setting 'x'.* of a run is a"):
        Run(tmp_path, "r", {"x": bad})
    with pytest.raises(gp.ConfigError, match=r"state 'x'.* of a run is a"):
        Run(tmp_path, "r", {}).save({"x": bad})
    assert plain((np.float64(0.5), np.int64(2), Path("a"), np.bool_(True)), "") == [0.5, 2, "a", True]


def test_files_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    """A damaged file, one of plain tensors, a kind that is no name, and a folder that is a file are clear errors."""
    (tmp_path / "bad.safetensors").write_bytes(b"not at all")
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(gp.FileError, match="cannot read a run"):
        Run(tmp_path, "bad", {})
    with pytest.raises(gp.FileError, match="tensors but no run"):
        Run(tmp_path, "plain", {})
    with pytest.raises(gp.ConfigError, match=r"kind of a run is '\.\./a'"):
        Run(tmp_path, "../a", {})
    with pytest.raises(gp.FileError, match="cannot make the folder"):
        Run(tmp_path / "bad.safetensors", "r", {})
    with pytest.raises(gp.FileError, match="cannot hold the tensors"):
        Run(tmp_path, "r", {}).save({}, {"sparse": torch.eye(2).to_sparse()})


def test_digest_sees_names_types_shapes_and_values() -> None:
    """Equal tensors have equal digests in any order of names; one bit, one name, one type or one shape makes another."""
    a, b = torch.arange(4.0), torch.ones(2, 2)
    first = digest({"a": a, "b": b})
    assert digest({"b": b.clone(), "a": a.clone()}) == first
    others = [{"a": a + 1e-7, "b": b}, {"c": a, "b": b}, {"a": a.double(), "b": b}, {"a": a.reshape(2, 2), "b": b}, {"b": b}]
    assert len({first, *(digest(other) for other in others)}) == 6


_SAVES = """
import os, random, signal, sys, time
import torch
from graphprune.runs.checkpoint import Run

torch.set_num_threads(1)  # a process that is forked has none of the threads that others would wait for

def forever():
    run = Run(sys.argv[1], "loop", {"seed": 1})
    saved = run.load()
    count = saved.state["count"] if saved else 0
    while True:
        count += 1
        run.save({"count": count, "twice": 2 * count}, {"ones": torch.full((200_000,), float(count)), "last": torch.tensor([count])})

def present():
    try:
        return os.stat(os.path.join(sys.argv[1], "loop.safetensors")).st_mtime_ns
    except FileNotFoundError:
        return None

chance = random.Random(3)
for _ in range(10):
    before = present()
    child = os.fork()
    if not child:
        forever()
    while present() == before:  # until it has saved, however slow the disk is
        time.sleep(0.001)
    time.sleep(chance.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = Run(sys.argv[1], "loop", {"seed": 1}).load()
    count = saved.state["count"] if saved else 0
    assert saved is None or saved.state["twice"] == 2 * count and saved.tensors["last"].item() == count
    assert saved is None or torch.equal(saved.tensors["ones"], torch.full((200_000,), float(count)))
    print(count)
"""


@FORKS
def test_kill_at_any_moment_leaves_a_complete_save(tmp_path: Path) -> None:
    """Ten processes that save in a loop are killed with SIGKILL at random moments: the file always loads, and is one whole save."""
    command = [sys.executable, "-c", _SAVES, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 10
    assert counts == sorted(set(counts))  # every process saved
    assert counts[-1] >= len(counts)
    assert [path.name for path in tmp_path.iterdir()] == ["loop.safetensors"]
