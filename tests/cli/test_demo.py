"""The demonstration: its data, its network, its training, and the folder that it leaves behind."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import graphprune as gp
from graphprune.cli import demo
from graphprune.errors import ConfigError, ExportError, FileError, InputError
from graphprune.latency import LatencyReport, LatencyRow

FILES = {"dense.onnx", "pruned.onnx", "pruned.safetensors", "summary.json", "summary.md"}
TIMES = {"dense": (1.5, 1.0, 1.0, 1.0), "pruned": (0.5, 3.0, 2.9, 3.1)}  # median, ratio, its interval
SUMMARY = demo.DemoSummary(
    folder="out",
    settings={"sparsity": 0.5, "seed": 3, "depth": 20, "epochs": 12, "finetune_epochs": 5},
    accuracy={"dense": 0.996, "pruned": 0.102, "recalibrated": 0.541, "finetuned": 0.987},
    params={"dense": 272186, "pruned": 69130},
    macs={"dense": 40000000, "pruned": 10000000},
    latency_ms={"dense": 1.5, "pruned": 0.5},
    latency_ratio={"low": 2.9, "estimate": 3.0, "high": 3.1},
    error=1e-7,
    effect=0.8,
    seconds={"train": 30.0, "prune": 0.2, "fine-tune": 5.0, "measure": 3.0},
)


@pytest.fixture(scope="module")
def digits() -> demo.Digits:
    """All digits."""
    return demo.load_digits()


@pytest.fixture(scope="module")
def few(digits: demo.Digits) -> demo.Digits:
    """Fewer and smaller digits (16x16), enough to learn something from in a second or two."""
    small = torch.nn.functional.avg_pool2d
    return demo.Digits(small(digits.train_images[:512], 2), digits.train_labels[:512], small(digits.test_images, 2), digits.test_labels)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small batches on one thread: threads that wait for a busy core would cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_digits_are_split_into_two_parts_without_overlap(digits: demo.Digits) -> None:
    """All 1,797 images are in exactly one part, each with its own label."""
    from sklearn import datasets  # noqa: PLC0415 - what the split is compared with

    images = torch.cat([digits.train_images, digits.test_images])
    labels = torch.cat([digits.train_labels, digits.test_labels])
    raw = datasets.load_digits()
    # Averaging 4x4 blocks keeps the order of brightness, so the sum of an image and its label identify it well enough to sort by.
    found = sorted(zip(labels.tolist(), _standard(images.mean((1, 2, 3))).round(decimals=3).tolist(), strict=True))
    smooth = torch.nn.functional.interpolate(torch.tensor(raw.images).unsqueeze(1), size=(32, 32), mode="bilinear")
    expected = sorted(zip(raw.target.tolist(), _standard(smooth.mean((1, 2, 3))).round(decimals=3).tolist(), strict=True))
    assert digits.train_images.shape == (1200, 1, 32, 32)
    assert digits.test_images.shape == (597, 1, 32, 32)
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert max(abs(a - b) for (_, a), (_, b) in zip(found, expected, strict=True)) < 0.01


def _standard(values: Tensor) -> Tensor:
    """Returns the values with mean 0 and deviation 1, so that two scales can be compared."""
    return (values - values.mean()) / values.std()


def test_the_training_images_have_mean_zero_and_deviation_one(digits: demo.Digits) -> None:
    """Normalised by the training part alone; the test part is close to it but not equal."""
    assert abs(digits.train_images.mean().item()) < 1e-5
    assert abs(digits.train_images.std().item() - 1) < 1e-5
    assert 1e-5 < abs(digits.test_images.mean().item()) < 0.1


def test_the_split_is_always_the_same(digits: demo.Digits) -> None:
    """A second call gives the same images, whatever the global random state."""
    torch.manual_seed(123)
    again = demo.load_digits()
    assert torch.equal(again.train_images, digits.train_images)
    assert torch.equal(again.test_labels, digits.test_labels)


def test_without_scikit_learn_the_fix_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra is one clear error with the command that installs it."""
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install graphprune\[demo\]"):
        demo.load_digits()


