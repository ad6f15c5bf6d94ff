"""The environments that the tools make: one per PyTorch and Python, with exact versions, and one line where none can be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _environment import CONSTRAINTS, ROOT, EnvironmentFailure, planned, version_of


def test_the_usual_environment_is_the_pinned_one() -> None:
    """Without options the constraints are those of the file, word for word, and the name says nothing more."""
    plan = planned("dev", "dev", (), "", "")
    assert plan.constraints() == CONSTRAINTS.read_text(encoding="utf-8")
    assert plan.folder == ROOT / ".venv-dev"
    assert plan.beside(".log") == ROOT / ".venv-dev.log"


@pytest.mark.parametrize(("torch", "vision"), [("2.6.0", "0.21.*"), ("2.14.1", "0.29.*")])
def test_another_torch_takes_along_what_is_bound_to_it(torch: str, vision: str) -> None:
    """With it comes the torchvision built for it, sympy is what it asks for, and all the rest stays pinned."""
    plan = planned("dev", "dev", (), torch, "")
    assert plan.folder.name == f".venv-dev-torch-{torch}"
    assert plan.beside(".log").name == f".venv-dev-torch-{torch}.log"
    usual, lines = (set(text.splitlines()) for text in (CONSTRAINTS.read_text(encoding="utf-8"), plan.constraints()))
    assert lines - usual == {f"torch=={torch}", f"torchvision=={vision}"}
    assert {line.partition("==")[0] for line in usual - lines} == {"torch", "torchvision", "sympy"}
    assert plan.digest() != planned("dev", "dev", (), "2.9.0", "").digest()


def test_another_python_is_named_by_its_version() -> None:
    """A path and a command that mean one version share an environment."""
    version = ".".join(map(str, version_of(sys.executable)))
    plan = planned("dev", "dev", (), "2.6.0", sys.executable)
    assert plan.folder.name == f".venv-dev-torch-2.6.0-python-{version}"


def test_what_is_no_version_and_what_is_no_python(tmp_path: Path) -> None:
    """Both are refused before anything is made."""
    with pytest.raises(EnvironmentFailure, match=r"newest is no version of PyTorch; write one such as 2\.6\.0"):
        planned("dev", "dev", (), "newest", "")
    with pytest.raises(EnvironmentFailure, match="none is no Python"):
        version_of(str(tmp_path / "none"))


def test_an_environment_that_is_given_and_one_that_is_to_be_made(tmp_path: Path) -> None:
    """They contradict each other: one line, exit code 2, nothing made."""
    environment = {**os.environ, "GRAPHPRUNE_PYTHON_ENV": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tools" / "test.py"), "--torch", "2.6.0.dev1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    assert (done.returncode, done.stderr) == (2, "error: 2.6.0.dev1 is no version of PyTorch; write one such as 2.6.0.\n")
    command[-1] = "2.6.7"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    assert (done.returncode, done.stderr.partition(", and ")[0]) == (2, "error: --torch makes an environment")
    assert done.stderr.count("\n") == 1
