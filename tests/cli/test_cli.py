"""The command line: each command on tiny models, JSON and nothing else, and every wrong input as one line with exit code 2."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graphprune
from graphprune.cli.app import app
from graphprune.cli.loading import Request, parse_inputs, read_tensors
from graphprune.cli.sources import find
from graphprune.errors import FileError, InputError
from graphprune.groups import build
from graphprune.recipes.replay import load

MODELS = '''
import torch
from torch import nn

class Net(nn.Module):
    """Two convolutions in a residual branch, and a classifier."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.mid = nn.Conv2d(width, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(self.mid(x + self.conv(x))).mean((2, 3)))

class Tokens(nn.Module):
    """Embeds tokens, and classifies their scaled mean."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(50, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x, *, scale):
        return self.out(torch.relu(self.hidden(self.table(x)) * scale[:, None, None]).mean(1))

class Spectral(Net):
    """Takes a spectrum across the channels, with an operator that has no rule."""

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.relu(self.mid(torch.fft.fft(self.conv(x), dim=1).abs() + x)).mean((2, 3)))

class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

class Raising(Net):
    def forward(self, x):
        raise ValueError("no\\nsuch luck")

def loud():
    print("building")
    return Net()

def broken():
    raise RuntimeError("out of order")

def nothing():
    return None

def wide():
    return Net(16)

def needy(width):
    return Net(width)

def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(3)]

def squared(output, target):
    return output.square().mean()

instance = Net()
WIDTH = 8
'''
IMAGE = ("--input", "2,3,8,8")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file with tiny models."""
    path = tmp_path_factory.mktemp("models") / "tiny_models.py"
    path.write_text(MODELS)
    return path


@pytest.fixture(scope="module")
def net(models: Path) -> str:
    """The name of a convolutional network."""
    return f"{models}:Net"


def run(*arguments: object) -> Any:
    """Runs the program; stdout and stderr are apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object, code: int = 0) -> dict[str, Any]:
    """Runs the program with --json and returns what it printed, which must be JSON alone."""
    result = run("--json", *arguments)
    assert result.exit_code == code, result.stderr or result.exception
    facts = json.loads(result.stdout)
    assert isinstance(facts, dict)
    return facts


def refusal(*arguments: object) -> str:
    """Runs the program, which must refuse in one line on stderr with exit code 2; returns the line."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    return str(result.stderr)


