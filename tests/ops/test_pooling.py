"""Pooling and resampling: channels pass, space does not shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, normal

A = "a.bias/0 a.weight/0"
PLAIN = [f"8 exact: {A} b.weight/1"]
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def pool(rank: int, name: str, operator: Any, groups: list[str] = PLAIN, **options: Any) -> Case:
    """Returns a case that pools 8 channels of 6 (x 6 (x 6)) pixels between two convolutions."""
    layer: Any = CONVOLUTIONS[rank]
    parts = {"a": layer(3, 8, 1), "b": layer(8, 4, 1), **options.pop("extra", {})}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        pooled = operator(m.a(x))
        out: torch.Tensor = m.b(pooled[0] if isinstance(pooled, tuple) else pooled)
        return out

    return Case(f"{name}, {rank}d", run, parts, groups, inputs=lambda n: normal(n, 3, *[6] * rank), **{"kind": "module", **options})


def resize(mode: str, **options: Any) -> Any:
    """Returns an operator that makes space half as large again."""
    return lambda x: functional.interpolate(x, scale_factor=1.5, mode=mode, **options)


def warp(x: torch.Tensor) -> torch.Tensor:
    """Returns x sampled at places that shrink towards the middle."""
    rank = x.ndim - 2
    lines = [torch.linspace(-0.7, 0.7, 5, dtype=x.dtype) for _ in range(rank)]
    grid = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).expand(x.shape[0], *[5] * rank, rank)
    return functional.grid_sample(x, grid, align_corners=False)


def attended(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Samples each of 4 heads at places of its own."""
    y = torch.relu(m.a(x))
    n, heads = x.shape[0], 4
    places = torch.tanh(m.p(x).mean((2, 3))).view(n * heads, 1, 3, 2)
    taken = functional.grid_sample(y.view(n * heads, -1, *y.shape[2:]), places, align_corners=False)
    out: torch.Tensor = m.b(taken.view(n, -1, 1, 3))
    return out


def each(name: str, *operators: Any) -> list[Case]:
    """Returns one case per rank."""
    return [pool(rank, name, operator) for rank, operator in enumerate(operators, start=1)]


CASES = [
    *each("max_pool", *(lambda x, f=f: f(x, 2) for f in (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d))),
    *each("max_pool with indices", *(lambda x, f=f: f(x, 2, return_indices=True) for f in (functional.max_pool1d, functional.max_pool2d,
          functional.max_pool3d))),
    *each("avg_pool", *(lambda x, f=f: f(x, 3, 1, 1) for f in (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d))),
    *each("adaptive_avg_pool", *(lambda x, f=f: f(x, 2) for f in (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
          functional.adaptive_avg_pool3d))),
    *each("adaptive_max_pool", *(lambda x, f=f: f(x, 2) for f in (functional.adaptive_max_pool1d, functional.adaptive_max_pool2d,
          functional.adaptive_max_pool3d))),
    *each("global average", *(lambda x, f=f: f(x, 1) for f in (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d,
          functional.adaptive_avg_pool3d))),
    *each("nearest", *[resize("nearest")] * 3), *each("nearest-exact", *[resize("nearest-exact")] * 3),
    *each("linear", *(resize(mode, align_corners=False) for mode in ("linear", "bilinear", "trilinear"))),
    pool(2, "bicubic", resize("bicubic")), pool(2, "antialiased", resize("bilinear", antialias=True)),
    pool(2, "antialiased bicubic", resize("bicubic", antialias=True)),
    *each("reflection pad", *(lambda x, r=r: functional.pad(x, (1, 2) * r, mode="reflect") for r in (1, 2, 3))),
    *each("replication pad", *(lambda x, r=r: functional.pad(x, (1, 2) * r, mode="replicate") for r in (1, 2, 3))),
    pool(2, "lp_pool", lambda x: functional.lp_pool2d(x.abs() + 0.1, 2, 2)),
    *each("max_unpool", *(lambda x, p=p, u=u: u(*p(x, 2, return_indices=True), 2) for p, u in (
        (functional.max_pool1d, functional.max_unpool1d), (functional.max_pool2d, functional.max_unpool2d),
        (functional.max_pool3d, functional.max_unpool3d)))),
    pool(2, "fractional", lambda x: functional.fractional_max_pool2d(x, 2, 3, _random_samples=torch.full((x.shape[0], 1, 2), 0.4,
         dtype=x.dtype).expand(-1, x.shape[1], -1))),
    pool(3, "fractional", lambda x: functional.fractional_max_pool3d(x, 2, 3, _random_samples=torch.linspace(0.1, 0.9, 24, dtype=x.dtype)
         .view(1, 8, 3).expand(x.shape[0], -1, -1)), [], frozen={"a.weight/0": "random numbers of its own"}, kind=None),
    Case("places per head", attended, {"a": nn.Conv2d(3, 8, 1), "p": nn.Conv2d(3, 24, 1), "b": nn.Conv2d(8, 4, 1)},
         ["2 exact within: a.bias/0*4 a.weight/0*4 b.weight/1*4",
          "4 exact block: a.bias/0*2 a.weight/0*2 b.weight/1*2 p.bias/0*6 p.weight/0*6"]),
    pool(2, "grid_sample", warp), pool(3, "grid_sample", warp),
    pool(2, "adaptive pool of channels as space", lambda x: functional.adaptive_avg_pool1d(x.mean(2).transpose(1, 2), 8).transpose(1,
         2).unsqueeze(2),
         [], frozen={"a.weight/0": "spatial dimension of a pooling"}, kind=None),
    pool(2, "computed sampling places", lambda x: functional.grid_sample(x, torch.tanh(x[:, :2].permute(0, 2, 3, 1)), align_corners=False),
         [f"6 exact: {A} b.weight/1"], frozen={"a.weight/0": "says where to sample"}, kind=None),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooling(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
