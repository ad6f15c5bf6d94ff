"""Latency is judged by ratios that were measured in turns; what is wrong with the request is said before anything is timed.

No test looks at an absolute time.
"""

from __future__ import annotations

import gc
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from rich.console import Console

import graphprune.latency as latency_module
from graphprune.errors import ConfigError, FileError, GraphPruneError, InputError
from graphprune.latency import LatencyReport, measure_latency
from graphprune.latency.sessions import load
from graphprune.latency.statistics import ratio_interval, summary


def write_products(path: Path, *, count: int, shape: tuple[int | str | None, ...] = ("batch", 128)) -> Path:
    """Writes a model that multiplies its input "x" with a square matrix `count` times."""
    width = 128
    matrix = (np.eye(width) * 0.9).astype(np.float32)
    nodes = [helper.make_node("MatMul", [f"h{number}" if number else "x", "w"], [f"h{number + 1}"]) for number in range(count)]
    nodes += [helper.make_node("Identity", [f"h{count}"], ["y"])]
    ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y"))
    return write_graph(path, nodes, next(ends), next(ends), [onnx.numpy_helper.from_array(matrix, "w")])


def write_graph(
    path: Path, nodes: list[onnx.NodeProto], x: onnx.ValueInfoProto, y: onnx.ValueInfoProto, weights: list[onnx.TensorProto]
) -> Path:
    """Writes a model of one input and one output."""
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model of one product."""
    return write_products(tmp_path / "small.onnx", count=1)


def quick(models: dict[str, Path], **options: Any) -> LatencyReport:
    """Measures a few rounds."""
    return measure_latency(models, **{"rounds": 6, "warmup": 1, **options})


def test_summary_follows_the_formulas() -> None:
    """Of 1 to 11, the median is 6, the 90 % quantile 10, and the middle half reaches from 3.5 to 8.5; order is no matter."""
    assert summary(np.random.default_rng(0).permutation(np.arange(1.0, 12.0))) == (6.0, 10.0, 5.0)


def test_interval_of_constant_times_is_their_ratio() -> None:
    """Without noise there is nothing to be unsure of: 6 ms over 2 ms is 3."""
    assert ratio_interval(np.full(9, 6.0), np.full(9, 2.0), 0) == (3.0, 3.0)


def test_interval_is_paired() -> None:
    """Noise that hits both models in a round cancels; without pairing, the interval would be as wide as the noise."""
    noise = np.exp(np.random.default_rng(0).normal(size=40))
    low, high = ratio_interval(noise, 4 * noise, 0)
    assert low == pytest.approx(0.25, rel=1e-12)
    assert high == pytest.approx(0.25, rel=1e-12)
    low, high = ratio_interval(noise, 4 * np.random.default_rng(1).permutation(noise), 0)
    assert high - low > 0.02


def test_interval_covers_the_true_ratio() -> None:
    """About 95 of 100 intervals contain the ratio of the true medians, and few would contain one that is half as large again."""
    generator = np.random.default_rng(0)
    hits, misses = 0, 0
    for seed in range(100):
        reference, own = np.exp(generator.normal(0.7, 0.2, size=40)), np.exp(generator.normal(0.0, 0.2, size=40))
        low, high = ratio_interval(reference, own, seed)
        hits += low <= np.exp(0.7) <= high
        misses += low <= 1.5 * np.exp(0.7) <= high
    assert 88 <= hits <= 100
    assert misses == 0


class FakeModel:
    """Notes when it runs instead of doing anything."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def run(self) -> None:
        """Notes the name."""
        self.log.append(self.name)


def test_models_take_turns_in_random_order() -> None:
    """Every round runs every model once, warm-up included; orders vary, and warm-up rounds are not among the times."""
    log: list[str] = []
    models: Any = [FakeModel(name, log) for name in "abc"]
    times = latency_module._timed(models, warmup=4, rounds=20, seconds=60.0, generator=np.random.default_rng(0))  # noqa: SLF001
    rounds = ["".join(log[start : start + 3]) for start in range(0, len(log), 3)]
    assert times.shape == (3, 20)
    assert len(rounds) == 24
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len(set(rounds)) == 6