@pytest.mark.parametrize("depth", [8, 20, 32])
def test_the_network_has_the_layout_of_its_depth(depth: int) -> None:
    """Layers and parameters follow the closed formulas for depth 6n + 2 with 1x1 shortcuts."""
    net = demo.ResidualNetwork(depth)
    blocks = (depth - 2) // 6
    wide = [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(wide) + 1 == depth  # and the linear layer
    stem, head = 9 * 16 + 2 * 16, 64 * 10 + 10
    plain = sum((2 * blocks) * (9 * w * w + 2 * w) for w in (16, 32, 64))
    first = sum((16 * 2**i * 32 * 2**i) + 2 * 32 * 2**i - 9 * (32 * 2**i) ** 2 + 9 * (16 * 2**i) * (32 * 2**i) for i in (0, 1))
    assert sum(p.numel() for p in net.parameters()) == stem + head + plain + first


def test_the_network_maps_images_to_logits() -> None:
    """Any number of channels, classes and images; the size of the images is free."""
    net = demo.ResidualNetwork(8, widths=(4, 6, 8), inputs=3, classes=7)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert net(torch.randn(5, 3, 20, 24)).shape == (5, 7)


@pytest.mark.parametrize("depth", [-4, 0, 2, 18, 21])
def test_a_depth_without_layout_is_refused(depth: int) -> None:
    """The error says which depths there are."""
    with pytest.raises(ConfigError, match=rf"depth {depth} .*6n \+ 2"):
        demo.ResidualNetwork(depth)


def test_building_depends_on_the_seed_alone() -> None:
    """Same seed, same weights; the global random state is neither used nor moved."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, other = demo.build(8, seed=5), demo.build(8, seed=6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = demo.build(8, seed=5)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_shifting_moves_each_image_by_itself_and_loses_nothing() -> None:
    """One bright pixel in the middle of each image stays one bright pixel, at most SHIFT away, at every possible place."""
    images = torch.zeros(400, 2, 9, 11)
    images[:, 0, 4, 5], images[:, 1, 4, 5] = 1.0, 2.0
    moved = demo.shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert torch.equal(moved.sum((2, 3)), torch.tensor([1.0, 2.0]).expand(400, 2))
    assert torch.equal(moved[:, 0] * 2, moved[:, 1])  # the channels of an image move together
    places = {(int(y) - 4, int(x) - 5) for y, x in (moved[:, 0] == 1).nonzero()[:, 1:]}
    steps = range(-demo.SHIFT, demo.SHIFT + 1)
    assert places == {(y, x) for y in steps for x in steps}


def test_shifting_repeats_the_edge() -> None:
    """What comes in from outside continues the border, so a constant image stays as it is."""
    images = torch.full((8, 1, 5, 5), 3.0)
    assert torch.equal(demo.shifted(images, torch.Generator().manual_seed(0)), images)


def test_training_learns(few: demo.Digits) -> None:
    """The loss falls, and far more test images are right than by chance."""
    net = demo.build(8, seed=0)
    before = demo.accuracy(net, few)
    losses = demo.train(net, few, epochs=6, lr=demo.LR, seed=0)
    assert len(losses) == 6
    assert losses[-1] < losses[0] / 2
    assert before < 0.3
    assert demo.accuracy(net, few) > 0.6


def test_training_depends_on_its_seed_alone(few: demo.Digits) -> None:
    """Same seed, same weights; another seed, other weights; the global random state is neither used nor moved."""
    state = torch.get_rng_state()
    weights = []
    for seed in (1, 1, 2):
        net = demo.build(8, seed=0)
        demo.train(net, few, epochs=1, lr=demo.LR, seed=seed)
        weights.append(net.fc.weight)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_training_reports_each_batch(few: demo.Digits) -> None:
    """Progress counts the batches of all epochs, from 1 to the total, under the name of the stage."""
    told: list[tuple[str, int, int]] = []
    demo.train(demo.build(8, seed=0), few, epochs=2, lr=demo.LR, seed=0, progress=lambda *step: told.append(step), stage="warm")
    assert told == [("warm", done, 16) for done in range(1, 17)]


def test_no_epochs_leave_the_network_alone(few: demo.Digits) -> None:
    """Training for 0 epochs changes no weight and no statistic."""
    net = demo.build(8, seed=0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert demo.train(net, few, epochs=0, lr=demo.LR, seed=0) == []
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Fixed(nn.Module):
    """Answers the class that is written into the first pixel, unless it is training."""

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits."""
        answer = images[:, 0, 0, 0].long()
        return nn.functional.one_hot(answer * (not self.training), 10).float()


def test_accuracy_is_the_fraction_of_right_answers() -> None:
    """Counted over several batches, in evaluation mode, and the mode is restored."""
    images = torch.zeros(600, 1, 2, 2)
    labels = torch.arange(600) % 10
    images[:450, 0, 0, 0] = labels[:450].float()  # the other 150 are answered 0, which is right for 15 of them
    model = Fixed().train()
    assert demo.accuracy(model, demo.Digits(images, labels, images, labels)) == pytest.approx(465 / 600)
    assert model.training


def test_the_summary_is_frozen_and_survives_json() -> None:
    """All that is needed to print it again comes back from its dictionary."""
    assert demo.DemoSummary(**json.loads(json.dumps(SUMMARY.to_dict()))) == SUMMARY
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUMMARY.error = 0.0  # type: ignore[misc]


NUMBERS = (
    "99.6 %",
    "10.2 %",
    "54.1 %",
    "98.7 %",
    "272,186",
    "69,130",
    "40,000,000",
    "10,000,000",
    "1.500 ms",
    "0.500 ms",
    "÷ 3.94",
    "÷ 4.00",
)


def test_the_summary_prints_every_number() -> None:
    """The terminal shows accuracy, parameters, MACs and latency, and where the files are."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(SUMMARY)
    text = console.export_text()
    assert [number for number in (*NUMBERS, "÷ 3.00 (2.90 to 3.10", "1.0e-07", "files in out") if number not in text] == []


def test_the_markdown_holds_every_number() -> None:
    """The page has one table, of five cells a line, and the same numbers."""
    text = SUMMARY.to_markdown()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [number for number in (*NUMBERS, "÷ 3.00 (2.90 to 3.10", "1.0e-07") if number not in text] == []
    assert [line.count("|") for line in table] == [6] * 6


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces what `run` calls by stand-ins that take no time, and returns the names of those called so far, in order."""
    called: list[str] = []

    def prune(_model: nn.Module, example: Tensor, *, sparsity: float, criterion: str) -> tuple[nn.Module, Any]:
        called.append(f"prune {sparsity:g} {criterion} {tuple(example.shape)}")
        return demo.ResidualNetwork(8, widths=(8, 16, 32)), type("Report", (), {"error": 1e-7, "effect": 0.5})

    def recalibrate(model: nn.Module, batches: Any) -> nn.Module:
        called.append(f"recalibrate {sum(len(batch) for batch in batches)}")
        return model

    def export_onnx(_model: nn.Module, _example: Tensor, path: Path) -> None:
        called.append(f"export {path.name}")
        path.write_text("onnx")

    def measure_latency(paths: dict[str, Path], *, baseline: str, threads: int) -> LatencyReport:
        called.append(f"measure {' '.join(paths)} on {threads}")
        rows = [LatencyRow(name, str(paths[name]), {}, 9, ms, ms, 0.1, *ratio) for name, (ms, *ratio) in TIMES.items()]
        return LatencyReport(tuple(rows), baseline, 1, threads, "all", 1, 1.0, 0, "1.0", 2)

    def save(_model: nn.Module, path: Path) -> None:
        called.append(f"save {path.name}")
        path.write_text("tensors")

    for stub in (prune, recalibrate, export_onnx, measure_latency, save):
        monkeypatch.setattr(gp, stub.__name__, stub, raising=False)
    return called


def names(folder: Path) -> set[str]:
    """Returns the names of everything in a folder, hidden files too."""
    return {path.name for path in folder.iterdir()}


def test_a_run_calls_the_engine_step_by_step(engine: list[str], few: demo.Digits, tmp_path: Path) -> None:
    """Prune for one image, recalibrate on all training images, export both, measure both, save the pruned one."""
    summary = demo.run(tmp_path / "a" / "b", depth=8, epochs=0, finetune_epochs=0, data=few, sparsity=0.25)
    exports = ["export dense.onnx", "export pruned.onnx"]
    assert engine == ["prune 0.25 l1 (1, 1, 16, 16)", "recalibrate 512", *exports, "measure dense pruned on 1", "save pruned.safetensors"]
    assert names(tmp_path / "a" / "b") == FILES
    assert (summary.error, summary.effect) == (1e-7, 0.5)
    assert summary.latency_ms == {"dense": 1.5, "pruned": 0.5}
    assert summary.latency_ratio == {"low": 2.9, "estimate": 3.0, "high": 3.1}


@pytest.mark.usefixtures("engine")
def test_a_run_leaves_other_files_and_replaces_its_own(few: demo.Digits, tmp_path: Path) -> None:
    """The folder may exist already, and may hold an older run."""
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "summary.json").write_text("old")
    summary = demo.run(tmp_path, depth=8, epochs=0, finetune_epochs=0, data=few)
    assert names(tmp_path) == FILES | {"mine.txt"}
    assert json.loads((tmp_path / "summary.json").read_text()) == summary.to_dict()
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == summary.to_markdown()


