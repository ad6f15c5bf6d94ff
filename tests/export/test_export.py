"""An exported file computes what the model computes, at any batch size; the model and the folder are as they were if it cannot."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import operator
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphprune.errors import ConfigError, ExportError, FileError, GraphPruneError, InputError
from graphprune.export import export_onnx, writers
from graphprune.export.job import jobs
from graphprune.export.proof import relative_error
from graphprune.trace.inputs import normalise
from tests.support.untouched import changes, snapshot
from tests.support.versions import since

EXPORTERS = ("torchscript", "dynamo")
aten = torch.ops.aten


def exporters(version: tuple[int, int], why: str) -> list[Any]:
    """Returns both exporters, "dynamo" to be skipped before a release of PyTorch."""
    return ["torchscript", pytest.param("dynamo", marks=since(version, why))]


class Function(nn.Module):
    """A function of one tensor with two linear layers at hand."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.one = nn.Linear(8, 4)
        self.two = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        """Returns the function's result."""
        return self.function(self, x)


class Remembering(nn.Module):
    """Keeps a cache, counts its runs in a buffer and as an attribute, and draws random numbers."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.cache: dict[str, Tensor] = {}
        self.runs = 0
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns normalised features."""
        self.runs += 1
        self.counter.add_(1)
        torch.rand(1)
        if "bias" not in self.cache:
            self.cache["bias"] = self.conv.weight.mean()
        return F.relu(self.norm(self.conv(x))) + self.cache["bias"]


def convolutional() -> nn.Sequential:
    """Returns a small network with statistics that are not those of a fresh one."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    network(torch.randn(16, 3, 8, 8))
    return network


def compute(path: Path, *inputs: Tensor) -> list[np.ndarray[Any, Any]]:
    """Returns the outputs of ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    outputs: list[np.ndarray[Any, Any]] = session.run(None, dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True)))
    return outputs


def batch_dimensions(path: Path) -> list[int | str]:
    """Returns dimension 0 of every input that has one, a name where it is free."""
    shapes = [value.type.tensor_type.shape for value in onnx.load(path, load_external_data=False).graph.input]
    return [shape.dim[0].dim_param or shape.dim[0].dim_value for shape in shapes if shape.dim]


@pytest.mark.parametrize("exporter", exporters((2, 7), "its dynamo exporter cannot write a batch norm with today's onnxscript"))
@pytest.mark.parametrize("batch", [1, 3])
def test_file_reproduces_the_model_at_any_batch(tmp_path: Path, exporter: str, batch: int) -> None:
    """Whatever the batch of the example inputs, even 1, the file agrees with the model in eval mode at other sizes and values."""
    network = convolutional()
    report = export_onnx(network, torch.randn(batch, 3, 8, 8), tmp_path / "net.onnx", exporter=exporter)
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 8, 8)
        with torch.no_grad():
            expected = network.eval()(x).numpy()
        (actual,) = compute(report.path, x)
        assert relative_error(expected, actual) < 1e-5
    assert batch_dimensions(report.path) == ["batch"]
    assert report.dynamic_batch
    assert report.error is not None
    assert report.error < 1e-5


def test_report_tells_what_is_in_the_file(tmp_path: Path) -> None:
    """Names, sizes, operator set and exporter of the report are those of the file; it turns into JSON."""
    report = export_onnx(convolutional(), torch.randn(2, 3, 8, 8), str(tmp_path / "net.onnx"))
    proto = onnx.load(report.path)
    facts = json.loads(json.dumps(report.to_dict()))
    assert facts["path"] == str(tmp_path / "net.onnx")
    assert facts["bytes"] == report.path.stat().st_size
    assert facts["nodes"] == len(proto.graph.node)
    assert facts["opset"] == proto.opset_import[0].version
    assert (report.inputs, report.outputs) == (("input",), ("output",))
    assert (report.exporter, report.notes) == ("torchscript", ())
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("exporter", exporters((2, 8), "torch.export refuses a module that puts a tensor into a dict of its own"))
def test_model_and_random_numbers_stay_as_they_were(tmp_path: Path, exporter: str) -> None:
    """A model in training mode that writes to itself in every run shows no trace of an export: flags, statistics, caches, numbers."""
    model = Remembering()
    model.norm.eval()
    x = torch.randn(2, 3, 8, 8)
    before = snapshot(model)
    report = export_onnx(model, x, tmp_path / "net.onnx", exporter=exporter)
    assert changes(before, snapshot(model)) == []
    assert model.cache == {}
    assert report.dynamic_batch
    model(x)
    assert len(changes(before, snapshot(model))) > 2, "the model does not change when it runs, so this test shows nothing"


