"""Networks, what is left of them once they are pruned, and threads that disturb, for tests of several threads at once."""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp


class Heads(nn.Module):
    """Attention whose code computes the width of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.query, self.out, self.classes = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 4) for (batch, steps, 16)."""
        batch, steps, _ = x.shape
        q = self.query(x).view(batch, steps, self.heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(batch, steps, -1)
        result: Tensor = self.classes(self.out(mixed).mean(1))
        return result


class Listing(nn.Module):
    """Takes values out of tensors, by `tolist` and by `numpy`, and decides by them; a head runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last, self.more = nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 4), nn.Linear(24, 3)
        self.drop = nn.Dropout(0.5)
        self.order: Tensor
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor) -> Any:
        """Returns (batch, 4) for (batch, steps, 16), in training with (batch, 3)."""
        steps = int(self.order.numpy()[0]) + len(self.order.tolist()) - 4
        hidden = self.first(x[:, :steps].mean(1)).relu()
        hidden = self.drop(self.second(hidden)).relu()
        return (self.last(hidden), self.more(hidden)) if self.training else self.last(hidden)


class Noisy(nn.Module):
    """Draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 4) for (batch, steps, 16)."""
        hidden = self.first(x.mean(1)).relu()
        result: Tensor = self.last(F.dropout(hidden, 0.3, training=True) + 0.1 * torch.rand_like(hidden))
        return result


def convolutions() -> nn.Module:
    """Returns convolutions with BatchNorm on (batch, 5, 16)."""
    layers = [(nn.Conv1d(5, 12, 3, padding=1), nn.BatchNorm1d(12)), (nn.Conv1d(12, 12, 3, padding=1), nn.BatchNorm1d(12))]
    return nn.Sequential(*(m for pair in layers for m in (*pair, nn.ReLU())), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 4))


def encoder() -> nn.Module:
    """Returns a layer that has a fused path in evaluation mode, on (batch, 5, 16)."""
    return nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, batch_first=True)


NETWORKS: Sequence[Callable[[], nn.Module]] = (convolutions, Heads, Listing, Noisy, encoder)
SHAPE = (2, 5, 16)
_SEED = 11


def networks() -> list[nn.Module]:
    """Returns one network of each kind, the same on every call."""
    made = []
    for seed, build in enumerate(NETWORKS):
        torch.manual_seed(seed)
        made.append(build().eval())
    return made


def example() -> Tensor:
    """Returns an input for all of them."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))


def pruned(model: nn.Module, **options: Any) -> str:
    """Prunes a network, and returns what came of it, to the last bit: kind, error, effect and every tensor."""
    small, report = gp.prune(model, example(), **options)
    return digest([(report.kind, report.error, report.effect, report.reason)], small.state_dict())


def digest(facts: Sequence[Any], tensors: dict[str, Tensor]) -> str:
    """Returns facts with a hash of tensors."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        total.update(bytes(tensor.detach().reshape(-1).contiguous().view(torch.uint8).tolist()))
    return f"{facts} {total.hexdigest()[:16]}"


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs tasks in a thread each, all at once; returns what they return, or raise."""
    results: list[Any] = [None] * len(tasks)
    start = threading.Barrier(len(tasks))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = tasks[number]()
        except Exception as error:  # noqa: BLE001 (returned, for the test to look at)
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@contextmanager
def disturbed(*more: Callable[[], object]) -> Iterator[list[str]]:
    """Lets another thread take values, run attention and models, warn and log all the while; yields the list of what went wrong there."""
    stop, wrong = threading.Event(), []
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        fused, x = encoder().eval(), example()
    with torch.no_grad():
        expected = [model(x), F.scaled_dot_product_attention(x, x, x), fused(x)]

    def disturb() -> None:
        rounds = 0
        while not stop.is_set():
            rounds += 1
            try:
                if x[0, 0].tolist() != list(x[0, 0].numpy()):
                    wrong.append("values")
                with torch.no_grad():
                    found = [model(x), F.scaled_dot_product_attention(x, x, x), fused(x)]
                wrong.extend(f"result {n}" for n, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b))
                for each in more:
                    each()
            except Exception as error:  # noqa: BLE001 (returned, for the test to look at)
                wrong.append(f"{type(error).__name__}: {error}")
            stop.wait(0.0005)
        if not rounds:
            wrong.append("nothing ran")

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield wrong
    finally:
        stop.set()
        thread.join()


def rounds(threads: int, count: int) -> tuple[int, list[str]]:
    """Prunes every network `count` times in each of several threads, in different orders, while another thread disturbs.

    Returns:
        How many results are equal, to the last bit, to those of one network after the other; and what went wrong.
    """
    once, made = networks(), [networks() for _ in range(threads)]
    torch.manual_seed(_SEED)
    before = torch.get_rng_state()
    expected = [pruned(model) for model in once]

    def work(models: list[nn.Module], first: int) -> int:
        order = [(first + at) % len(models) for at in range(len(models))]
        return sum(pruned(models[at]) == expected[at] for _ in range(count) for at in order)

    with disturbed() as wrong:
        results = together([functools.partial(work, models, number) for number, models in enumerate(made)])
    if not torch.equal(torch.get_rng_state(), before):
        wrong.append("the random numbers go on elsewhere")
    wrong += [f"{type(r).__name__}: {r}" for r in results if isinstance(r, Exception)]
    return sum(r for r in results if isinstance(r, int)), wrong


def talk(log: logging.Logger) -> None:
    """Logs and warns."""
    log.warning("logged")
    warnings.warn("warned", RuntimeWarning, stacklevel=2)