def test_a_run_trains_on_half_of_the_threads(few: demo.Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run fails, the number of threads is as before."""
    seen: list[int] = []

    def stop(*_: Any, **__: Any) -> None:
        seen.append(torch.get_num_threads())
        raise ExportError("stopped")

    monkeypatch.setattr(demo, "train", stop)
    for threads, expected in ((1, 1), (2, 1), (5, 2)):
        torch.set_num_threads(threads)
        with pytest.raises(ExportError):
            demo.run(tmp_path, depth=8, data=few)
        assert torch.get_num_threads() == threads
        assert seen.pop() == expected


def test_a_failing_run_leaves_no_trace(engine: list[str], few: demo.Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last step fails, no file and no folder of the run remains, and an older summary is as it was."""

    def fail(_model: nn.Module, path: Path) -> None:
        path.write_text("half")
        raise ExportError("no space")

    monkeypatch.setattr(gp, "save", fail, raising=False)
    old = tmp_path / "old"
    old.mkdir()
    (old / "summary.json").write_text("old")
    for out in (tmp_path / "new" / "deep", old):
        with pytest.raises(ExportError):
            demo.run(out, depth=8, epochs=0, finetune_epochs=0, data=few)
    assert engine.count("export pruned.onnx") == 2
    assert names(tmp_path) == {"old"}
    assert names(old) == {"summary.json"}
    assert (old / "summary.json").read_text() == "old"


@pytest.mark.parametrize("below", [False, True])
def test_an_unwritable_folder_is_refused_before_training(below: bool, engine: list[str], few: demo.Digits, tmp_path: Path) -> None:
    """A file stands where the folder, or one above it, would have to be: one clear error, and nothing was trained."""
    told: list[str] = []
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileError, match=r"file.* cannot be written"):
        demo.run(file / "deeper" if below else file, depth=8, data=few, progress=lambda stage, *_: told.append(stage))
    assert (told, engine) == ([], [])
    assert file.read_text() == "mine"
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0, outside \[0, 1\)"),
        ({"sparsity": -0.5}, r"sparsity is -0.5, outside"),
        ({"epochs": -1}, "-1 epochs"),
        ({"finetune_epochs": -2}, "-2 epochs"),
        ({"depth": 9}, "depth 9"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    bad: dict[str, Any], message: str, engine: list[str], few: demo.Digits, tmp_path: Path
) -> None:
    """Each is one error that names the value, and the folder is not even made."""
    with pytest.raises(ConfigError, match=message):
        demo.run(tmp_path / "out", data=few, **bad)
    assert engine == []
    assert names(tmp_path) == set()