@pytest.fixture(scope="module")
def pruned(net: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder that `prune` wrote, and the JSON that it printed."""
    out = tmp_path_factory.mktemp("pruned") / "a" / "b"
    return out, done("prune", net, *IMAGE, "--sparsity", 0.5, "--out", out)


# -- inspect ---------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_groups_and_what_is_frozen(net: str) -> None:
    """The tables name each group with its channels, and the reasons for what is frozen."""
    result = run("inspect", net, *IMAGE)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"stem +│ +8 │ exact", result.stdout)
    assert re.search(r"mid +│ +6 │ exact", result.stdout)
    assert "Frozen" in result.stdout
    assert "output" in result.stdout
    assert result.stderr == ""


def test_inspect_prints_json(net: str) -> None:
    """The JSON has the same groups as the graph; a group's parameters are those of the closed formula."""
    facts = done("inspect", net, *IMAGE)
    sizes = {group["name"]: group["parameters"] for group in facts["groups"]}
    # stem: its own 8·3·9 + 8, all of conv (8·8·9 + 8), the columns of mid (6·8); mid: its own 6·8 + 6, the columns of fc (5·6)
    assert sizes == {"stem": 8 * 27 + 8 + 8 * 72 + 8 + 48, "mid": 48 + 6 + 30}
    assert {group["name"]: group["layers"] for group in facts["groups"]} == {"stem": ["stem", "conv"], "mid": ["mid"]}
    total = sum(parameter.numel() for parameter in find(net).build().parameters())
    assert facts["reachable"] == pytest.approx((total - 5) / total)  # all but the bias of fc
    assert facts["unknown"] == []
    assert any(item["parameter"] == "fc.weight" and item["dim"] == 0 for item in facts["frozen"])


def test_inspect_explains_a_layer(net: str) -> None:
    """--explain says with whom a layer's channels go."""
    result = run("inspect", net, *IMAGE, "--explain", "conv")
    assert result.exit_code == 0
    assert "group 'stem': 8 channels" in result.stdout
    assert any("stem.weight" in line for line in done("inspect", net, *IMAGE, "--explain", "conv")["explanation"])


def test_inspect_names_operators_without_a_rule(models: Path) -> None:
    """An operator without a rule is no error: it is named, with what it costs."""
    name = f"{models}:Spectral"
    unknown = done("inspect", name, *IMAGE)["unknown"]
    assert [item["operator"] for item in unknown] == ["aten::_fft_r2c"]
    assert "_fft_r2c" in run("inspect", name, *IMAGE).stdout


# -- prune -----------------------------------------------------------------------------------------------------------------------


def test_prune_writes_the_model_and_its_report(pruned: tuple[Path, dict[str, Any]], net: str) -> None:
    """Tensors, both ONNX files and the report are there; the loaded model has the sizes that the report says."""
    out, facts = pruned
    assert {path.name for path in out.iterdir()} == {"dense.onnx", "pruned.onnx", "pruned.safetensors", "report.json"}
    assert json.loads((out / "report.json").read_text()) == facts
    assert {group["name"]: group["kept"] for group in facts["groups"]} == {"stem": 4, "mid": 3}
    assert facts["verified"]
    assert facts["error"] < 1e-5
    assert facts["effect"] > 1e-3
    small = load(find(net).build(), out / "pruned.safetensors")
    assert sum(parameter.numel() for parameter in small.parameters()) == facts["after"]["params"] < facts["before"]["params"]


def test_prune_exports_what_it_saved(pruned: tuple[Path, dict[str, Any]], net: str) -> None:
    """ONNX Runtime computes from the files what the models compute."""
    out, _ = pruned
    x = torch.randn(3, 3, 8, 8)
    for name, model in {"dense": find(net).build(), "pruned": load(find(net).build(), out / "pruned.safetensors")}.items():
        (result,) = onnxruntime.InferenceSession(out / f"{name}.onnx").run(None, {"x": x.numpy()})
        np.testing.assert_allclose(result, model(x).detach().numpy(), rtol=1e-3, atol=1e-5)


def test_prune_prints_its_report(net: str, tmp_path: Path) -> None:
    """Without --json the report is a table, and says which files were written; no ONNX files with --no-onnx."""
    result = run("prune", net, *IMAGE, "--out", tmp_path / "out", "--no-onnx")
    assert result.exit_code == 0, result.stderr
    assert "Verified: error" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"pruned.safetensors", "report.json"}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--exclude", "conv"), {"stem": 8, "mid": 3}),
        (("--exclude", "conv", "--exclude", "mid"), {"stem": 8, "mid": 6}),
        (("--sparsity", 0.3), {"stem": 5, "mid": 4}),
        (("--sparsity", 0.3, "--rounding", "ceil"), {"stem": 6, "mid": 5}),
        (("--round-to", 4), {"stem": 4, "mid": 4}),
        (("--sparsity", 0), {"stem": 8, "mid": 6}),
    ],
)
def test_prune_options(net: str, tmp_path: Path, options: tuple[object, ...], kept: dict[str, int]) -> None:
    """Options reach the engine: the kept counts are those of the formulas int(n (1 - s)) and n - int(n s)."""
    facts = done("prune", net, *IMAGE, "--out", tmp_path, "--no-onnx", *options)
    assert {group["name"]: group["kept"] for group in facts["groups"]} == kept


def test_prune_meets_a_budget(net: str, tmp_path: Path) -> None:
    """--macs and --params say how much goes, of all groups together or evenly; the report holds what was asked beside what went."""
    facts = done("prune", net, *IMAGE, "--out", tmp_path / "macs", "--no-onnx", "--macs", 0.5, "--mode", "global")
    assert facts["budget"] == {"unit": "macs", "removed": 0.5}
    assert 0.3 * facts["before"]["macs"] < facts["after"]["macs"] <= 0.5 * facts["before"]["macs"]
    facts = done("prune", net, *IMAGE, "--out", tmp_path / "params", "--no-onnx", "--params", 0.5)
    assert 0.3 * facts["before"]["params"] < facts["after"]["params"] <= 0.5 * facts["before"]["params"]


