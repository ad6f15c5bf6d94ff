"""A budget of measured milliseconds: NetAdapt comes down to it, and the model that it returns is as fast as it was found to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp

TARGET = 0.6  # of the dense model's milliseconds


@pytest.mark.slow
def test_netadapt_comes_down_to_a_share_of_the_measured_latency(tmp_path: Path) -> None:
    """Timed side by side, the result takes about that share of the dense model's time, by widths that the timing alone decided on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10)).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x).detach()
    milliseconds = gp.OnnxLatency(x, rounds=9)
    target = TARGET * milliseconds(model)

    def closeness(small: nn.Module) -> float:
        return -float((small(x) - expected).detach().square().mean())

    shape = {"op_types": ["Conv2d"]}
    pruner = gp.NetAdaptPruner(
        model, [shape], None, closeness, sparsity_per_iteration=0.2, example_inputs=x, cost=milliseconds, target=target, folder=tmp_path
    )
    small, _ = gp.speedup(*pruner.compress())
    assert pruner.reason == "the budget is met"
    assert pruner.steps[-1].after <= target < pruner.steps[0].before
    assert gp.count(small, x).macs < 0.9 * gp.count(model, x).macs
    for name, network in (("dense", model), ("small", small)):
        gp.export_onnx(network, x, tmp_path / f"{name}.onnx", check=False)
    report = gp.measure_latency({name: tmp_path / f"{name}.onnx" for name in ("dense", "small")}, rounds=15)
    assert report["small"].ratio > 1.15
