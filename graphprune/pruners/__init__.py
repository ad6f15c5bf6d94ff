"""Pruners: a criterion, a budget and a config list make masks."""

from graphprune.pruners.base import Pruner
from graphprune.pruners.norms import L1NormPruner

__all__ = ["L1NormPruner", "Pruner"]
