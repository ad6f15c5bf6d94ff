"""The demonstration behind ``graphprune demo``: a real network, pruned end to end.

A small residual network learns scikit-learn's handwritten digits, loses half of its channels, and is measured: accuracy dense, pruned,
with BatchNorm statistics estimated again, and after a short fine-tune; parameters, multiply-accumulates (MACs) and latency in ONNX
Runtime. Network and training are written as any user would write them, and the pruning is done by public calls only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import ConfigError, FileError, InputError
from graphprune.pruners.config import check_sparsity
from graphprune.trace.threads import forked_generators

Progress = Callable[[str, int, int], None]  # is told the stage, the steps done and the steps in total
SPLIT_SEED = 0  # the split of the data is the same for every seed of the training
TRAIN_IMAGES = 1200
BATCH = 64
SIZE = 32  # height and width of an image in pixels
SHIFT = 2  # augmentation moves an image by up to this many of its pixels
LR, FINETUNE_LR = 0.1, 0.04
TITLE = "A residual network on handwritten digits"
HEADINGS = ("network", "accuracy", "parameters", "MACs", "latency")


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (n, 1, height, width), float32 with mean 0 and deviation 1 over the training part, and their labels (n,), int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(size: int = SIZE) -> Digits:
    """Returns scikit-learn's 1,797 digits, which have 8x8 pixels, at another size, split into 1,200 for training and 597 for testing.

    Args:
        size: height and width in pixels.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # an extra, needed by the demonstration alone
    except ImportError as error:
        what = "the demonstration trains on the digits that come with scikit-learn, which is not installed"
        raise InputError(what, "Install it with `pip install graphprune[demo]`") from error
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0 to 16
    images = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[test], labels[test])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """The residual network of He et al. (2015) for small images: depth 6n + 2, three stages of n blocks.

    Args:
        depth: number of weight layers on the longest path; 8, 14, 20, ...
        widths: channels of the three stages.
        inputs: channels of the images.
        classes: number of classes.

    Raises:
        ConfigError: `depth` is not 6n + 2.
    """

    def __init__(self, depth: int = 20, widths: tuple[int, int, int] = (16, 32, 64), inputs: int = 1, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            what = f"a residual network of depth {depth} has no layout, the depth must be 6n + 2"
            raise ConfigError(what, "Choose 8, 14, 20, 26, ...")
        self.conv1 = nn.Conv2d(inputs, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage1 = self._stage(widths[0], widths[0], blocks, stride=1)
        self.stage2 = self._stage(widths[0], widths[1], blocks, stride=2)
        self.stage3 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.fc = nn.Linear(widths[2], classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        """Returns `blocks` blocks, the first of which changes the shape."""
        first = ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, inputs, h, w) to logits (n, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def build(depth: int, seed: int) -> ResidualNetwork:
    """Returns a fresh network whose weights depend on `seed` alone; the global random state is left as it was."""
    with forked_generators():
        torch.manual_seed(seed)
        return ResidualNetwork(depth)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns each image moved by its own random whole number of pixels, at most `SHIFT` in each direction; edges are repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    dy, dx = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows = (dy + torch.arange(height))[:, None, :, None]
    columns = (dx + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns]


def train(
    model: nn.Module, data: Digits, *, epochs: int, lr: float, seed: int, progress: Progress | None = None, stage: str = "train"
) -> list[float]:
    """Trains `model` in place with SGD, a one-cycle learning rate and random shifts.

    Args:
        model: maps images to logits.
        data: only the training part is used.
        epochs: passes over the training images; 0 leaves the model as it is.
        lr: the highest learning rate of the cycle.
        seed: of the order of the images and of their shifts.
        progress: told the number of batches done and in total.
        stage: the name that `progress` is told.

    Returns:
        The mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train_images)
    per_epoch = -(-count // BATCH)
    if not epochs:
        return []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * per_epoch)
    model.train()
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for batch, chosen in enumerate(torch.randperm(count, generator=generator).split(BATCH), start=1):
            logits = model(shifted(data.train_images[chosen], generator))
            loss = F.cross_entropy(logits, data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
            if progress:
                progress(stage, epoch * per_epoch + batch, epochs * per_epoch)
        losses.append(total / count)
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Returns the fraction of test images that `model` in evaluation mode classifies correctly."""
    was_training = model.training
    model.eval()
    predicted = torch.cat([model(images).argmax(1) for images in data.test_images.split(256)])
    model.train(was_training)
    return (predicted == data.test_labels).float().mean().item()


@dataclass(frozen=True)
class DemoSummary:
    """What one run of the demonstration measured.

    Attributes:
        folder: where the files are.
        settings: what was asked for: "sparsity", "seed", "depth", "epochs", "finetune_epochs".
        accuracy: fraction of test images classified correctly: "dense", "pruned", "recalibrated", "finetuned".
        params: number of parameters: "dense", "pruned".
        macs: multiply-accumulates per image: "dense", "pruned".
        latency_ms: median for one image in ONNX Runtime on one thread, milliseconds: "dense", "pruned".
        latency_ratio: dense over pruned, "estimate", and the ends of its 95 % confidence interval, "low" and "high".
        error: relative difference between the pruned and the masked network.
        effect: relative difference between the masked and the dense network.
        seconds: time spent in each stage.
    """

    folder: str
    settings: dict[str, float]
    accuracy: dict[str, float]
    params: dict[str, int]
    macs: dict[str, int]
    latency_ms: dict[str, float]
    latency_ratio: dict[str, float]
    error: float
    effect: float
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns the summary as plain values, for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the lines of the table; the pruned network keeps its size while it recovers."""
        sizes = {which: (f"{self.params[which]:,}", f"{self.macs[which]:,}", f"{self.latency_ms[which]:.3f} ms") for which in self.params}
        percent = {stage: f"{100 * value:.1f} %" for stage, value in self.accuracy.items()}
        return [
            ("dense", percent["dense"], *sizes["dense"]),
            ("pruned", percent["pruned"], *sizes["pruned"]),
            ("+ BatchNorm statistics re-estimated", percent["recalibrated"], "", "", ""),
            (f"+ fine-tuned (epochs: {self.settings['finetune_epochs']})", percent["finetuned"], "", "", ""),
        ]

    def notes(self) -> list[str]:
        """Returns what the table does not say."""
        smaller = {"parameters": self.params, "MACs": self.macs}
        ratios = ", ".join(f"{name} ÷ {sizes['dense'] / sizes['pruned']:.2f}" for name, sizes in smaller.items())
        low, estimate, high = (self.latency_ratio[end] for end in ("low", "estimate", "high"))
        return [
            ", ".join(f"{name.replace('_', '-')} {value:g}" for name, value in self.settings.items()),
            f"{ratios}, latency ÷ {estimate:.2f} ({low:.2f} to {high:.2f}; ONNX Runtime, one thread, one image)",
            f"pruned against masked network: relative error {self.error:.1e}, where the masks have an effect of {self.effect:.1e}",
        ]

    def to_markdown(self) -> str:
        """Returns the summary as a short Markdown page."""
        lines = [HEADINGS, ("---", "---:", "---:", "---:", "---:"), *self.rows()]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        notes = "\n".join(f"- {note}" for note in self.notes())
        return f"# {TITLE}\n\n{table}\n\n{notes}\n"

    def __rich__(self) -> Table:
        """Returns the summary as a table for the terminal."""
        table = Table(title=TITLE, caption="\n".join([*self.notes(), f"files in {self.folder}"]), caption_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
        for cells in self.rows():
            table.add_row(*cells)
        return table


def run(
    out: Path,
    *,
    sparsity: float = 0.5,
    seed: int = 0,
    depth: int = 20,
    epochs: int = 12,
    finetune_epochs: int = 5,
    data: Digits | None = None,
    progress: Progress | None = None,
) -> DemoSummary:
    """Trains, prunes, recovers, exports and measures the network, and writes everything into one folder.

    The files (``dense.onnx``, ``pruned.onnx``, ``pruned.safetensors``, ``summary.json``, ``summary.md``) appear when all is done.

    Args:
        out: the folder; made when absent, other files in it stay.
        sparsity: fraction of the channels to remove, in [0, 1).
        seed: of weights, order of images and shifts.
        depth: of the network, 6n + 2.
        epochs: of training.
        finetune_epochs: of training after pruning.
        data: the images; scikit-learn's digits by default.
        progress: told (stage, done, total); the stages are "train", "prune", "fine-tune", "measure".

    Raises:
        ConfigError: `sparsity`, `depth` or a number of epochs is out of range.
        InputError: scikit-learn is not installed.
        FileError: the folder cannot be written; raised before the training starts.
    """
    check_sparsity(sparsity, "sparsity")
    if min(epochs, finetune_epochs) < 0:
        raise ConfigError(f"{min(epochs, finetune_epochs)} epochs cannot be trained", "Choose 0 or more")
    dense, seconds = build(depth, seed), dict[str, float]()
    settings = {"sparsity": sparsity, "seed": seed, "depth": depth, "epochs": epochs, "finetune_epochs": finetune_epochs}
    with _collected(out) as folder, _half_of_the_threads():
        data = data or load_digits()
        example = data.test_images[:1]
        with _timed("train", seconds):
            train(dense, data, epochs=epochs, lr=LR, seed=seed, progress=progress)
        with _timed("prune", seconds, progress):
            small, report = gp.prune(dense, example, sparsity=sparsity, criterion="l1")
        accuracies = {"dense": accuracy(dense, data), "pruned": accuracy(small, data)}
        with _timed("fine-tune", seconds):
            gp.recalibrate(small, data.train_images.split(BATCH))
            accuracies["recalibrated"] = accuracy(small, data)
            train(small, data, epochs=finetune_epochs, lr=FINETUNE_LR, seed=seed + 1, progress=progress, stage="fine-tune")
            accuracies["finetuned"] = accuracy(small, data)
        models = {"dense": dense, "pruned": small}
        with _timed("measure", seconds, progress):
            latency = _latency(models, example, folder)
        costs = {name: gp.count(model, example) for name, model in models.items()}
        params, macs = {name: cost.params for name, cost in costs.items()}, {name: cost.macs for name, cost in costs.items()}
        summary = DemoSummary(str(out), settings, accuracies, params, macs, *latency, report.error, report.effect, seconds)
        gp.save(small, folder / "pruned.safetensors")
        (folder / "summary.json").write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")
        (folder / "summary.md").write_text(summary.to_markdown(), encoding="utf-8")
    return summary


@contextlib.contextmanager
def _collected(out: Path) -> Iterator[Path]:
    """Gives a temporary folder inside `out`, whose files move to `out` when all went well; leaves no trace otherwise."""
    missing: list[Path] = []
    try:
        missing += [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".demo-", dir=out))
    except OSError as error:
        _remove_empty(missing)
        raise FileError(f"the folder {out} cannot be written: {error.strerror}", "Choose another folder with --out") from error
    try:
        yield staging
        for file in sorted(staging.iterdir()):  # the summary comes last, so where there is one, there is the rest
            file.replace(out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(missing)


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, innermost first, that exist and are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


@contextlib.contextmanager
def _half_of_the_threads() -> Iterator[None]:
    """Lets PyTorch use half of its threads, at least one.

    Threads that share an operator wait for each other in busy loops: on two cores, beside one other busy program, training took 270 s
    with two threads and 45 s with one; on idle cores 25 s and 45 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _timed(stage: str, seconds: dict[str, float], progress: Progress | None = None) -> Iterator[None]:
    """Notes how long the stage took; `progress`, for stages that do not count their own steps, is told 0 and 1 of 1."""
    if progress:
        progress(stage, 0, 1)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
    if progress:
        progress(stage, 1, 1)


def _latency(models: dict[str, nn.Module], example: Tensor, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Exports the models as ``<name>.onnx``; returns their median latency in milliseconds, and dense over pruned with its interval."""
    paths = {name: folder / f"{name}.onnx" for name in models}
    for name, model in models.items():
        gp.export_onnx(model, example, paths[name])
    report = gp.measure_latency(paths, baseline="dense", threads=1)
    pruned = report["pruned"]
    ratio = {"low": pruned.ratio_low, "estimate": pruned.ratio, "high": pruned.ratio_high}
    return {row.name: row.median_ms for row in report.rows}, ratio
