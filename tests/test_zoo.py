"""The zoo keeps what it measured, ends what takes too long, and says what misses a threshold or a requirement."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zoo

from tests.support.zoo_report import print_report
from tests.support.zoo_sources import SOURCES
from tests.support.zoo_verdicts import THRESHOLDS, by_cause, faults, generalised, holds, requirements

if TYPE_CHECKING:
    import argparse

GOOD: dict[str, Any] = {
    "name": "torchvision:resnet18",
    "dtype": "float64",
    "failures": {},
    "finished": True,
    "reach": 0.99,
    "kind": "module",
    "lifeless_outputs": 0,
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
    "lifeless_outputs": 1,
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
    assert faults({**GOOD, "ran_in": "float32", "permutation_error": 1e-6}) == []
    assert faults({**GOOD, "ran_in": "float32", "permutation_error": 1e-3}) != []


def test_engine_is_held_to_its_own_bound_only_where_it_computes_in_less() -> None:
    """A network that casts to float32 is verified to the engine's bound; permutation and reference are not."""
    assert faults({**GOOD, "tolerance": 1e-4, "error": 1e-6}) == []
    assert faults({**GOOD, "tolerance": 1e-4, "error": 1e-3}) != []
    assert faults({**GOOD, "tolerance": 1e-4, "reference_error": 1e-6}) != []
    assert faults({**GOOD, "tolerance": 1e-4, "permutation_error": 1e-6}) != []


def test_chaotic_networks_are_held_to_what_rounding_does_to_them() -> None:
    """Ten times the change that another rounding of the inputs makes is allowed, and nothing beyond; a calm network has its 1e-9."""
    assert faults({**GOOD, "rounding": 1e-8, "permutation_error": 9e-8, "reference_error": 9e-8}) == []
    assert faults({**GOOD, "rounding": 1e-8, "permutation_error": 2e-7}) != []
    assert faults({**GOOD, "rounding": 1e-14, "permutation_error": 2e-9}) != []


def test_onnx_counts_where_the_original_exports() -> None:
    """A refusal of both is no fault and leaves the share; a refusal of the shrunk network alone is one."""
    without = {name: value for name, value in GOOD.items() if name != "onnx_error"}
    both = {**without, "onnx_refused": "no", "dense_onnx_refused": "no"}
    alone = {**without, "onnx_refused": "no", "failures": {"dense ONNX": "RuntimeError: the original exports"}}
    assert faults(both) == []
    assert [cause for cause, _ in faults(alone)] == ["dense ONNX failed"]
    assert holds(alone, "verify")

    def onnx(records: list[dict[str, Any]]) -> float | None:
        return next(line.measured for line in requirements(records) if line.what.startswith("ONNX"))

    assert onnx([GOOD, both]) == 1.0
    assert onnx([GOOD, alone]) == 0.5


def test_requirements_are_those_of_the_shares() -> None:
    """Of a hundred networks of timm two may fail; of torchvision none, and the worst reach decides as well as the median."""
    good = [{**GOOD, "name": f"timm:{number}"} for number in range(98)]
    bad = [{**GOOD, "name": f"timm:x{number}", "error": 1.0} for number in range(3)]
    assert all(line.met for line in requirements([*good, *bad[:2]]))
    assert [line.what for line in requirements([*good, *bad]) if not line.met] == ["prune, verify and run"]
    low = {**GOOD, "name": "torchvision:low", "reach": 0.79}
    assert [line.what for line in requirements([GOOD, GOOD, low]) if not line.met] == ["prunable parameters, worst"]
    assert [line.what for line in requirements([GOOD, low, {**low, "reach": 0.8}]) if not line.met] == [
        "prunable parameters, median",
        "prunable parameters, worst",
    ]
    graph = {**GOOD, "name": "transformers:bert", "kind": "graph"}
    assert [(line.zoo, line.what) for line in requirements([graph]) if not line.met] == [
        ("transformers", "own class"),
        ("all", "own class"),
        ("all", "own class, keep_class where needed"),
    ]
    asked = {**graph, "own_class_error": 1e-15, "own_class_effect": 0.5}
    missed = [(line.zoo, line.what) for line in requirements([asked]) if not line.met]
    assert missed == [("transformers", "own class"), ("all", "own class")]
    wrong = {**asked, "own_class_error": 1e-3}
    assert ("all", "own class, keep_class where needed") in [(line.zoo, line.what) for line in requirements([wrong]) if not line.met]


