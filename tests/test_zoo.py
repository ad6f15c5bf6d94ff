"""The zoo keeps what it measured, ends what takes too long, and says what misses a threshold."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zoo

from tests.support.zoo_report import THRESHOLDS, faults, print_report

if TYPE_CHECKING:
    import argparse

GOOD: dict[str, Any] = {
    "name": "torchvision:resnet18",
    "dtype": "float64",
    "failures": {},
    "finished": True,
    "unknown": [],
    "off_target": [],
    "coverage_faults": 0,
    "control": 0.5,
    "permutation_error": 1e-15,
    "error": 1e-14,
    "effect": 0.5,
    "reference_error": 1e-14,
    "shape_kept": True,
    "train_ok": True,
    "onnx_error": 1e-6,
}
BAD = {
    "unknown": ["aten::hardswish_"],
    "off_target": ["conv1"],
    "coverage_faults": 1,
    "permutation_error": 1e-9,
    "control": 1e-3,
    "error": 1e-9,
    "effect": 1e-3,
    "reference_error": 1e-9,
    "shape_kept": False,
    "train_ok": False,
    "onnx_error": 1e-3,
}


def options(*arguments: str) -> argparse.Namespace:
    """Returns parsed options."""
    return zoo.parse(list(arguments))


def test_good_record_has_no_faults() -> None:
    """A record within all thresholds has no fault."""
    assert faults(GOOD) == []


@pytest.mark.parametrize("key", [key for key, *_ in THRESHOLDS])
def test_each_threshold_bites(key: str) -> None:
    """A value at or beyond its threshold is a fault, and so is one that nobody measured."""
    cause = next(cause for name, _, _, cause in THRESHOLDS if name == key)
    assert [found for found, _ in faults({**GOOD, key: BAD[key]})] == [cause]
    assert faults({name: value for name, value in GOOD.items() if name != key}) == [(cause, "not measured")]


def test_failed_measurement_is_the_fault_of_what_it_left_out() -> None:
    """A failure is reported once, by its measurement and last line."""
    record = {**GOOD, "failures": {"trace": "TraceError: no"}}
    del record["permutation_error"]
    assert faults(record) == [("trace failed", "TraceError: no")]


def test_float32_is_held_to_its_own_bound() -> None:
    """Errors of float32 size pass in float32, and fail in float64."""
    assert faults({**GOOD, "dtype": "float32", "error": 1e-6}) == []
    assert faults({**GOOD, "dtype": "float32", "error": 1e-2}) != []


def test_time_limit_ends_the_whole_process_group() -> None:
    """A process whose own child keeps running is ended with it, and the limit is given as the reason."""
    child = "import time; time.sleep(60)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    start = time.monotonic()
    _, complaint = zoo.Runner(options("--limit", "1")).communicate(command)
    # The child holds the same pipe: had it survived, reading would have lasted a minute.
    assert time.monotonic() - start < 30
    assert complaint == "time limit of 1 s"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("print('fine')", ""),
        ("import sys; sys.exit('bad thing')", "bad thing"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.abort()", "ended by SIGABRT"),
    ],
)
def test_reason_of_an_early_end(code: str, complaint: str) -> None:
    """The complaint is empty for a good end, else the last line of stderr, the exit code or the signal."""
    assert zoo.Runner(options()).communicate([sys.executable, "-c", code])[1] == complaint


def test_results_are_kept_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished networks are skipped for the same settings only, failing ones are measured again on request."""
    measured: list[str] = []

    def run(self: zoo.Runner, name: str) -> dict[str, Any]:
        del self
        measured.append(name)
        settings = zoo.settings_of(current, name)
        return {**GOOD, **settings, "wall_seconds": 0.0, "error": 1.0 if name.endswith("alexnet") else 0.0}

    monkeypatch.setattr(zoo.Runner, "run", run)
    out = str(tmp_path / "zoo.json")
    names = ["--only", "resnet18", "alexnet", "--out", out]

    current = options(*names)
    assert zoo.main(current) == 1
    assert measured == ["torchvision:resnet18", "torchvision:alexnet"]
    assert [json.loads(line)["name"] for line in Path(out).read_text(encoding="utf-8").splitlines()] == measured

    measured.clear()
    assert zoo.main(current) == 1
    assert measured == []
    current = options(*names, "--retry")
    assert zoo.main(current) == 1
    assert measured == ["torchvision:alexnet"]
    current = options("--only", "resnet18", "--out", out, "--sparsity", "0.25")
    assert zoo.main(current) == 0
    assert measured == ["torchvision:alexnet", "torchvision:resnet18"]
    assert list(tmp_path.iterdir()) == [Path(out)]


def test_unusable_results_file_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of something else stays as it is; a missing folder is named; both exit with code 2."""
    other = tmp_path / "notes.txt"
    other.write_text("notes", encoding="utf-8")
    assert zoo.main(options("--out", str(other))) == 2
    assert "is no results file" in capsys.readouterr().out
    assert other.read_text(encoding="utf-8") == "notes"
    assert zoo.main(options("--out", str(tmp_path / "missing" / "zoo.json"))) == 2
    assert "cannot write" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--sparsity", "1"], ["--jobs", "0"], ["--limit", "0"], ["--dtype", "int8"]])
def test_options_out_of_range_are_refused(arguments: list[str]) -> None:
    """Options that make no sense exit with code 2."""
    with pytest.raises(SystemExit, match="2"):
        options(*arguments)


def test_report_shows_partial_records(capsys: pytest.CaptureFixture[str]) -> None:
    """A record of a process that ended at once is printed like any other, with its cause."""
    partial = {"name": "torchvision:vgg19", "dtype": "float64", "failures": {"start": "[Errno 12] no memory"}, "finished": False}
    print_report([GOOD, partial])
    shown = capsys.readouterr().out
    assert "vgg19" in shown
    assert "[Errno 12] no memory" in shown
    assert "1 of 2 networks meet every threshold" in shown
