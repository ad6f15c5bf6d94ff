"""Losses inside a forward pass: compared per index, they are statistics; classes stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, conv, sequences

A, B = "a.bias/0 a.weight/0", "b.weight/1"
CLASS = {"a.weight/0": "a loss looks up by number"}
BOTH = {"a": conv(3, 8), "c": conv(3, 8), "b": conv(8, 4)}
REDUCTIONS = ("none", "mean", "sum")
LOSSES = (functional.mse_loss, functional.smooth_l1_loss, functional.huber_loss, functional.soft_margin_loss,
          functional.binary_cross_entropy_with_logits, functional.l1_loss)  # fmt: skip


def compared(name: str, loss: Any, reduction: str) -> Case:
    """Returns a case that scales 8 channels by how far they are from 8 others."""
    verdict = "exact" if reduction == "none" else "changed"

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        far = loss(m.a(x), torch.sigmoid(m.c(x)).detach(), reduction=reduction)
        out: torch.Tensor = m.b((m.a(x) + 0.1) * far)
        return out

    return Case(f"{name}, {reduction}", run, BOTH, [f"8 {verdict}: {A} {B} c.bias/0 c.weight/0"])


def scaled(name: str, loss: Any, groups: list[str], **options: Any) -> Case:
    """Returns a case that scales 8 channels by a loss of theirs."""
    return Case(name, lambda m, x: m.b(m.a(x) * loss(m.a(x))), {"a": conv(3, 8), "b": conv(8, 4)}, groups, **options)


CASES = [
    *(compared(loss.__name__, loss, reduction) for loss in LOSSES for reduction in REDUCTIONS),
    scaled("binary_cross_entropy", lambda y: functional.binary_cross_entropy(y.sigmoid(), (y > 0).double()), [f"8 changed: {A} {B}"]),
    scaled("binary_cross_entropy, none", lambda y: functional.binary_cross_entropy(y.sigmoid(), (y > 0).double(), reduction="none"),
           [f"8 exact: {A} {B}"]),
    scaled("cross entropy of channels", lambda y: functional.cross_entropy(y, torch.zeros(y.shape[0], 6, 6, dtype=torch.long)), [],
           frozen=CLASS),
    scaled("cross entropy to channels", lambda y: functional.cross_entropy(y, y.softmax(1)), [f"8 changed: {A} {B}"]),
    scaled("multi_margin_loss", lambda y: functional.multi_margin_loss(y.mean((2, 3)), torch.zeros(y.shape[0], dtype=torch.long)), [],
           frozen=CLASS),
    scaled("multilabel_margin_loss", lambda y: functional.multilabel_margin_loss(y.mean((2, 3)), torch.zeros(y.shape[0], 8,
           dtype=torch.long)), [], frozen=CLASS),
    scaled("ctc_loss", lambda y: functional.ctc_loss(y.flatten(2).permute(2, 0, 1).log_softmax(2), torch.ones(y.shape[0], 3,
           dtype=torch.long), torch.full((y.shape[0],), 36), torch.full((y.shape[0],), 3)), [], frozen=CLASS, any_batch=False),
    Case("triplets", lambda m, x: m.b(m.a(x) * functional.triplet_margin_loss(*m.a(x)[:, :3].unbind(1))), {"a": nn.Linear(4, 8),
         "b": nn.Linear(8, 4)}, [f"8 changed: {A} {B}"], inputs=sequences),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