def test_a_network_that_was_not_built_meets_nothing() -> None:
    """What was not measured does not hold, whatever the reason."""
    record = {"name": "timm:x", "dtype": "float64", "failures": {"build": "KeyError: no"}, "finished": True}
    assert not any(holds(record, share) for share in ("verify", "permute", "checks", "ONNX"))


def test_equal_causes_are_one_row() -> None:
    """Messages that differ in numbers, layers and shapes are counted together; other messages are not."""
    texts = ["TraceError: [2, 3] at layer1.0.conv departs by 1.5e-3", "TraceError: [4, 5, 6] at blocks.7.mlp.fc1 departs by 2"]
    assert generalised(texts[0]) == generalised(texts[1])
    records = [{**GOOD, "name": f"timm:{n}", "failures": {"prune": text}} for n, text in enumerate([*texts, "KeyError: 'a'"])]
    assert [(what, names) for what, _, names, _ in by_cause(records)] == [
        ("prune failed", ["timm:0", "timm:1"]),
        ("prune failed", ["timm:2"]),
    ]


def test_zoos_list_what_the_issue_names() -> None:
    """No network is listed twice, none is quantized, and every module of timm is represented once."""
    names = zoo.chosen(options())
    assert len(set(names)) == len(names)
    counts = {source: sum(name.startswith(f"{source}:") for name in names) for source in SOURCES}
    assert counts["transformers"] == 25
    assert counts["timm"] >= 98
    assert counts["torchvision"] >= 109
    assert not any("quantized" in name for name in names)


def test_names_are_found_in_the_lists() -> None:
    """A name without a zoo is looked for in all lists that were asked for; one with a zoo need not be listed."""
    assert zoo.chosen(options("--only", "resnet50", "timm:resnet50")) == ["torchvision:resnet50", "timm:resnet50"]
    assert zoo.chosen(options("--only", "inception_v3")) == ["torchvision:inception_v3", "timm:inception_v3"]
    assert zoo.chosen(options("--only", "inception_v3", "--zoo", "timm")) == ["timm:inception_v3"]
    with pytest.raises(ValueError, match="no list holds a network called 'no_such'"):
        zoo.chosen(options("--only", "no_such"))


def test_list_prints_names_and_measures_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The option gives one name per line and writes no results."""
    assert zoo.main(options("--list", "--zoo", "transformers", "--out", str(tmp_path / "zoo.json"))) == 0
    assert capsys.readouterr().out.splitlines() == zoo.chosen(options("--zoo", "transformers"))
    assert list(tmp_path.iterdir()) == []


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
    assert not print_report([GOOD, partial])
    shown = capsys.readouterr().out
    assert "vgg19" in shown
    assert "[Errno 12] no memory" in shown
    assert "1 of 2 networks meet every threshold" in shown


def test_report_names_what_is_held_back_and_what_became_a_graph(capsys: pytest.CaptureFixture[str]) -> None:
    """Networks below the least reach are named with their reasons, graphs with theirs; the requirements are the last table."""
    low = {**GOOD, "name": "timm:low", "reach": 0.5, "held_by": [["reaches an output of the model (output)", 0.4]]}
    graph = {**GOOD, "name": "timm:graph", "kind": "graph", "reason": "the forward has its own widths"}
    print_report([GOOD, low, graph])
    shown = capsys.readouterr().out
    assert "40.0% reaches an output of the model (output)" in shown
    assert "the forward has its own widths" in shown
    assert shown.index("What is required") > shown.index("What became a GraphModule")
    assert "missed" in shown