@dataclasses.dataclass
class Output:
    """A result with fields, of which one is nested and one is no tensor."""

    logits: Tensor
    features: list[Tensor]
    label: str = "none"


class Nested(nn.Module):
    """Takes tensors in containers and by keyword; the name of its input is also the name of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor, more: dict[str, Any], *, scale: Tensor, mode: str = "double") -> Output:
        """Returns a mixture of all inputs."""
        logits = F.linear(x, self.x) * scale * (2 if mode == "double" else 1)
        return Output(logits, [logits + more["bias"][0], x - more["bias"][1]])


@pytest.mark.parametrize("exporter", exporters((2, 7), "its dynamo exporter gives dimensions other names than it is told"))
def test_nested_inputs_and_outputs_become_flat(tmp_path: Path, exporter: str) -> None:
    """Tensors in dicts and lists are inputs with the path for a name, those in a dataclass are outputs; the rest is constant."""
    model = Nested()

    def tensors(size: int) -> list[Tensor]:
        return [torch.randn(size, 8), torch.randn(size, 4), torch.randn(size, 1), torch.tensor(1.5)]

    x, bias, other, scale = tensors(2)
    example = ((x, {"bias": [bias, other]}), {"scale": scale, "mode": "single"})
    report = export_onnx(model, example, tmp_path / "net.onnx", exporter=exporter)
    assert report.inputs == ("x_", "more_bias_0", "more_bias_1", "scale")
    assert report.outputs == ("logits", "features_0", "features_1")
    assert batch_dimensions(report.path) == ["batch"] * 3
    x, bias, other, scale = tensors(5)
    with torch.no_grad():
        expected = model(x, {"bias": [bias, other]}, scale=scale, mode="single")
    for one, two in zip([expected.logits, *expected.features], compute(report.path, x, bias, other, scale), strict=True):
        assert relative_error(one.numpy(), two) < 1e-5


def test_keywords_and_tuples_of_results(tmp_path: Path) -> None:
    """Keyword inputs keep their names, results in a tuple are numbered; a result may be given twice or be an input."""

    class Pair(nn.Module):
        """Takes two tensors and gives one of them back."""

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            """Returns b and, twice, the difference."""
            difference = a - b
            return b, difference, difference

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    report = export_onnx(Pair(), {"b": b, "a": a}, tmp_path / "net.onnx")
    assert report.inputs == ("b", "a")
    assert report.outputs == ("output_0", "output_1", "output_2")
    assert [np.array_equal(one, two) for one, two in zip(compute(report.path, b, a), (b, a - b, a - b), strict=True)] == [True] * 3


def flattening_graph() -> fx.GraphModule:
    """Returns a module of ATen operators that asks for its batch size and reshapes with it."""
    graph = fx.Graph()
    x, weight, bias = graph.placeholder("x"), graph.get_attr("conv.weight"), graph.get_attr("conv.bias")
    conv = graph.call_function(aten.conv2d.default, (x, weight, bias, [1, 1], [1, 1]))
    batch = graph.call_function(aten.sym_size.int, (conv, 0))
    rows = graph.call_function(operator.mul, (batch, 2))
    halves = graph.call_function(aten.reshape.default, (conv, [rows, -1]))
    whole = graph.call_function(aten.view.default, (halves, [batch, 4 * 64]))
    parts = graph.call_function(aten.split.Tensor, (whole, 100, 1))
    graph.output(graph.call_function(operator.getitem, (parts, 0)))
    root = nn.Module()
    root.conv = nn.Conv2d(3, 4, 3)
    return fx.GraphModule(root, graph)


def test_graph_of_aten_operators_keeps_its_dynamic_batch(tmp_path: Path) -> None:
    """Sizes that a rewritten graph computes from the batch stay free; the recording, which fixes them, is found out and dropped."""
    module = flattening_graph()
    report = export_onnx(module, torch.randn(1, 3, 8, 8), tmp_path / "net.onnx")
    x = torch.randn(7, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(module(x).numpy(), compute(report.path, x)[0]) < 1e-5
    assert (report.exporter, report.dynamic_batch) == ("dynamo", True)
    assert len(report.notes) == 1
    assert report.notes[0].startswith("torchscript with a dynamic batch: ONNX Runtime")


def test_value_that_python_sees_is_not_baked_in(tmp_path: Path) -> None:
    """A number taken out of a tensor would be a constant in a recording; the other exporter keeps it a number of the input's."""
    model = Function(lambda _, x: x * x.max().item())
    report = export_onnx(model, torch.rand(2, 8), tmp_path / "net.onnx")
    x = torch.rand(2, 8) * 10
    assert relative_error(model(x).numpy(), compute(report.path, x)[0]) < 1e-5
    assert report.exporter == "dynamo"
    assert "Python looked at a value while the run was recorded, at test_export.py:" in report.notes[0]


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_check_finds_a_baked_value_out(tmp_path: Path, dynamic_batch: bool) -> None:
    """Alone, the recording of such a value is refused, for it is checked on inputs of another largest value too."""
    model = Function(lambda _, x: x * x.max().item())
    error = refused(tmp_path / "net.onnx", model, torch.rand(2, 8), exporter="torchscript", dynamic_batch=dynamic_batch)
    assert f"another 'output' than the model, shape [{3 if dynamic_batch else 2}, 8]: relative error 0.1" in error.what
    report = export_onnx(model, torch.rand(2, 8), tmp_path / "net.onnx", exporter="torchscript", check=False)
    assert report.notes[0].startswith("Python looked at values that are constants in the file, 1 in all, the first at test_export.py:")


