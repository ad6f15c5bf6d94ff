"""The examples: each runs from any folder, writes only where it was told to, and shows what it promises."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
EXAMPLES: Final = sorted((ROOT / "examples").glob("*.py"))
SECONDS: Final = 120  # far above what any of them takes, even on a busy machine

# What an example must print, as patterns, and the files that it must write.
PROMISES: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "config_lists": (
        (r"conv1: keeps 16 of 16; conv1 is excluded", r"fc1: keeps 8 of 40", r"differ by \d\.\de-(0[6-9]|1\d)|differ by 0\.0e\+00",
         r"refused: .*'conv3'.*did you mean 'conv2'\?"),
        ("masks.safetensors",),
    ),
    "custom_operator": (
        (r"without a rule: conv1 with 16 channels\n", r"example::channel_norm freezes 24 channels",
         r"with a rule: conv1 with 16 channels, conv2 with 24 channels", r"gain has 8 of 16 entries"),
        ("small.safetensors",),
    ),
    "inspect_dependencies": (
        (r"  stem: 16 channels, exact", r"norm\.weight dim 0, 2 per channel, first \[0, 16\]", r"is picked by a literal position",
         r"Order of the layers: stem inner outer depthwise norm gate head"),
        ("dependencies.json",),
    ),
    "prune_attention": (
        (r"blocks: rows q 24, k 12, v 12; result module", r"heads 4, key heads 2, width of a head 6", r"query_key: rows q 24, k 12, v 24",
         r"value: rows q 48, k 24, v 12"),
        ("blocks.safetensors", "query_key.safetensors", "value.safetensors"),
    ),
    "prune_residual": (
        (r"parameters .*75,370 .*19,258", r"Verified: error", r"small is \d+\.\d\d times as fast as dense"),
        ("dense.onnx", "small.onnx"),
    ),
    "prune_then_finetune": (
        (r"dense: +\d+\.\d%", r"recalibrated: +\d+\.\d%", r"fine-tuned: +(\d+\.\d%)(.|\n)*loaded again: \1; ResidualNetwork"),
        ("small.safetensors",),
    ),
    "pruners": (
        (r"trained: (9\d|100)\.\d%", r"FPGMPruner: sparsity 3\d\.\d%", r"ADMMPruner: sparsity", r"LevelPruner: sparsity 80\.0%",
         r"the trained model is as it was: True", r"hessian: 50\.0% of the MACs asked, 5\d\.\d% gone"),
        ("summary.json",),
    ),
    "published_recipes": (
        (r"VGG-16-A +before +313,463,808 +14,987,722\n +after +206,279,680 +2\.06e8 +34\.2% +34\.2 % +5,397,034 +5\.4e6 +64\.0% +64\.0 %",
         r"ResNet-56-A +before +125,485,696 +853,018\n +after +112,435,840 +1\.12e8 +10\.4% +10\.4 % +773,336 +7\.7e5",
         r"ResNet-56-B(.|\n)* after +90,907,264 +9\.09e7 +27\.6% +27\.6 % +735,712 +7\.3e5"),
        ("recipes.json",),
    ),
    "schedules": (
        (r"trained: 9\d\.\d% right", r"AGP, epoch 0: 0\.0% of the channels masked", r"AGP, epoch 5: 50\.0% of the channels masked, 9\d\.",
         r"AGP: 77,754 parameters, 19,810 are left, error \d\.?\d*e-(0[6-9]|1\d)", r"AGP, one epoch more with the same optimizer: 9\d\.",
         r"│ +4 │ 90\.0% │ +90\.0% │ +8,394 │", r"lottery ticket: best 9\d\.\d% at \d\d\.\d%, last 9\d\.\d% at 90\.0%",
         r"movement, epoch 6: 50\.0% of the scores", r"movement: (193,344 MACs), 9\d\.\d% right\nsmallest norms: \1, 9\d\.\d% right"),
        ("agp.safetensors", "lottery", "movement.safetensors"),
    ),
    "searches": (
        (r"trained: 9\d\.\d% right, 763,520 MACs\n6 groups", r"annealing: best \d\d\.\d% \(trial \d+\), last \d\d\.\d%; \d+ of the first",
         r"TPE: goes on behind 12 trials\nTPE: best \d\d\.\d% \(trial \d+ of 24\), last", r"NetAdapt, step 0: \d+ channels of \S+, \d{3},",
         r"uniform: (39|40)\.\d% of the MACs left", r"NetAdapt: (3\d|40)\.\d% of the MACs left, \d\d\.\d% recalibrated, 9\d\.\d% trained",
         r"front: \d+,\d{3} MACs, \d\d\.\d%\nfront: "),
        ("annealing.png", "front.csv", "front.png", "runs", "study.db"),
    ),
    "sensitivity": (
        (r"trained: (9\d|100)\.\d%", r"third +│ +64 │", r"evaluations: [1-9]\d*, and 0 the second time",
         r"round 2: \d\d\.\d% of the MACs gone \(first", r"by sensitivity: (39|40)\.\d% of the MACs left, loss \d"),
        ("curves.csv", "curves.png", "scores", "small.safetensors"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of an example.

    Attributes:
        printed: what it printed.
        written: names of the files in the folder that it was given.
        strayed: names of the files in the folder that it was started in.
    """

    printed: str
    written: list[str]
    strayed: list[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Returns a function that runs an example on one core, once in all tests; it must exit with 0."""

    @cache
    def once(name: str) -> Run:
        here = tmp_path_factory.mktemp(name)
        out = tmp_path_factory.mktemp("results") / "new" / "out"
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--out", str(out)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(  # noqa: S603 - our own files
            command, cwd=here, env=environment, capture_output=True, encoding="utf-8", timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return Run(done.stdout, *(sorted(file.name for file in folder.iterdir()) for folder in (out, here)))

    return once


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, run: Callable[[str], Run]) -> None:
    """An example exits with 0, prints its essential lines, and writes its files into --out and nothing beside itself."""
    done = run(path.stem)
    patterns, files = PROMISES[path.stem]
    for pattern in patterns:
        assert re.search(pattern, done.printed), f"{pattern!r} is not in:\n{done.printed}"
    assert done.written == sorted(files)
    assert done.strayed == []


def test_every_example_promises_something() -> None:
    """There is an entry above for every file in examples/, and none for a file that is gone."""
    assert [path.stem for path in EXAMPLES] == sorted(PROMISES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_how_to_start_it(path: Path) -> None:
    """The docstring of an example holds the command that runs it."""
    assert f"python examples/{path.name} [--out DIR]" in path.read_text(encoding="utf-8")


def test_fine_tuning_recovers(run: Callable[[str], Run]) -> None:
    """The accuracies tell the story of the example: pruning hurts, new statistics help, training brings most of it back."""
    found = re.findall(r"^(dense|pruned|recalibrated|fine-tuned): +(\d+\.\d)%", run("prune_then_finetune").printed, re.MULTILINE)
    accuracy = {stage: float(value) for stage, value in found}
    assert accuracy["dense"] > 95
    assert accuracy["pruned"] < accuracy["recalibrated"] - 20
    assert accuracy["fine-tuned"] > 85


def test_sensitivity_beats_uniform(run: Callable[[str], Run]) -> None:
    """At the same MACs, the network that was pruned by sensitivity loses less than the one that was pruned evenly."""
    found = re.findall(r"^(by sensitivity|uniform): .* left, loss (\d\.\d+)", run("sensitivity").printed, re.MULTILINE)
    loss = {name: float(value) for name, value in found}
    assert loss["by sensitivity"] < 0.7 * loss["uniform"]


def test_searches_beat_uniform(run: Callable[[str], Run]) -> None:
    """In the part of the images that searches see, each beats the same sparsity everywhere; on the front, more MACs score higher."""
    printed = run("searches").printed
    found = re.search(r"the same sparsity everywhere: (\d+\.\d)%", printed)
    assert found is not None
    best = {name: float(score) for name, score in re.findall(r"^(annealing|TPE|NetAdapt): best (\d+\.\d)%", printed, re.MULTILINE)}
    assert best.keys() == {"annealing", "TPE", "NetAdapt"}
    assert min(best.values()) > float(found[1]) + 3
    points = re.findall(r"^front: ([\d,]+) MACs, (\d+\.\d)%", printed, re.MULTILINE)
    front = [(int(macs.replace(",", "")), float(score)) for macs, score in points]
    assert len(front) > 4
    assert all(one[0] < two[0] and one[1] < two[1] for one, two in itertools.pairwise(front))
