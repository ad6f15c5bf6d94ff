"""Measures movement pruning against magnitude pruning on text: half of the attention heads and of the feed-forward neurons go.

    python tools/movement.py                        # one trained model, two seeds; about half an hour on one processor core
    python tools/movement.py --seeds 0 --steps 400 --tune-steps 100 --final-steps 100      # a look; about three minutes

A causal transformer over bytes (see `tests.support.bytes`) learns the source text of Python's standard library. Then each way of pruning
gets the same further steps, on the same batches with the same optimizers and learning rates: first `--tune-steps` with a constant learning
rate, then `--final-steps` with a falling one.

    movement   in the first part masks follow the learned scores (a tenth of it is warm-up), and then what they mask is removed
    l1         the dense model is trained in the first part, and then those with the smallest L1 norm of their weights are removed
    random     the same, at random
    l1 first   those with the smallest L1 norm are removed before the first part already
    dense      nothing is removed

Every block loses half of its heads and half of its neurons, so the pruned models are of equal size. The loss is the mean cross-entropy of
the next byte on files that were not trained on. One seed draws one order of batches (and the random choice) of the further steps.

The folder `--out` keeps the trained model, so that a second run starts from it, and holds `movement.json` and `movement.md`.

Exit code: 0; 2 where it could not be measured.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _environment import INTERRUPTED, ROOT, UNUSABLE, enter

sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from tests.support.bytes import Batches, Text

WAYS = ("movement", "l1", "random", "l1 first", "dense")
CONFIG = [{"sparsity": 0.5, "op_partial_names": ["attention.q", "attention.k", "attention.v", ".up"]}]
LR, TUNE_LR = 1e-3, 5e-4


@dataclass(frozen=True)
class Result:
    """What one way came to with one seed.

    Attributes:
        way: one of `WAYS`.
        seed: of the further steps.
        params: parameters of the result.
        macs: of one text.
        at_once: loss directly after pruning.
        loss: in the end, nats per byte.
        seconds: of pruning and training.
        error: largest difference between the small and the masked model, where masks came first.
    """

    way: str
    seed: int
    params: int
    macs: int
    at_once: float | None
    loss: float
    seconds: float
    error: float | None


@dataclass(frozen=True, eq=False)
class Course:
    """One way to train: AdamW over fixed batches, with a learning rate that falls to 0 in equal steps, or stays.

    Attributes:
        batches: in order.
        lr: the first learning rate.
        falling: whether it falls.
    """

    batches: Batches
    lr: float
    falling: bool = True

    def optimizer(self, parameters: Any) -> Optimizer:
        """Returns the optimizer."""
        import torch

        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01)

    def __call__(self, model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        """Trains over all batches, once."""
        model.train()
        for step, (text, following) in enumerate(self.batches):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / self.batches.steps if self.falling else 1)
            optimizer.zero_grad()
            criterion(model(text), following).backward()
            optimizer.step()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="movement.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3, help="blocks of the transformer (default 3)")
    parser.add_argument("--width", type=int, default=128, help="channels between blocks, a multiple of 16 (default 128)")
    parser.add_argument("--steps", type=int, default=1500, help="of training (default 1500)")
    parser.add_argument("--tune-steps", type=int, default=500, help="further steps, in which movement pruning prunes (default 500)")
    parser.add_argument("--final-steps", type=int, default=500, help="last steps of every way (default 500)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="SEED", help="of the further steps (default: 0 1)")
    parser.add_argument("--out", type=Path, default=Path("movement-out"), help="folder (default: movement-out)")
    options = parser.parse_args(arguments)
    if min(options.layers, options.steps, options.final_steps) < 1 or options.tune_steps < 10:
        parser.error("--layers, --steps and --final-steps must be at least 1, --tune-steps at least 10")
    if options.width < 16 or options.width % 16:
        parser.error("--width must be a multiple of 16")
    return options


def trained(options: argparse.Namespace, text: Text) -> nn.Module:
    """Returns the model, trained, or as an earlier run left it."""
    import torch
    from safetensors.torch import load_file, save_file

    from graphprune.runs.atomic import atomic
    from tests.support.bytes import Batches, ByteTransformer, next_byte

    torch.manual_seed(0)
    model = ByteTransformer(options.layers, options.width)
    path = options.out / f"trained-{options.layers}-{options.width}-{options.steps}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    course = Course(Batches(text.train, options.steps, seed=1), LR)
    course(model, course.optimizer(model.parameters()), next_byte)
    with atomic(path) as temporary:
        save_file(model.state_dict(), temporary)
    return model


def removed(way: str, seed: int, model: nn.Module, example: Any) -> tuple[nn.Module, float]:
    """Returns a small model, half of its heads and neurons removed by norm or at random, and by how much it differs from the masked one."""
    import graphprune as gp

    small, report = gp.speedup(*gp.Pruner(model, CONFIG, gp.Random(seed=seed) if way == "random" else gp.L1(), example).compress())
    return small, report.error


def moved(model: nn.Module, course: Course, example: Any) -> tuple[nn.Module, float]:
    """Returns the same by movement pruning, which trains."""
    import graphprune as gp
    from tests.support.bytes import next_byte

    steps = course.batches.steps
    shape: dict[str, Any] = {"sparse_granularity": "channels", "example_inputs": example}
    pruner = gp.MovementPruner(model, CONFIG, course, course.optimizer, next_byte, steps // 10, steps, **shape)
    small, report = gp.speedup(*pruner.compress(), plan=pruner.plan)
    return small, report.error


def measure(way: str, seed: int, model: nn.Module, text: Text, steps: tuple[int, int]) -> Result:
    """Prunes a copy one way, trains it, and measures it."""
    import torch

    import graphprune as gp
    from tests.support.bytes import Batches, held_out_loss, next_byte

    example = text.held_out[None, :128]
    tuning = Course(Batches(text.train, steps[0], seed=100 + seed), TUNE_LR, falling=False)
    ending = Course(Batches(text.train, steps[1], seed=200 + seed), TUNE_LR)
    start, at_once, error = time.perf_counter(), None, None
    torch.manual_seed(seed)
    small = copy.deepcopy(model)
    if way == "l1 first":
        small, error = removed(way, seed, small, example)
        at_once = held_out_loss(small, text.held_out)
    if way == "movement":
        small, error = moved(small, tuning, example)
    else:
        tuning(small, tuning.optimizer(small.parameters()), next_byte)
    if way in {"l1", "random"}:
        small, error = removed(way, seed, small, example)
    at_once = held_out_loss(small, text.held_out) if at_once is None and way != "dense" else at_once
    ending(small, ending.optimizer(small.parameters()), next_byte)
    seconds = time.perf_counter() - start
    cost = gp.count(small, example)
    return Result(way, seed, cost.params, cost.macs, at_once, held_out_loss(small, text.held_out), seconds, error)


def table(before: float, results: list[Result]) -> str:
    """Returns the results as Markdown, means over seeds."""
    rows = [f"before pruning: {before:.4f} nats per byte\n", "| way | parameters | MACs | loss at once | loss in the end | by seed | s |"]
    rows.append("|---|---:|---:|---:|---:|---|---:|")
    for way in dict.fromkeys(result.way for result in results):
        found = [result for result in results if result.way == way]
        mean = sum(result.loss for result in found) / len(found)
        first = [result.at_once for result in found if result.at_once is not None]
        at_once = f"{sum(first) / len(first):.4f}" if first else ""
        each, seconds = ", ".join(f"{result.loss:.4f}" for result in found), sum(result.seconds for result in found) / len(found)
        rows.append(f"| {way} | {found[0].params:,} | {found[0].macs:,} | {at_once} | {mean:.4f} | {each} | {seconds:.0f} |")
    return "\n".join(rows) + "\n"


def write(path: Path, text: str) -> None:
    """Writes a file by a temporary name."""
    from graphprune.runs.atomic import atomic

    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    import torch

    from tests.support.bytes import held_out_loss, standard_library

    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        text = standard_library()
        model = trained(options, text)
        before = held_out_loss(model, text.held_out)
        print(f"{text.train.numel():,} bytes to train on; loss on other files {before:.4f}", file=sys.stderr, flush=True)
        results = []
        for seed in options.seeds:
            for way in WAYS:
                results.append(measure(way, seed, model, text, (options.tune_steps, options.final_steps)))
                print(results[-1], file=sys.stderr, flush=True)
                record = {"before": before, "results": [asdict(result) for result in results]}
                write(options.out / "movement.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    written = table(before, results)
    print(written)
    write(options.out / "movement.md", written)
    return 0


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
