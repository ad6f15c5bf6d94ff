"""Normalisations: per-channel parameters follow their channels, statistics across channels change the verdict."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from tests.support.operators import Case, check, conv, let, normal, sequences, table

A = "a.bias/0 a.weight/0"


def standardised(w: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Returns a weight whose output channels have mean 0 and the deviation `gain`, by way of a batch norm."""
    return functional.batch_norm(w.reshape(1, w.shape[0], -1), None, None, gain, training=True, momentum=0.0).reshape_as(w)


NORM = "norm.bias/0 norm.weight/0"
STATISTICS = "norm.running_mean/0 norm.running_var/0"


def unit(w: torch.Tensor) -> torch.Tensor:
    """Returns a weight whose output channels have norm 1."""
    out: torch.Tensor = w / torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True)
    return out


def spatial(name: str, norm: nn.Module, groups: list[str], **options: Any) -> Case:
    """Returns a case with a norm between two convolutions."""
    return Case(name, lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), {"a": conv(3, 8), "norm": norm, "b": conv(8, 4)}, groups,
                kind="module", **options)  # fmt: skip


def linear(name: str, norm: nn.Module, groups: list[str], width: int = 8, **options: Any) -> Case:
    """Returns a case with a norm between two linear layers."""
    parts = {"a": options.pop("layer", nn.Linear(4, width)), "norm": norm, "b": nn.Linear(width, 4)}
    return Case(name, lambda m, x: m.b(torch.tanh(m.norm(m.a(x)))), parts, groups, inputs=sequences, **options)