def test_time_limit_ends_the_rounds_but_leaves_five() -> None:
    """However short the time, five rounds are done, fewer only if fewer were asked for."""
    models: Any = [FakeModel("a", [])]
    shapes = [
        latency_module._timed(models, warmup=0, rounds=rounds, seconds=1e-9, generator=np.random.default_rng(0)).shape  # noqa: SLF001
        for rounds in (1000, 3)
    ]
    assert shapes == [(1, 5), (1, 3)]


def test_garbage_collection_comes_back_after_an_error() -> None:
    """A model that fails in the middle does not leave the collector off."""

    class Broken:
        """Fails when run."""

        def run(self) -> None:
            """Fails, and shows that the collector is off."""
            assert not gc.isenabled()
            raise RuntimeError

    models: Any = [Broken()]
    with pytest.raises(RuntimeError):
        latency_module._timed(models, warmup=0, rounds=1, seconds=1.0, generator=np.random.default_rng(0))  # noqa: SLF001
    assert gc.isenabled()


def test_a_model_is_as_fast_as_itself(small: Path) -> None:
    """The interval of a model against a second copy of itself reaches about 1."""
    row = measure_latency({"one": small, "two": small}, rounds=60, batch=64)["two"]
    assert row.ratio_low < 1.25
    assert row.ratio_high > 0.8


def test_more_work_is_slower(small: Path, tmp_path: Path) -> None:
    """Sixteen times the products take clearly longer, whichever model the ratios refer to."""
    large = write_products(tmp_path / "large.onnx", count=16)
    report = measure_latency({"small": small, "large": large}, rounds=30, batch=64, warmup=5)
    assert report["large"].ratio_high < 0.5
    reverse = measure_latency({"small": small, "large": large}, rounds=30, batch=64, warmup=5, baseline="large")
    assert reverse["small"].ratio_low > 2
    assert reverse["large"].ratio == reverse["large"].ratio_low == reverse["large"].ratio_high == 1.0


def test_report_states_the_conditions(small: Path) -> None:
    """The report says what was run how often under which conditions, as plain JSON and as a table."""
    report = quick({"dense": small, "pruned": small}, batch=3, threads=2, optimization="basic", seed=7)
    facts = json.loads(json.dumps(report.to_dict()))
    expected = {"baseline": "dense", "batch": 3, "threads": 2, "optimization": "basic", "warmup": 1, "seed": 7}
    assert expected.items() <= facts.items()
    assert facts["onnxruntime"] == onnxruntime.__version__
    assert [(row["name"], row["runs"], row["shapes"]) for row in facts["rows"]] == [
        (name, 6, {"x": [3, 128]}) for name in ("dense", "pruned")
    ]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    text = " ".join(console.export_text().split())
    assert all(words in text for words in ("dense", "pruned", "batch 3", "2 threads", "'basic'", onnxruntime.__version__, "6 rounds"))


def test_sessions_get_the_options(small: Path) -> None:
    """Threads and graph-optimisation level reach ONNX Runtime."""
    (model,) = load({"m": small}, {}, batch=1, threads=2, optimization="extended", seed=0)
    options = model.session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL


def test_random_inputs_repeat_and_fit_their_types(tmp_path: Path) -> None:
    """Made-up integers are valid indices of a table of two rows, all models get the same, and another seed gives others."""
    table = onnx.numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    x = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 50])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 50, 3])
    path = write_graph(tmp_path / "ids.onnx", [helper.make_node("Gather", ["w", "ids"], ["y"])], x, y, [table])
    one, two = load({"a": path, "b": path}, {}, batch=4, threads=1, optimization="all", seed=0)
    (other,) = load({"a": path}, {}, batch=4, threads=1, optimization="all", seed=1)
    assert one.feeds["ids"].shape == (4, 50)
    assert set(one.feeds["ids"].ravel().tolist()) == {0, 1}
    assert np.array_equal(one.feeds["ids"], two.feeds["ids"])
    assert not np.array_equal(one.feeds["ids"], other.feeds["ids"])