def test_a_small_run_from_end_to_end(few: demo.Digits, tmp_path: Path) -> None:
    """The real engine: half of every width goes, the files hold what the summary says, and the exported networks run."""
    told: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    summary = demo.run(out, depth=8, epochs=4, finetune_epochs=2, data=few, progress=lambda *step: told.append(step))
    assert names(out) == FILES
    assert json.loads((out / "summary.json").read_text()) == summary.to_dict()

    half = demo.ResidualNetwork(8, widths=(8, 16, 32))
    assert summary.params["pruned"] == sum(p.numel() for p in half.parameters())
    assert summary.params["dense"] == sum(p.numel() for p in demo.ResidualNetwork(8).parameters())
    assert summary.macs["pruned"] == gp.count(half, few.test_images[:1]).macs < 0.3 * summary.macs["dense"]

    assert set(summary.accuracy) == {"dense", "pruned", "recalibrated", "finetuned"}
    assert summary.accuracy["dense"] > 0.6
    assert summary.accuracy["finetuned"] > summary.accuracy["pruned"]
    assert summary.error < 1e-4
    assert summary.effect > 1e-2
    assert summary.latency_ratio["low"] <= summary.latency_ratio["estimate"] <= summary.latency_ratio["high"]
    assert list(summary.seconds) == list(dict.fromkeys(stage for stage, *_ in told)) == ["train", "prune", "fine-tune", "measure"]
    assert {stage for stage, done, total in told if done == total} == set(summary.seconds)

    for which in ("dense", "pruned"):
        session = onnxruntime.InferenceSession(out / f"{which}.onnx", providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: few.test_images.numpy()})
        right = (torch.from_numpy(logits).argmax(1) == few.test_labels).float().mean().item()
        assert right == pytest.approx(summary.accuracy["finetuned" if which == "pruned" else "dense"], abs=0.01)
    loaded = gp.load(demo.ResidualNetwork(8), out / "pruned.safetensors")
    assert demo.accuracy(loaded, few) == summary.accuracy["finetuned"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_default_run_reaches_the_promised_accuracies(tmp_path: Path) -> None:
    """98 % dense, chance after plain removal, and within two points of dense after the short fine-tune."""
    summary = demo.run(tmp_path)
    assert summary.accuracy["dense"] >= 0.98
    assert summary.accuracy["pruned"] < 0.4 < summary.accuracy["recalibrated"]
    assert summary.accuracy["finetuned"] > summary.accuracy["dense"] - 0.02
