"""One rule per ATen operator, one file per family. See README.md in this folder for how to add one in five minutes."""

from graphprune.ops import (
    attention,
    convolution,
    creation,
    indexing,
    joining,
    linear,
    normalisation,
    pointwise,
    pooling,
    reduction,
    reshaping,
)
from graphprune.ops.registry import RULES, UNBOUND, Labels, Notes, Op, Value, Why, aten, rule, rule_for

__all__ = [
    "RULES",
    "UNBOUND",
    "Labels",
    "Notes",
    "Op",
    "Value",
    "Why",
    "aten",
    "attention",
    "convolution",
    "creation",
    "indexing",
    "joining",
    "linear",
    "normalisation",
    "pointwise",
    "pooling",
    "reduction",
    "reshaping",
    "rule",
    "rule_for",
]
