"""A PyTorch that is older than promised is one line at the import of the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from graphprune.torch_version import OLDEST

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ".".join(map(str, OLDEST))
OLD = f"{OLDEST[0]}.{OLDEST[1] - 1}.1+cpu"
STAND_IN = "import sys, types; sys.modules['torch'] = types.SimpleNamespace"
SAID = f"ImportError: graphprune needs PyTorch {NEEDED} or later, and this is {OLD}; run: pip install 'torch>={NEEDED}'"


def imported(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Runs some code in a new process that finds what lies in a folder before anything else."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=path)  # noqa: S603


@pytest.mark.parametrize("code", ["import graphprune", "from graphprune.cli import main", "import graphprune.ops"])
def test_an_old_installation_is_refused(tmp_path: Path, code: str) -> None:
    """Whatever is imported of the package first: PyTorch itself is not."""
    (tmp_path / "torch-old.dist-info").mkdir()
    (tmp_path / "torch-old.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OLD}\n", encoding="utf-8")
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    done = imported(code, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == SAID


def test_a_module_that_is_imported_already_counts(tmp_path: Path) -> None:
    """The process uses that one, whatever is installed besides."""
    done = imported(f"{STAND_IN}(__version__='{OLD}'); import graphprune", tmp_path)
    assert done.stderr.splitlines()[-1] == SAID


@pytest.mark.parametrize("version", [f"{NEEDED}.0", f"{OLDEST[0]}.{OLDEST[1] + 9}.0a0+git123", f"{OLDEST[0] + 1}.0", "unknown"])
def test_what_is_recent_enough_passes(tmp_path: Path, version: str) -> None:
    """So do pre-releases, and builds that do not say what they are."""
    done = imported(
        f"import sys, types; sys.modules['torch'] = types.SimpleNamespace(__version__='{version}'); import graphprune", tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_promise_is_said_once() -> None:
    """The dependency in pyproject.toml and what the README says are the version that the package asks for."""
    assert f'"torch>={NEEDED}",' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r"PyTorch (\S+) or later", (ROOT / "README.md").read_text(encoding="utf-8")) == [NEEDED]
