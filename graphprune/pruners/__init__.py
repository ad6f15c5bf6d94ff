"""Pruners: a criterion, a budget and a config list make masks."""

from graphprune.pruners.admm import ADMMPruner, Convergence
from graphprune.pruners.base import Pruner
from graphprune.pruners.data import ActivationAPoZRankPruner, ActivationMeanRankPruner, TaylorFOWeightPruner
from graphprune.pruners.level import LevelPruner, WeightSparsity
from graphprune.pruners.norms import FPGMPruner, L1NormPruner, L2NormPruner
from graphprune.pruners.options import Mode, Options
from graphprune.pruners.slim import SlimPruner

__all__ = [
    "ADMMPruner",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "Convergence",
    "FPGMPruner",
    "L1NormPruner",
    "L2NormPruner",
    "LevelPruner",
    "Mode",
    "Options",
    "Pruner",
    "SlimPruner",
    "TaylorFOWeightPruner",
    "WeightSparsity",
]
