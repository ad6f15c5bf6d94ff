"""The giant model: a slice of it is traced within bounds, and the tool's exit code follows the thresholds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import giant
import pytest

TOOL = Path(giant.__file__)
LAYERS = 3


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Returns one run of the tool on three layers of full width, and the file that it wrote."""
    file = tmp_path_factory.mktemp("giant") / "giant.json"
    command = [sys.executable, str(TOOL), "--layers", str(LAYERS), "--json", str(file), "--seconds", "60", "--gib", "2"]
    environment = {**os.environ, "GRAPHPRUNE_PYTHON_ENV": sys.prefix}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False), file  # noqa: S603


def test_layers_of_full_width_are_traced_within_bounds(outcome: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Billions of parameters take seconds, and no memory to speak of; the groups are those that the architecture has."""
    run, file = outcome
    assert run.returncode == 0, run.stderr
    assert "passes" in run.stdout
    record = json.loads(file.read_text(encoding="utf-8"))
    hidden, wide, words, shared = 8192, 28672, 128256, 1024
    block = 2 * hidden * hidden + 2 * hidden * shared + 3 * hidden * wide + 2 * hidden
    assert record["parameters"] == LAYERS * block + 2 * words * hidden + hidden
    # The stream and the rotated halves of the heads are common to all layers; each has its shared heads, head widths and wide channels.
    assert record["channels"] == hidden + 64 + LAYERS * (8 + 128 + wide)
    assert record["groups"] == 2 + 3 * LAYERS
    assert record["unknown_operators"] == []
    assert list(file.parent.iterdir()) == [file]


def test_thresholds_decide_the_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes too long or too much is said, and the exit code is 1."""
    record = {"seconds": 3.0, "peak_gib": 2.0, "groups": 7}
    monkeypatch.setattr(giant, "build", lambda *_: None)
    monkeypatch.setattr(giant, "measure", lambda *_: record)
    assert giant.main(["--seconds", "3", "--gib", "2"]) == 0
    assert "passes" in capsys.readouterr().out
    assert giant.main(["--seconds", "2", "--gib", "1"]) == 1
    assert "took 3.0 s, more than 2 s; held 2.00 GiB, more than 1 GiB" in capsys.readouterr().out
    assert giant.faults({**record, "peak_gib": None}, 3, 1) == []


@pytest.mark.parametrize("option", ["--layers", "--vocabulary", "--tokens"])
def test_options_out_of_range_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing can be built of no layers."""
    with pytest.raises(SystemExit) as caught:
        giant.parse([option, "0"])
    assert caught.value.code == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err
