"""graphprune: structural pruning of PyTorch networks that is exact, general and measured."""

from graphprune.calibration import recalibrate
from graphprune.config import ResolvedConfig
from graphprune.cost import Cost, count
from graphprune.criteria import CRITERIA, L1
from graphprune.errors import GraphPruneError
from graphprune.graph import DependencyGraph, Frozen, Group, Slice
from graphprune.groups import trace
from graphprune.masks import Masks
from graphprune.pruners import L1NormPruner, Pruner
from graphprune.pruning import prune
from graphprune.surgery.report import SpeedupReport
from graphprune.surgery.speedup import speedup

__version__ = "0.1.0"