def test_recorded_branch_is_reported(tmp_path: Path) -> None:
    """A branch on values cannot be exported; the recorded one is written for want of anything better, and the notes say so."""
    model = Function(lambda own, x: own.one(x) if x.sum() > -1e9 else own.two(x))
    report = export_onnx(model, torch.randn(2, 8), tmp_path / "net.onnx")
    assert report.exporter == "torchscript"
    assert len(report.notes) == 3
    assert "dynamo with a dynamic batch" in report.notes[1]
    assert "1 in all, the first at test_export.py:" in report.notes[2]


def test_batch_that_the_model_fixes_is_reported(tmp_path: Path) -> None:
    """A model for pairs is exported for a batch of 2, with the model's own reason."""
    report = export_onnx(Function(lambda own, x: own.one(x).view(2, 2, 2)), torch.randn(2, 8), tmp_path / "net.onnx")
    assert not report.dynamic_batch
    assert batch_dimensions(report.path) == [2]
    assert "the model itself refuses a batch of 3" in report.notes[0]
    assert report.notes[-1] == "the batch is fixed at that of the example inputs"


def test_batch_that_an_exporter_fixes_is_reported(tmp_path: Path) -> None:
    """A loop over the samples is unrolled by the recording: it is written with a fixed batch, and the notes say so."""
    model = Function(lambda own, x: torch.stack([own.one(x[number]) for number in range(len(x))]))
    report = export_onnx(model, torch.randn(2, 8), tmp_path / "net.onnx", exporter="torchscript")
    assert batch_dimensions(report.path) == [2]
    assert "[2, 4] instead of [3, 4]" in report.notes[0]
    assert report.notes[-1] == "the batch is fixed at that of the example inputs"


def test_fixed_batch_on_request(tmp_path: Path) -> None:
    """Without a dynamic batch, the file has the sizes of the example inputs, and there is nothing to note."""
    report = export_onnx(convolutional(), torch.randn(4, 3, 8, 8), tmp_path / "net.onnx", dynamic_batch=False)
    assert batch_dimensions(report.path) == [4]
    assert (report.dynamic_batch, report.notes) == (False, ())


def test_inputs_without_batch_dimension(tmp_path: Path) -> None:
    """A model of scalars has no batch to leave free."""
    report = export_onnx(Function(lambda own, x: own.one(x.expand(8))), torch.tensor(0.5), tmp_path / "net.onnx")
    assert report.notes == ("no input has a batch dimension", "the batch is fixed at that of the example inputs")


def test_fused_attention_is_avoided(tmp_path: Path) -> None:
    """Attention that takes an operator unknown to ONNX in inference is exported by the recording; PyTorch's switch is put back."""
    model = Function(lambda own, x: own.attention(x, x, x, need_weights=False)[0])
    model.attention = nn.MultiheadAttention(8, 2, batch_first=True)
    report = export_onnx(model, torch.randn(2, 5, 8), tmp_path / "net.onnx", exporter="torchscript")
    assert report.dynamic_batch
    assert torch.backends.mha.get_fastpath_enabled()