@pytest.mark.parametrize(
    "criterion", ["l2", "fpgm", "lamp", "random", "apoz", "mean_activation", "wanda", "taylor", "taylor_group", "hessian"]
)
def test_prune_takes_criteria_and_data(models: Path, tmp_path: Path, criterion: str) -> None:
    """Every criterion that fits the network prunes it, with batches and a loss by name."""
    shown = ("--data", f"{models}:batches", "--loss", "cross_entropy" if criterion == "taylor" else f"{models}:squared")
    facts = done("prune", f"{models}:Net", *IMAGE, "--out", tmp_path, "--no-onnx", "--criterion", criterion, *shown)
    assert {group["name"]: group["kept"] for group in facts["groups"]} == {"stem": 4, "mid": 3}
    assert facts["effect"] > 1e-3
    assert facts["asked"]["criterion"] == criterion


def test_data_decides_what_a_data_criterion_keeps(models: Path, tmp_path: Path) -> None:
    """The channels that go by mean activation are those that the library removes with the same batches."""
    named = find(f"{models}:Net").build()
    data = find(f"{models}:batches").make()
    small, _ = graphprune.prune(named, data[0][0], criterion="mean_activation", data=data)
    arguments = ("--out", tmp_path, "--no-onnx", "--criterion", "mean_activation", "--data", f"{models}:batches")
    done("prune", f"{models}:Net", "--input", "4,3,8,8", *arguments)
    assert torch.equal(load_file(tmp_path / "pruned.safetensors")["stem.weight"], small.state_dict()["stem.weight"])


def test_prune_takes_a_config_list(net: str, tmp_path: Path) -> None:
    """--config replaces --sparsity; a layer that no entry matches stays whole."""
    config = tmp_path / "config.json"
    config.write_text('[{"sparsity": 0.5, "op_names": ["mid"]}]')
    facts = done("prune", net, *IMAGE, "--out", tmp_path / "out", "--no-onnx", "--config", config)
    assert {group["name"]: group["kept"] for group in facts["groups"]} == {"stem": 8, "mid": 3}


def test_prune_takes_weights_and_a_type(net: str, tmp_path: Path) -> None:
    """Channels are chosen by the weights in the file, and --dtype converts the model."""
    state = find(net).build().state_dict()
    state["mid.weight"] = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 8, 1, 1).contiguous()
    save_file(state, tmp_path / "dense.safetensors")
    out = tmp_path / "out"
    facts = done("prune", net, *IMAGE, "--weights", tmp_path / "dense.safetensors", "--dtype", "float64", "--out", out, "--no-onnx")
    tensors = load_file(out / "pruned.safetensors")
    assert facts["dtype"] == "float64"
    assert tensors["mid.weight"][:, 0, 0, 0].tolist() == [3.0, 4.0, 5.0]
    assert tensors["mid.weight"].dtype == torch.float64


def test_the_seed_decides_random_weights(net: str, tmp_path: Path) -> None:
    """Equal seeds give equal files, other seeds others; the global random state stays as it was."""
    state = torch.get_rng_state()
    for number, seed in enumerate((0, 0, 1)):
        done("prune", net, *IMAGE, "--out", tmp_path / str(number), "--seed", seed, "--no-onnx")
    one, two, three = (load_file(tmp_path / str(number) / "pruned.safetensors")["fc.bias"] for number in range(3))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)
    assert torch.equal(state, torch.get_rng_state())


def test_several_inputs_of_several_types(models: Path, tmp_path: Path) -> None:
    """A positional argument of integers and a keyword argument reach the model."""
    inputs = ("--input", "int64:2,7:50", "--input", "scale:2")
    facts = done("prune", f"{models}:Tokens", *inputs, "--out", tmp_path, "--no-onnx")
    assert {group["kept"] * 2 == group["channels"] for group in facts["groups"]} == {True}
    assert facts["inputs"] == "[2, 7] int64, scale=[2] float32"