CASES = [
    spatial("batch norm", nn.BatchNorm2d(8), [f"8 exact: {A} b.weight/1 {NORM} {STATISTICS}"]),
    spatial("batch norm without affine", nn.BatchNorm2d(8, affine=False), [f"8 exact: {A} b.weight/1 {STATISTICS}"]),
    spatial("batch norm of the batch", nn.BatchNorm2d(8, track_running_stats=False), [f"8 exact: {A} b.weight/1 {NORM}"]),
    spatial("instance norm", nn.InstanceNorm2d(8, affine=True), [f"8 exact: {A} b.weight/1 {NORM}"]),
    Case("instance norm without parameters", lambda m, x: m.b(torch.relu(functional.instance_norm(m.a(x)))), {"a": conv(3, 8), "b": conv(8,
         4)},
         [f"8 exact: {A} b.weight/1"], kind="module"),
    spatial("instance norm with statistics", nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            [f"8 exact: {A} b.weight/1 {NORM} {STATISTICS}"]),
    spatial("group norm, 2 of 8", nn.GroupNorm(2, 8), [f"4 changed within: {A} b.weight/1 {NORM}".replace("/0", "/0*2").replace("/1",
         "/1*2"),
            f"2 exact block: {A} b.weight/1 {NORM}".replace("/0", "/0*4").replace("/1", "/1*4")]),
    spatial("group norm, one channel each", nn.GroupNorm(8, 8), [f"8 exact: {A} b.weight/1 {NORM}"]),
    spatial("group norm, one group", nn.GroupNorm(1, 8), [f"8 changed: {A} b.weight/1 {NORM}"]),
    spatial("group norm without affine", nn.GroupNorm(1, 8, affine=False), [f"8 changed: {A} b.weight/1"], reference="never"),
    Case("batch norm 1d", lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), {"a": nn.Linear(4, 8), "norm": nn.BatchNorm1d(8),
         "b": nn.Linear(8, 4)}, [f"8 exact: {A} b.weight/1 {NORM} {STATISTICS}"], inputs=lambda n: normal(n, 4), kind="module"),
    Case("batch norm 3d", lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), {"a": nn.Conv3d(3, 8, 1), "norm": nn.BatchNorm3d(8),
         "b": nn.Conv3d(8, 4, 1)}, [f"8 exact: {A} b.weight/1 {NORM} {STATISTICS}"], inputs=lambda n: normal(n, 3, 2, 3, 3), kind="module"),
    Case("one batch norm twice", lambda m, x: m.b(torch.relu(m.norm(m.a(x)) + m.norm(m.c(x)))), {"a": conv(3, 8), "c": conv(3, 8),
         "norm": nn.BatchNorm2d(8), "b": conv(8, 4)}, [f"8 exact: {A} b.weight/1 c.bias/0 c.weight/0 {NORM} {STATISTICS}"], kind="module"),
    Case("batch norm on the input", lambda m, x: m.b(torch.relu(m.a(m.norm(x)))), {"norm": nn.BatchNorm2d(3), "a": conv(3, 8),
         "b": conv(8, 4)}, [f"8 exact: {A} b.weight/1"], {"norm.weight/0": "input of the model"}, kind="module"),
    Case("batch norm before the activation", lambda m, x: m.b(torch.relu(m.norm(torch.sigmoid(m.a(x))))), {"a": conv(3, 8),
         "norm": nn.BatchNorm2d(8), "b": conv(8, 4)}, [f"8 exact: {A} b.weight/1 {NORM} {STATISTICS}"], kind="module"),
    linear("layer norm", nn.LayerNorm(8), [f"8 changed: {A} b.weight/1 {NORM}"], kind="module"),
    linear("layer norm without bias", nn.LayerNorm(8, bias=False), [f"8 changed: {A} b.weight/1 norm.weight/0"], kind="module"),
    linear("layer norm without affine", nn.LayerNorm(8, elementwise_affine=False), [f"8 changed: {A} b.weight/1"], reference="never",
         kind="module"),
    linear("rms norm", nn.RMSNorm(8), [f"8 changed: {A} b.weight/1 norm.weight/0"], kind="module"),
    Case("layer norm of two dimensions", lambda m, x: m.b(torch.tanh(m.norm(m.a(x).flatten(2)))), {"a": conv(3, 8),
         "norm": nn.LayerNorm([8, 36]), "b": nn.Conv1d(8, 4, 1)}, [f"8 changed: {A} b.weight/1 {NORM}"], kind="module"),
    Case("layer norm of channels first", lambda m, x: m.b(functional.layer_norm(m.a(x).permute(0, 2, 3, 1), [8], m.w, m.v)),
         {"a": conv(3, 8), "w": table(8), "v": table(8), "b": nn.Linear(8, 4)}, [f"8 changed: {A} b.weight/1 v/0 w/0"], kind="graph"),
    Case("layer norm of space", lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), {"a": conv(3, 8), "norm": nn.LayerNorm(6), "b": conv(8, 4)},
         [f"8 exact: {A} b.weight/1"], {"norm.weight/0": "("}, kind="module"),
    Case("layer norm of space, then a sum", lambda m, x: m.b(m.norm(torch.sigmoid(m.a(x))).sum(1, keepdim=True)), {"a": conv(3, 8),
         "norm": nn.LayerNorm(6), "b": conv(1, 4)}, [f"8 changed: {A}"], kind="module"),
    Case("layer norm by hand", lambda m, x: m.b(let(m.a(x), lambda y: (y - y.mean(-1, keepdim=True)) / (y.var(-1,
         keepdim=True) + 1e-5).sqrt())),
         {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4)}, [f"8 changed: {A} b.weight/1"], inputs=sequences, kind="module"),
    Case("native layer norm", lambda m, x: m.b(torch.native_layer_norm(m.a(x), [8], m.w, m.v, 1e-5)[0]), {"a": nn.Linear(4, 8),
         "w": table(8), "v": table(8), "b": nn.Linear(8, 4)}, [f"8 changed: {A} b.weight/1 v/0 w/0"], inputs=sequences, kind="graph",
         reference="never"),
    Case("native group norm", lambda m, x: m.b(torch.native_group_norm(m.a(x), m.w, m.v, x.shape[0], 8, 36, 1, 1e-5)[0]), {"a": conv(3, 8),
         "w": table(8), "v": table(8), "b": conv(8, 4)}, [f"8 changed: {A} b.weight/1 v/0 w/0"], reference="never", kind="graph"),
    Case("native batch norm", lambda m, x: m.b(torch.native_batch_norm(m.a(x), m.w, m.v, m.running_mean, m.running_var, False, 0.1,
         1e-5)[0]),
         {"a": conv(3, 8), "w": table(8), "v": table(8), "running_mean": torch.zeros(8), "running_var": torch.ones(8), "b": conv(8, 4)},
         [f"8 exact: {A} b.weight/1 running_mean/0 running_var/0 v/0 w/0"], kind="module"),
    linear("weight norm", nn.Identity(),
         ["8 exact: a.bias/0 a.parametrizations.weight.original0/0 a.parametrizations.weight.original1/0 b.weight/1"],
           layer=nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), reference="never"),
    Case("batch norm of a weight", lambda m, x: m.b(torch.relu(functional.conv2d(torch.relu(m.a(x)), standardised(m.w, m.g)))),
         {"a": conv(3, 8), "w": table(6, 8, 3, 3), "g": table(6), "b": conv(6, 4)}, [f"8 changed: {A} w/1", "6 exact: b.weight/1 g/0 w/0"]),
    Case("batch norm of a weight, over channels that are not zero",
         lambda m, x: m.b(torch.sigmoid(functional.conv2d(torch.sigmoid(m.a(x)), standardised(m.w, m.g)))),
         {"a": conv(3, 8), "w": table(6, 8, 3, 3), "g": table(6), "b": conv(6, 4)}, [f"8 changed: {A} w/1", "6 exact: b.weight/1 g/0 w/0"]),
    Case("batch norm of pixels as channels", lambda m, x: m.b(functional.batch_norm(m.a(x).flatten(2).transpose(1, 2), None, None,
         training=True).transpose(1, 2).unflatten(2, (6, 6))), {"a": conv(3, 8), "b": conv(8, 4)}, [f"8 changed: {A} b.weight/1"]),
    Case("instance norm of pixels as instances", lambda m, x: m.b(functional.instance_norm(m.a(x).permute(0, 2, 1, 3))
         .permute(0, 2, 1, 3)), {"a": conv(3, 8), "b": conv(8, 4)}, [f"8 changed: {A} b.weight/1"], kind="module"),
    Case("standardised weight of a grouped convolution", lambda m, x: m.b(functional.conv2d(torch.sigmoid(m.a(x)), m.w - m.w.mean((1, 2, 3),
         keepdim=True), groups=2)), {"a": conv(3, 8), "w": table(6, 4, 3, 3), "b": conv(6, 4)},
         ["2 exact block: a.bias/0*4 a.weight/0*4 b.weight/1*3 w/0*3", "3 exact within: b.weight/1*2 w/0*2",
          "4 changed within: a.bias/0*2 a.weight/0*2 w/1"]),
    Case("standardised weight of a transposed convolution", lambda m, x: m.b(functional.conv_transpose2d(torch.sigmoid(m.a(x)),
         m.w - m.w.mean((1, 2, 3), keepdim=True))), {"a": conv(3, 8), "w": table(8, 6, 3, 3), "b": conv(6, 4)},
         [f"8 changed: {A} w/0", "6 changed: b.weight/1 w/1"]),
    Case("spectral norm", lambda m, x: m.b(torch.tanh(m.n(torch.tanh(m.a(x))))), {"a": nn.Linear(4, 8),
         "n": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), "b": nn.Linear(6, 4)},
         [f"8 exact: {A} n.parametrizations.weight.0._v/0 n.parametrizations.weight.original/1",
          "6 exact: b.weight/1 n.bias/0 n.parametrizations.weight.0._u/0 n.parametrizations.weight.original/0"], inputs=sequences),
    Case("weights scaled to length one", lambda m, x: m.b(torch.relu(functional.conv2d(torch.relu(m.a(x)), unit(m.w)))), {"a": conv(3, 8),
         "w": table(6, 8, 3, 3), "b": conv(6, 4)}, [f"8 exact: {A} w/1", "6 exact: b.weight/1 w/0"], reference="never"),
    Case("correlations", lambda m, x: m.b(torch.relu(m.a(x))) @ let(m.a(x), lambda y: m.b(torch.corrcoef(y.T))).T @ m.v,
         {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4), "v": table(8, 3)}, [f"8 exact: {A} b.weight/1 v/0", "4 exact: b.bias/0 b.weight/0"],
         inputs=lambda n: normal(n + 3, 4), reference="never"),
    Case("local response norm", lambda m, x: m.b(functional.local_response_norm(m.a(x), 3)), {"a": conv(3, 8), "b": conv(8, 4)}, [],
         {"a.weight/0": "("}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_normalisation(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


@pytest.mark.parametrize(("norm", "name", "verdict"), [(nn.InstanceNorm2d(8), "num_features", "exact"),
    (nn.BatchNorm2d(8, affine=False, track_running_stats=False), "num_features", "exact"),
    (nn.GroupNorm(1, 8, affine=False), "num_channels", "changed"),
    (nn.GroupNorm(8, 8, affine=False), "num_channels", "exact")])  # fmt: skip
def test_norms_without_tensors(norm: nn.Module, name: str, verdict: str) -> None:
    """A norm that has no tensors of its own is told how many channels are left."""
    case = spatial("norm without tensors", norm, [f"8 {verdict}: {A} b.weight/1"], reference="auto" if verdict == "exact" else "never")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # instance norms warn of other numbers than theirs
        check(case)
    small, report = gp.prune(case.build(), case.inputs(2), sparsity=0.5)
    assert report.kind == "module"
    assert getattr(small.get_submodule("norm"), name) == 4