def test_given_inputs_are_used_in_the_models_precision(small: Path) -> None:
    """Lists, doubles and tensors of the user's replace random values, and set the batch that is reported."""
    for value in (np.ones((5, 128)), torch.ones(5, 128), [[1] * 128] * 5):
        (model,) = load({"m": small}, {"x": np.asarray(value, float)}, batch=1, threads=1, optimization="all", seed=0)
        assert model.feeds["x"].dtype == np.float32
        assert model.feeds["x"].sum() == 640
    assert quick({"m": small}, inputs={"x": torch.ones(5, 128)}).batch == 5


def test_named_batch_dimension_is_filled_anywhere(tmp_path: Path) -> None:
    """A dimension called "batch" follows the batch even if it is not the first."""
    path = write_products(tmp_path / "m.onnx", count=1, shape=(2, "batch", 128))
    assert quick({"m": path}, batch=2)["m"].shapes == {"x": (2, 2, 128)}


def refused(models: Any, **options: Any) -> GraphPruneError:
    """Returns the error with which a measurement is refused."""
    with pytest.raises(GraphPruneError) as caught:
        measure_latency(models, **options)
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimization": "al"}, "did you mean 'all'"),
        ({"baseline": "smal"}, "did you mean 'small'"),
        ({"threads": 0}, "threads is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seconds": 0.0}, "seconds is 0.0"),
    ],
)
def test_unusable_options_are_refused(small: Path, options: dict[str, Any], words: str) -> None:
    """An option that makes no sense is named with its value, or with what was probably meant."""
    error = refused({"small": small}, **options)
    assert isinstance(error, ConfigError)
    assert words in str(error)


@pytest.mark.parametrize("models", [{}, [], ["a.onnx"]])
def test_no_models_are_refused(models: Any) -> None:
    """Nothing to time, or a list without names, is an error that shows the form."""
    assert isinstance(error := refused(models), ConfigError)
    assert '{"dense": "dense.onnx"}' in error.fix


def test_missing_and_foreign_files_are_refused(small: Path, tmp_path: Path) -> None:
    """A file that is not there, a folder, and a file that is no ONNX are named together with the model."""
    (tmp_path / "notes.onnx").write_text("not a model")
    for name in ("absent.onnx", ".", "notes.onnx"):
        error = refused({"good": small, "bad": tmp_path / name})
        assert isinstance(error, FileError)
        assert "'bad'" in error.what
        assert str(tmp_path / name) in error.what


def test_inputs_that_do_not_fit_are_refused(small: Path, tmp_path: Path) -> None:
    """Unknown names, wrong shapes, open dimensions, fixed batches and odd types are input errors that say what to pass."""
    fixed = write_products(tmp_path / "fixed.onnx", count=1, shape=(2, 128))
    open_width = write_products(tmp_path / "open.onnx", count=1, shape=("batch", None, 128))
    ends = [helper.make_tensor_value_info(name, TensorProto.STRING, ["batch"]) for name in ("x", "y")]
    text = write_graph(tmp_path / "text.onnx", [helper.make_node("Identity", ["x"], ["y"])], ends[0], ends[1], [])
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (small, {"inputs": {"xx": np.zeros((1, 128))}}, "did you mean 'x'"),
        (small, {"inputs": {"x": np.zeros((1, 7))}}, "x [1, 7] float32"),
        (small, {"inputs": {"x": torch.zeros(1, 128, requires_grad=True)}}, "without gradient"),
        (fixed, {}, "Pass batch=2"),
        (open_width, {}, "dimension 1 of input 'x'"),
        (text, {}, "tensor(string)"),
    ]
    for path, options, words in cases:
        error = refused({"model": path}, **options)
        assert isinstance(error, InputError), words
        assert words in str(error)
    assert quick({"model": open_width}, inputs={"x": np.zeros((1, 4, 128))})["model"].shapes == {"x": (1, 4, 128)}
    assert quick({"model": fixed}, batch=2).batch == 2