def test_single_sample_is_recorded_as_two() -> None:
    """A batch of 1 would be taken for a constant: the job has two samples to record, and one and three to compare."""
    x = torch.randn(1, 3, 8, 8)
    dynamic, fixed = jobs(convolutional(), normalise(x), [], opset=None, check=True, dynamic_batch=True)
    assert [len(tensor) for tensor in dynamic.inputs.values()] == [2]
    assert [len(run.inputs["input"]) for run in dynamic.runs] == [1, 3]
    assert [len(run.inputs["input"]) for run in fixed.runs] == [1, 1]
    assert dynamic.free == {"input": {0: "batch"}, "output": {0: "batch"}}
    samples = dynamic.runs[1].inputs["input"]
    assert len({tuple(sample.flatten().tolist()) for sample in samples}) == 3, "equal samples could stand in for each other"


@pytest.mark.parametrize(
    ("expected", "actual", "error"),
    [
        ([4.0, -8.0], [4.0, -6.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([math.inf, math.nan, 2.0], [math.inf, math.nan, 1.0], 0.5),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([math.nan], [0.0], math.inf),
        ([1.0, 2.0], [[1.0, 2.0]], math.inf),
        ([True, False], [True, True], 1.0),
        ([3 + 4j], [3 + 0j], 0.8),
        ([], [], 0.0),
    ],
)
def test_relative_error(expected: list[Any], actual: list[Any], error: float) -> None:
    """max|a - b| / max|a| over finite values; equal infinities and NaNs are equal, other shapes infinitely far."""
    assert relative_error(np.array(expected), np.array(actual)) == error


def refused(path: Path, model: nn.Module, inputs: Any, **options: Any) -> GraphPruneError:
    """Returns the error of an export that must fail, on one line, leaving an older file and its folder alone."""
    older = path.is_file()
    if older:
        path.write_bytes(b"older")
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    state = snapshot(model)
    with pytest.raises(GraphPruneError) as caught:
        export_onnx(model, inputs, path, **options)
    assert changes(state, snapshot(model)) == []
    assert before == (sorted(path.parent.iterdir()) if path.parent.is_dir() else [])
    assert not older or path.read_bytes() == b"older"
    assert caught.value.fix
    assert "\n" not in str(caught.value)
    return caught.value


def test_disagreement_is_an_error_that_names_the_output(tmp_path: Path) -> None:
    """A model whose result is random cannot be reproduced; no exporter's file is kept, and an older one stays."""
    (tmp_path / "net.onnx").touch()
    model = Function(lambda own, x: {"stable": own.one(x), "noisy": F.dropout(own.two(x), 0.5, training=True)})
    error = refused(tmp_path / "net.onnx", model, torch.randn(2, 8))
    assert isinstance(error, ExportError)
    assert "another 'noisy' than the model" in error.what
    assert "tolerance" in error.fix


def test_tolerance_is_what_counts(tmp_path: Path) -> None:
    """What passes at the usual tolerance fails at one below rounding errors."""
    network, x = convolutional(), torch.randn(2, 3, 8, 8)
    report = export_onnx(network, x, tmp_path / "net.onnx")
    assert report.error
    error = refused(tmp_path / "net.onnx", network, x, tolerance=report.error / 100, exporter="torchscript")
    assert f"above the tolerance of {report.error / 100:g}" in error.what


def test_unchecked_file_comes_from_the_exporter_that_cannot_bake_values(tmp_path: Path) -> None:
    """Without a check nothing is compared, so that even a random model is written, and the recording is not the first choice."""
    model = Function(lambda _, x: F.dropout(x, 0.5, training=True))
    report = export_onnx(model, torch.randn(2, 8), tmp_path / "net.onnx", check=False)
    assert (report.error, report.exporter, report.dynamic_batch) == (None, "dynamo", True)
    assert compute(report.path, torch.ones(3, 8))[0].shape == (3, 8)


def test_missing_operator_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An operator that ONNX lacks is named in one line, and nothing else reaches the console."""
    error = refused(tmp_path / "net.onnx", Function(lambda _, x: torch.diff(x)), torch.randn(2, 8), exporter="torchscript")
    assert "aten::diff" in error.what
    assert capfd.readouterr() == ("", "")


@since((2, 8), "its dynamo exporter records one run where torch.export fails, instead of failing")
def test_exporters_do_not_talk(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Neither a failing exporter's graph nor a log record reaches the console, and warnings of the model's own stay inside."""

    def branch(own: Any, x: Tensor) -> Any:
        torch.nn.functional.softmax(x)  # warns that it guesses a dimension
        return own.one(x) if x.sum() > 0 else own.two(x)

    error = refused(tmp_path / "net.onnx", Function(branch), torch.randn(2, 8), exporter="dynamo")
    assert "data-dependent" in error.what
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []  # torch traces itself, for no console


def test_type_that_the_runtime_lacks_is_explained(tmp_path: Path) -> None:
    """A convolution in double precision is valid ONNX that ONNX Runtime cannot run: the fix is to convert, or not to check."""
    model, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 8, 8).double()
    error = refused(tmp_path / "net.onnx", model, x, exporter="torchscript")
    assert error.what.startswith("Conv2d cannot be exported to ONNX: ONNX Runtime cannot run it: Could not find an implementation")
    assert "float32" in error.fix
    assert export_onnx(model, x, tmp_path / "net.onnx", exporter="torchscript", check=False).bytes > 0


def test_opset_is_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator set that is asked for is the one in the file; one that cannot be, or that an exporter ignores, is an error."""
    model, x = convolutional(), torch.randn(2, 3, 8, 8)
    assert export_onnx(model, x, tmp_path / "net.onnx", opset=13).opset == 13
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 13
    for opset in (1, 99):
        error = refused(tmp_path / "net.onnx", model, x, opset=opset)
        assert isinstance(error, ConfigError)
        assert f"opset {opset} is not between" in error.what
    whole = writers.WRITERS["torchscript"]
    monkeypatch.setitem(writers.WRITERS, "torchscript", lambda job, file: whole(dataclasses.replace(job, opset=18), file))
    error = refused(tmp_path / "net.onnx", model, x, opset=17, exporter="torchscript")
    assert error.what.endswith("opset 18 was written where 17 was asked for")


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: str) -> None:
    """Weights too large for one file get one of their own, under the final name, so that the model can be loaded from there."""
    if exporter == "dynamo":
        monkeypatch.setattr(writers, "_SINGLE_FILE_BYTES", 0)
    else:  # PyTorch does this by itself beyond 2 GiB, with a file per tensor
        export = torch.onnx.export

        def scattered(*args: Any, **options: Any) -> None:
            export(*args, **options)
            onnx.save_model(onnx.load(args[2]), args[2], save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)

        monkeypatch.setattr(torch.onnx, "export", scattered)
    network = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    report = export_onnx(network, torch.randn(2, 8), tmp_path / "net.onnx", exporter=exporter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert report.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert relative_error(network(x).numpy(), compute(report.path, x)[0]) < 1e-5


def test_unusable_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder, a folder in the file's place and a folder that may not be written into are named."""
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "no" / "net.onnx", "there is no folder"), (tmp_path / "file" / "net.onnx", "there is no folder")):
        error = refused(path, model, x)
        assert isinstance(error, FileError)
        assert words in error.what
    assert "is a folder" in refused(tmp_path, model, x).what

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", denied)
    error = refused(tmp_path / "net.onnx", model, x)
    assert isinstance(error, FileError)
    assert error.what == f"cannot write into {str(tmp_path)!r}: Permission denied"


@pytest.mark.parametrize(
    ("options", "words"),
    [({"exporter": "dynamoo"}, "did you mean 'dynamo'"), ({"tolerance": 0.0}, "tolerance 0.0"), ({"tolerance": math.nan}, "tolerance nan")],
)
def test_unusable_options_are_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """An option that makes no sense is a configuration error that repeats it."""
    error = refused(tmp_path / "net.onnx", nn.Linear(8, 4), torch.randn(2, 8), **options)
    assert isinstance(error, ConfigError)
    assert words in error.what


@pytest.mark.parametrize(
    ("inputs", "words"), [(None, "no example inputs"), (torch.randn(2, 7), "[2, 7] float32"), ([torch.randn(2, 8)], "are a list")]
)
def test_unusable_inputs_are_refused(tmp_path: Path, inputs: Any, words: str) -> None:
    """Missing and wrong example inputs are input errors, and a model that returns no tensor is one too."""
    error = refused(tmp_path / "net.onnx", nn.Linear(8, 4), inputs)
    assert isinstance(error, InputError)
    assert words in error.what
    assert isinstance(refused(tmp_path / "net.onnx", Function(lambda _, x: len(x)), torch.randn(2, 8)), InputError)
