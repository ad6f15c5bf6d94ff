"""Reductions, and operators that look along a dimension: exact over space, a changed statistic or frozen over channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.operators import Case, check, conv, let, table

A = "a.bias/0 a.weight/0"
KEPT, CHANGED = [f"8 exact: {A} b.weight/1"], [f"8 changed: {A} b.weight/1"]


def space(name: str, reduce: Any, **options: Any) -> Case:
    """Returns a case that reduces 8 channels of 6 x 6 pixels to one value per channel."""
    return Case(f"{name} of space", lambda m, x: m.b(reduce(torch.relu(m.a(x)) + 0.1)), {"a": conv(3, 8), "b": nn.Linear(8, 4)},
                options.pop("groups", KEPT), kind="module", **options)  # fmt: skip


def gate(name: str, reduce: Any, groups: list[str], **options: Any) -> Case:
    """Returns a case that multiplies 8 channels with something made of all of them."""
    return Case(
        name, lambda m, x: m.b(let(torch.relu(m.a(x)), lambda y: y * reduce(y))), {"a": conv(3, 8), "b": conv(8, 4)}, groups, **options
    )


def values(name: str, reduce: Any, groups: list[str], **options: Any) -> Case:
    """Returns a case whose values are not zero where channels are masked, followed by a reduction to one channel."""
    return Case(name, lambda m, x: m.b(reduce(torch.sigmoid(m.a(x)))), {"a": conv(3, 8), "b": conv(1, 4)}, groups, **options)


DERIVED = "NotImplemented" not in str(torch.ones(2, requires_grad=True).aminmax().min.grad_fn)  # it is not up to PyTorch 2.7
LOOKED = {"a.weight/0": "position of its extremum looked up"}
ALONE, ALONE_CHANGED = [f"8 exact: {A}"], [f"8 changed: {A}"]

CASES = [
    space("mean", lambda x: x.mean((2, 3))), space("mean, negative,", lambda x: x.mean((-1, -2), keepdim=True).flatten(1)),
    space("var", lambda x: x.var((2, 3))), space("std", lambda x: x.std((2, 3))), space("var_mean", lambda x: sum(torch.var_mean(x, (2,
         3)))),
    space("std_mean", lambda x: sum(torch.std_mean(x, (2, 3)))), space("amax", lambda x: x.amax((2, 3))),
    space("amin", lambda x: x.amin((2, 3))), space("logsumexp", lambda x: x.logsumexp((2, 3))),
    space("prod", lambda x: x.sigmoid().prod(3).sum(2)), space("median", lambda x: x.median(3)[0].median(2)[0]),
    space("nanmean", lambda x: x.nanmean((2, 3))), space("sum", lambda x: x.sum((2, 3))), space("nansum", lambda x: x.nansum((2, 3))),
    space("norm", lambda x: x.flatten(2).norm(dim=2)), space("vector norm", lambda x: torch.linalg.vector_norm(x, dim=(2, 3))),
    space("count_nonzero", lambda x: (x - 0.4).relu().count_nonzero((2, 3)).double()), space("max", lambda x: x.max(3)[0].max(2)[0]),
    space("min", lambda x: x.min(-1)[0].min(-1)[0]), space("any and all",
         lambda x: (x > 0.4).any(3).double().mean(2) + (x > 0).all(2).all(2)),
    space("argmax", lambda x: x.flatten(2).argmax(2).double()), space("argmin", lambda x: x.argmin(3).double().mean(2)),
    space("topk", lambda x: x.flatten(2).topk(3)[0].sum(2)), space("sort", lambda x: x.sort(-1)[0][..., 0].mean(2)),
    space("argsort", lambda x: x.argsort(3).double()[..., 0].mean(2)), space("kthvalue", lambda x: x.flatten(2).kthvalue(5)[0]),
    space("softmax", lambda x: (x.flatten(2).softmax(2) * x.flatten(2)).sum(2)), space("log_softmax", lambda x: x.log_softmax(3).mean((2,
         3))),
    space("cumsum", lambda x: x.cumsum(3).mean((2, 3))), space("cumprod", lambda x: x.cumprod(-1).mean((2, 3))),
    space("logcumsumexp", lambda x: x.logcumsumexp(2).mean((2, 3))),
    gate("mean of channels", lambda y: y.mean(1, keepdim=True), CHANGED, kind="module"),
    gate("deviation of channels", lambda y: y - y.mean(-3, keepdim=True), CHANGED, kind="module"),
    gate("variance of channels", lambda y: y.var(1, keepdim=True), CHANGED, kind="module"),
    gate("maximum of channels", lambda y: y.amax(1, keepdim=True), CHANGED, kind="module"),
    gate("sum of channels", lambda y: y.sum(1, keepdim=True), KEPT, kind="module"),
    gate("norm of channels", lambda y: y.norm(dim=1, keepdim=True), KEPT, kind="module"),
    gate("everything", lambda y: y.sum(), KEPT, kind="module"), gate("mean of everything", lambda y: y.mean(), CHANGED, kind="module"),
    gate("softmax of channels", lambda y: y.softmax(1), CHANGED, kind="module"),
    gate("softmax of channels, negative", lambda y: y.log_softmax(-3), CHANGED, kind="module"),
    gate("running sum of channels", lambda y: y.cumsum(1), KEPT, kind="module", interchangeable=False),
    gate("running product of channels", lambda y: (y + 0.5).cumprod(1), CHANGED, kind="module", interchangeable=False),
    gate("argmax of channels", lambda y: y.argmax(1, keepdim=True), [], frozen=LOOKED),
    gate("argmin of everything", lambda y: y.argmin(), [], frozen=LOOKED),
    gate("max of channels", lambda y: y.max(1, keepdim=True)[0], CHANGED, kind="module"),
    gate("median of channels", lambda y: y.median(1, keepdim=True)[0], CHANGED, kind="module"),
    gate("nanmedian of channels", lambda y: y.nanmedian(1, keepdim=True)[0], CHANGED, kind="module"),
    gate("mode of channels", lambda y: y.round().mode(1, keepdim=True)[0], CHANGED, kind="module", reference="never"),
    gate("max with its position", lambda y: sum(y.max(1, keepdim=True)), [], frozen=LOOKED),
    gate("median with its position", lambda y: sum(y.median(1, keepdim=True)), [], frozen=LOOKED),
    gate("position of the min", lambda y: y.min(1, keepdim=True)[1], [], frozen=LOOKED),
    gate("minimum and maximum", lambda y: sum(torch.aminmax(y, dim=1, keepdim=True)), CHANGED, kind="module",
         trainable=DERIVED),
    gate("smallest norm of channels", lambda y: y.norm(p=float("-inf"), dim=1, keepdim=True) + 0.1, CHANGED, kind="module"),
    gate("vector norm to a negative power", lambda y: torch.linalg.vector_norm(y + 0.1, -2, dim=1, keepdim=True), CHANGED, kind="module"),
    gate("largest norm of channels", lambda y: y.norm(p=float("inf"), dim=1, keepdim=True), KEPT, kind="module"),
    gate("running maximum of channels", lambda y: y.cummax(1)[0], CHANGED, kind="module", interchangeable=False),
    gate("running maximum with its position", lambda y: sum(y.cummax(1)), [], frozen=LOOKED),
    gate("running minimum of space", lambda y: y.cummin(2)[0], KEPT, kind="module"),
    gate("distance", lambda y: torch.dist(y, 2 * y), KEPT, kind="module"),
    gate("distance of values that are not zero", lambda y: torch.dist(y.exp(), 2 * y), CHANGED, kind="module"),
    gate("least distance", lambda y: torch.dist(y + 0.1, 2 * y, float("-inf")) + 0.1, CHANGED, kind="module"),
    gate("norms per channel", lambda y: y.renorm(2, 1, 0.5), KEPT, kind="module"),
    gate("norms per image", lambda y: y.renorm(2, 0, 0.5), KEPT, kind="module"),
    gate("norms per image of values that are not zero", lambda y: y.exp().renorm(2, 0, 0.5), CHANGED, kind="module"),
    gate("length one", lambda y: nn.functional.normalize(y, dim=1), KEPT, kind="module"),
    gate("cosine of channels", lambda y: nn.functional.cosine_similarity(y, y.relu() ** 2, dim=1).unsqueeze(1), KEPT, kind="module"),
    Case("cross product", lambda m, x: m.b(torch.linalg.cross(*torch.relu(m.a(x)).unflatten(2, (2, 3)).unbind(2), dim=2)),
         {"a": conv(3, 8), "b": conv(8, 4)}, KEPT),
    Case("cross product of channels", lambda m, x: m.b(torch.linalg.cross(torch.relu(m.a(x)), torch.tanh(m.c(x)), dim=1)),
         {"a": conv(3, 3), "c": conv(3, 3), "b": conv(3, 4)}, [], {"a.weight/0": "component of vectors",
         "c.weight/0": "component of vectors"}),
    Case("sum of log-sums", lambda m, x: m.b(torch.relu(m.a(x)).logsumexp((2, 3)).sum(1, keepdim=True)), {"a": conv(3, 8),
         "b": nn.Linear(1, 4)}, ALONE_CHANGED, kind="module"),
    Case("sum of positions", lambda m, x: m.b((-torch.relu(m.a(x)) - 1e-9).flatten(2).argmax(2).double().sum(1, keepdim=True)),
         {"a": conv(3, 8), "b": nn.Linear(1, 4)}, ALONE_CHANGED, kind="module", trainable=False, reference="never"),
    Case("sum of running sums", lambda m, x: m.b(torch.relu(m.a(x)).cumsum(2).sum(1, keepdim=True)), {"a": conv(3, 8), "b": conv(1, 4)},
         ALONE, kind="module"),
    gate("topk of channels", lambda y: y.topk(8, 1)[0], [], frozen={"a.weight/0": "sorted along (aten::topk)"}),
    gate("sort of channels", lambda y: y.sort(-3)[0], [], frozen={"a.weight/0": "sorted along (aten::sort)"}),
    values("sum of values", lambda y: y.sum(1, keepdim=True), ALONE_CHANGED, kind="module"),
    values("sum of values made zero", lambda y: (y - 0.5).sum(1, keepdim=True), ALONE_CHANGED, kind="module"),
    values("norm of values", lambda y: y.norm(dim=1, keepdim=True), ALONE_CHANGED, kind="module"),
    values("running sum of values", lambda y: y.cumsum(1)[:, :, :1].mean(1, keepdim=True).expand(-1, 1, 6, 6), ALONE_CHANGED, kind="module",
           interchangeable=False),
    Case("sum after a shift", lambda m, x: m.b((torch.relu(m.a(x)) + m.s).sum(1, keepdim=True)), {"a": conv(3, 8), "s": table(1),
         "b": conv(1, 4)}, ALONE_CHANGED, kind="module"),
    Case("sum after a shift per channel", lambda m, x: m.b((torch.relu(m.a(x)) + m.s).sum(1, keepdim=True)), {"a": conv(3, 8),
         "s": table(8, 1, 1), "b": conv(1, 4)}, [f"8 exact: {A} s/0"], kind="module"),
    Case("sum after a computed shift", lambda m, x: m.b((torch.relu(m.a(x)) + m.s(x)).sum(1, keepdim=True)), {"a": conv(3, 8),
         "s": conv(3, 1), "b": conv(1, 4)}, ALONE_CHANGED, kind="module"),
    Case("sum after a widened shift", lambda m, x: m.b(let(torch.relu(m.a(x)), lambda y: (y + m.s(x).expand_as(y)).sum(1, keepdim=True))),
         {"a": conv(3, 8), "s": conv(3, 1), "b": conv(1, 4)}, ALONE_CHANGED, kind="module"),
    Case("sum after a scale", lambda m, x: m.b((torch.relu(m.a(x)) * m.s).sum(1, keepdim=True)), {"a": conv(3, 8), "s": table(1),
         "b": conv(1, 4)}, [f"8 exact: {A}"], kind="module"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduction(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