def test_other_files_in_the_folder_stay(net: str, tmp_path: Path) -> None:
    """Files of the same name are replaced, others stay, and nothing temporary is left."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.json").write_text("old")
    done("prune", net, *IMAGE, "--out", tmp_path, "--no-onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "pruned.safetensors", "report.json"}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "report.json").read_text())["verified"]


# -- verify, export, bench, demo -------------------------------------------------------------------------------------------------


def test_verify_agrees_with_what_was_pruned(pruned: tuple[Path, dict[str, Any]], net: str) -> None:
    """The file reproduces the masked model, with the effect that the report said."""
    out, report = pruned
    facts = done("verify", net, *IMAGE, "--pruned", out / "pruned.safetensors")
    assert facts["passed"]
    assert facts["changed"] == []
    assert facts["error"] < 1e-5
    assert facts["effect"] == pytest.approx(report["effect"], rel=1e-3)
    assert "the same" in run("verify", net, *IMAGE, "--pruned", out / "pruned.safetensors").stdout


def test_verify_tells_a_difference(pruned: tuple[Path, dict[str, Any]], net: str, tmp_path: Path) -> None:
    """A changed tensor gives exit code 1, and is named."""
    out, _ = pruned
    small = load(find(net).build(), out / "pruned.safetensors")
    with torch.no_grad():
        small.get_parameter("fc.bias").add_(1.0)
    graphprune.save(small, tmp_path / "changed.safetensors")
    facts = done("verify", net, *IMAGE, "--pruned", tmp_path / "changed.safetensors", code=1)
    assert not facts["passed"]
    assert facts["changed"] == ["fc.bias"]
    result = run("verify", net, *IMAGE, "--pruned", tmp_path / "changed.safetensors")
    assert result.exit_code == 1
    assert "DIFFERENT" in result.stdout
    assert done("verify", net, *IMAGE, "--pruned", tmp_path / "changed.safetensors", "--tolerance", 100)["passed"]


def test_verify_compares_in_the_type_of_the_file(net: str, tmp_path: Path) -> None:
    """A model that was pruned in double precision is verified in it without being told."""
    done("prune", net, *IMAGE, "--out", tmp_path, "--no-onnx", "--dtype", "float64")
    facts = done("verify", net, *IMAGE, "--pruned", tmp_path / "pruned.safetensors")
    assert facts["dtype"] == "float64"
    assert facts["error"] < 1e-12


def test_verify_rejects_another_model(pruned: tuple[Path, dict[str, Any]], models: Path) -> None:
    """A recipe of another model is one clear error."""
    assert "stem" in refusal("verify", f"{models}:wide", *IMAGE, "--pruned", pruned[0] / "pruned.safetensors")


def test_export_writes_dense_and_pruned(pruned: tuple[Path, dict[str, Any]], net: str, tmp_path: Path) -> None:
    """Both files run, and the pruned one is smaller."""
    dense = done("export", net, *IMAGE, "--out", tmp_path / "dense.onnx")
    small = done("export", net, *IMAGE, "--out", tmp_path / "small.onnx", "--pruned", pruned[0] / "pruned.safetensors")
    assert small["bytes"] < dense["bytes"] == (tmp_path / "dense.onnx").stat().st_size
    assert small["dynamic_batch"]
    assert small["error"] < 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {"dense.onnx", "small.onnx"}


def test_bench_times_files_against_the_first(pruned: tuple[Path, dict[str, Any]]) -> None:
    """The report has a row per file, and says under which conditions it was measured."""
    files = [pruned[0] / "dense.onnx", pruned[0] / "pruned.onnx"]
    facts = done("bench", *files, "--rounds", 5, "--batch", 2, "--optimization", "basic")
    assert [row["name"] for row in facts["rows"]] == ["dense", "pruned"]
    assert (facts["baseline"], facts["batch"], facts["threads"], facts["optimization"]) == ("dense", 2, 1, "basic")
    assert "median" in run("bench", *files, "--rounds", 5).stdout


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The options reach the demonstration, which reports its progress; its summary is printed."""
    from graphprune.cli import demo  # noqa: PLC0415 - patched here

    given: dict[str, Any] = {}

    class Summary:
        """A summary of two words."""

        def to_dict(self) -> dict[str, float]:
            """Returns it."""
            return {"accuracy": 0.5, "error": float("nan")}

        def __str__(self) -> str:
            return "all fine"

    def fake(out: Path, **options: Any) -> Summary:
        options.pop("progress")("train", 1, 2)
        given.update(options, out=out)
        return Summary()

    monkeypatch.setattr(demo, "run", fake)
    facts = done("demo", "--out", tmp_path, "--epochs", 1, "--finetune-epochs", 0, "--sparsity", 0.25, "--seed", 3, "--depth", 8)
    assert facts == {"accuracy": 0.5, "error": None}
    assert given == {"out": tmp_path, "sparsity": 0.25, "seed": 3, "depth": 8, "epochs": 1, "finetune_epochs": 0}
    assert run("demo").stdout == "all fine\n"


# -- output ----------------------------------------------------------------------------------------------------------------------


def test_flags_may_stand_anywhere(net: str) -> None:
    """--json behind a command is the same as before it, and --quiet leaves nothing but the exit code."""
    before, behind = run("--json", "inspect", net, *IMAGE), run("inspect", net, *IMAGE, "--json", "-q")
    assert json.loads(before.stdout)["groups"] == json.loads(behind.stdout)["groups"]
    quiet = run("inspect", net, "--quiet", *IMAGE)
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")


def test_a_model_that_prints_does_not_spoil_the_json(models: Path) -> None:
    """What the user's model prints goes to stderr while JSON is asked for."""
    result = run("--json", "inspect", f"{models}:loud", *IMAGE)
    assert json.loads(result.stdout)["groups"]
    assert "building" in result.stderr


def test_help_and_version() -> None:
    """Without arguments the program explains itself; every command has a help text."""
    assert run().exit_code == 0
    for command in ("demo", "inspect", "prune", "sensitivity", "search", "verify", "export", "bench"):
        assert command in run().stdout
        assert run(command, "--help").exit_code == 0
    assert run("--version").stdout == f"graphprune {graphprune.__version__}\n"


def test_the_module_runs_as_a_program(net: str) -> None:
    """`python -m graphprune` ends with the exit code of the command, and prints no traceback on a clear error."""
    command = [sys.executable, "-m", "graphprune", "inspect", net.replace("Net", "Nett")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])  # noqa: S603
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_defect_is_no_clear_error(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody meant is not dressed up: it passes, for a traceback and exit code 1."""

    def defect(*_: object) -> None:
        message = "a defect"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(build, "trace", defect)
    result = run("inspect", net, *IMAGE)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


# -- wrong input -----------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": (("inspect",), "MODEL"),
    "no command": (("inspekt",), "inspect"),
    "unknown option": (("prune", "{net}", "--sparsty", "0.5"), "--sparsty"),
    "no colon": (("inspect", "Net"), "torchvision:NAME"),
    "no file": (("inspect", "{folder}/none.py:Net"), "no file"),
    "no module": (("inspect", "no_such_package.models:Net"), "no_such_package"),
    "misspelt name": (("inspect", "{folder}/tiny_models.py:Nett"), "did you mean 'Net'?"),
    "no callable": (("inspect", "{folder}/tiny_models.py:WIDTH"), "is a int"),
    "no module returned": (("inspect", "{folder}/tiny_models.py:nothing", *IMAGE), "NoneType"),
    "arguments needed": (("inspect", "{folder}/tiny_models.py:needy", *IMAGE), "takes no arguments"),
    "constructor raises": (("inspect", "{folder}/tiny_models.py:broken", *IMAGE), "RuntimeError: out of order"),
    "no inputs": (("prune", "{net}", "--out", "{out}"), "--input 1,3,224,224"),
    "no shape": (("prune", "{net}", "--input", "1,3,a", "--out", "{out}"), "1,3,a"),
    "empty batch": (("prune", "{net}", "--input", "0,3,8,8", "--out", "{out}"), "size of 0"),
    "wrong type": (("prune", "{net}", "--input", "x:int65:1,3", "--out", "{out}"), "did you mean 'int64'?"),
    "wrong shape": (("prune", "{net}", "--input", "1,4,8,8", "--out", "{out}"), "4"),
    "forward raises": (("prune", "{folder}/tiny_models.py:Raising", *IMAGE, "--out", "{out}"), "ValueError: no"),
    "sparsity of one": (("prune", "{net}", *IMAGE, "--sparsity", "1", "--out", "{out}"), "[0, 1)"),
    "negative sparsity": (("prune", "{net}", *IMAGE, "--sparsity", "-0.1", "--out", "{out}"), "[0, 1)"),
    "no number": (("prune", "{net}", *IMAGE, "--sparsity", "half", "--out", "{out}"), "--sparsity"),
    "unknown criterion": (("prune", "{net}", *IMAGE, "--criterion", "l7", "--out", "{out}"), "no criterion is called 'l7'"),
    "two amounts": (("prune", "{net}", *IMAGE, "--macs", "0.5", "--sparsity", "0.5", "--out", "{out}"), "both say how much goes"),
    "budget of all": (("prune", "{net}", *IMAGE, "--macs", "1", "--out", "{out}"), "between 0 and 1"),
    "no data": (("prune", "{net}", *IMAGE, "--criterion", "apoz", "--out", "{out}"), "needs data"),
    "no loss": (
        ("prune", "{net}", *IMAGE, "--criterion", "taylor", "--data", "{folder}/tiny_models.py:batches", "--out", "{out}"),
        "Pass loss=",
    ),
    "unknown loss": (("prune", "{net}", *IMAGE, "--loss", "cross_entropie", "--out", "{out}"), "is no loss function"),
    "data is no data": (("prune", "{net}", *IMAGE, "--data", "{folder}/tiny_models.py:WIDTH", "--out", "{out}"), "not batches"),
    "unknown rounding": (("prune", "{net}", *IMAGE, "--rounding", "up", "--out", "{out}"), "floor"),
    "unknown layer": (("prune", "{net}", *IMAGE, "--exclude", "stemm", "--out", "{out}"), "did you mean 'stem'?"),
    "unknown layer to explain": (("inspect", "{net}", *IMAGE, "--explain", "stemm"), "did you mean 'stem'?"),
    "weights are no safetensors": (("prune", "{net}", *IMAGE, "--weights", "{folder}/tiny_models.py", "--out", "{out}"), "safetensors"),
    "no weights file": (("prune", "{net}", *IMAGE, "--weights", "{folder}/none", "--out", "{out}"), "No such file"),
    "config is no JSON": (("prune", "{net}", *IMAGE, "--config", "{folder}/tiny_models.py", "--out", "{out}"), "no JSON"),
    "out is a file": (("prune", "{net}", *IMAGE, "--out", "{folder}/tiny_models.py"), "is a file"),
    "out below a file": (("prune", "{net}", *IMAGE, "--out", "{folder}/tiny_models.py/out"), "cannot be written"),
    "no pruned file": (("verify", "{net}", *IMAGE, "--pruned", "{folder}/none"), "No such file"),
    "pruned is no safetensors": (("verify", "{net}", *IMAGE, "--pruned", "{folder}/tiny_models.py"), "tiny_models.py"),
    "export into no folder": (("export", "{net}", *IMAGE, "--out", "{out}/none/a.onnx"), "cannot be written"),
    "export onto a folder": (("export", "{net}", *IMAGE, "--out", "{folder}"), "is a folder"),
    "bench without a file": (("bench", "{folder}/none.onnx"), "none.onnx"),
    "bench without ONNX": (("bench", "{folder}/tiny_models.py"), "tiny_models.py"),
    "no threads": (("bench", "--threads", "0", "a.onnx"), "--threads"),
    "demo of no depth": (("demo", "--depth", "9", "--out", "{out}"), "6n + 2"),
    "demo of no sparsity": (("demo", "--sparsity", "2", "--out", "{out}"), "[0, 1)"),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_refused(arguments: tuple[str, ...], expected: str, models: Path, tmp_path: Path) -> None:
    """One line says what is wrong, the exit code is 2, and nothing is written."""
    before = sorted(models.parent.glob("*"))
    filled = [a.format(net=f"{models}:Net", folder=models.parent, out=tmp_path / "out") for a in arguments]
    assert expected in refusal(*filled)
    assert list(tmp_path.iterdir()) == []
    assert sorted(models.parent.glob("*")) == before


def test_refusals_are_told_from_results(net: str) -> None:
    """The helper of these tests does not accept a command that succeeds."""
    with pytest.raises(AssertionError):
        refusal("inspect", net, *IMAGE)


def test_the_folder_is_tried_before_the_work(tmp_path: Path) -> None:
    """A model is not even built where its results could not be written."""
    path = tmp_path / "marking.py"
    path.write_text(f"from pathlib import Path\ndef make():\n    Path({str(tmp_path / 'built')!r}).touch()\n")
    assert "is a file" in refusal("prune", f"{path}:make", *IMAGE, "--out", path)
    assert not (tmp_path / "built").exists()
    assert "NoneType" in refusal("prune", f"{path}:make", *IMAGE, "--out", tmp_path / "out")
    assert (tmp_path / "built").exists()
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_earlier_results(net: str, tmp_path: Path) -> None:
    """Files of an earlier run stay as they were, byte for byte, when a later one fails."""
    done("prune", net, *IMAGE, "--out", tmp_path, "--no-onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refusal("prune", net, *IMAGE, "--exclude", "nowhere", "--out", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_sparsity_and_config_exclude_each_other(net: str, tmp_path: Path) -> None:
    """Two answers to one question are refused; so is a config that is no list."""
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert "--sparsity and --config" in refusal("prune", net, *IMAGE, "--sparsity", 0.5, "--config", config, "--out", tmp_path / "o")
    assert "not a list" in refusal("prune", net, *IMAGE, "--config", config, "--out", tmp_path / "o")
    config.write_text('[{"sparsity": 0.5, "op_tipes": ["Conv2d"]}]')
    assert "did you mean 'op_types'?" in refusal("prune", net, *IMAGE, "--config", config, "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("fc.bias"), "1 missing (fc.bias)"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected (extra)"),
        (lambda state: state.update({"fc.bias": torch.zeros(4)}), "1 of another shape (fc.bias [4] for [5])"),
        (lambda state: [state.pop(name) for name in list(state) if name != "fc.bias"], "and 4 more"),
    ],
)
def test_weights_must_fit(net: str, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], expected: str) -> None:
    """Missing, unexpected and misshapen tensors are named in one error."""
    state = dict(find(net).build().state_dict())
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    assert expected in refusal("inspect", net, *IMAGE, "--weights", tmp_path / "weights.safetensors")


def test_one_name_of_a_tied_weight_is_enough(models: Path, tmp_path: Path) -> None:
    """A safetensors file holds a shared tensor once; that is no missing tensor."""
    path = tmp_path / "weights.safetensors"
    state = find(f"{models}:Tied", seed=1).build().state_dict()
    del state["b.weight"]
    save_file(state, path)
    loaded = Request(f"{models}:Tied", ["2,4"], path).load().model.state_dict()
    assert loaded["b.weight"] is not state["a.weight"]
    assert all(torch.equal(loaded[name], state[name.replace("b.weight", "a.weight")]) for name in loaded)


# -- names and inputs ------------------------------------------------------------------------------------------------------------


def test_module_instances_and_packages(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance is copied for each use, and a module that Python can import is found by its name."""
    source = find(f"{models}:instance")
    assert source.build() is not source.build()
    monkeypatch.syspath_prepend(models.parent)
    assert type(find("tiny_models:Net").build()).__name__ == "Net"


def test_the_current_folder_is_searched(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module in the folder that the program is started in is found."""
    (tmp_path / "local_models.py").write_text(models.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert type(find("local_models:Net").build()).__name__ == "Net"


def fake_torchvision() -> dict[str, types.ModuleType]:
    """Returns modules that stand for torchvision, with one model whose backbone would download weights by default."""

    def get_model(name: str, **options: Any) -> Any:
        assert (name, options) == ("little_net", {"weights": None, "weights_backbone": None})
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.Flatten(), torch.nn.Linear(4 * 28 * 28, 2))

    def builder(*, weights: object = None, weights_backbone: object = "download", **_: object) -> None: ...

    package, submodule = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    contents = {"list_models": lambda: ["little_net"], "get_model": get_model, "get_model_builder": lambda _: builder}
    for name, value in contents.items():
        setattr(submodule, name, value)
    package.models = submodule  # type: ignore[attr-defined]
    return {"torchvision": package, "torchvision.models": submodule}


def test_torchvision_models_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of torchvision gets an image of 224 pixels and no download; a misspelt one suggests the nearest."""
    for name, module in fake_torchvision().items():
        monkeypatch.setitem(sys.modules, name, module)
    assert done("inspect", "torchvision:little_net")["inputs"] == "[1, 3, 224, 224] float32"
    assert "did you mean 'little_net'?" in refusal("inspect", "torchvision:litle_net")


def test_timm_models_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of timm gets an image of the size that it was made for."""
    timm = types.ModuleType("timm")

    def create_model(name: str, *, pretrained: bool) -> Any:
        assert (name, pretrained) == ("little_net.tag", False)
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        model.default_cfg = {"input_size": (1, 32, 32)}  # type: ignore[assignment]
        return model

    timm.list_models = lambda: ["little_net"]  # type: ignore[attr-defined]
    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert done("inspect", "timm:little_net.tag")["inputs"] == "[1, 1, 32, 32] float32"
    assert "did you mean 'little_net'?" in refusal("inspect", "timm:litle_net")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_library_is_one_line_with_the_fix(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library that is not installed, and one whose import fails, are told apart."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in refusal("inspect", f"{package}:NAME")
    monkeypatch.delitem(sys.modules, package)
    (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal("inspect", f"{package}:NAME")
    assert "RuntimeError: operator does not exist" in message
    assert f"built for torch {torch.__version__}" in message


def test_input_specifications() -> None:
    """Name, type, shape and bound are read; floating-point numbers are normal, integers below the bound."""
    inputs = parse_inputs(["2,3,8,8", "4x5", "int64:1,16", "ids:int32:2,9:7", "mask:bool:6", "x:float64:3", "y:2"], seed=0)
    assert [tuple(t.shape) for t in inputs.args] == [(2, 3, 8, 8), (4, 5), (1, 16)]
    assert {name: (tuple(t.shape), t.dtype) for name, t in inputs.kwargs.items()} == {
        "ids": ((2, 9), torch.int32),
        "mask": ((6,), torch.bool),
        "x": ((3,), torch.float64),
        "y": ((2,), torch.float32),
    }
    assert set(inputs.args[2].unique().tolist()) == {0, 1}
    assert 1 < int(inputs.kwargs["ids"].max()) < 7
    assert torch.equal(inputs.args[0], parse_inputs(["2,3,8,8"], seed=0).args[0])
    assert not torch.equal(inputs.args[0], parse_inputs(["2,3,8,8"], seed=1).args[0])


@pytest.mark.parametrize(
    "text", ["", "a", "1,", "1,,2", "-1,3", "x:", "1:2:3", "a:b:c:1,2", "a b!:int64:1", "float32:1,2:5", "int8:3:300", "int64:3:0"]
)
def test_wrong_input_specifications(text: str) -> None:
    """Whatever is no specification is refused with the specification in the message."""
    with pytest.raises(InputError, match=re.escape(repr(text))):
        parse_inputs([text], seed=0)


def test_an_argument_named_twice_is_refused() -> None:
    """Two values for one argument cannot both be meant."""
    with pytest.raises(InputError, match="twice"):
        parse_inputs(["x:1,2", "x:3"], seed=0)


def test_a_cut_off_weights_file_is_refused(net: str, tmp_path: Path) -> None:
    """Half a safetensors file is none."""
    whole = tmp_path / "weights.safetensors"
    save_file(find(net).build().state_dict(), whole)
    whole.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(FileError, match="no safetensors file"):
        read_tensors(whole)
