"""graphprune: structural pruning of PyTorch networks that is exact, general and measured.

A model's forward pass is recorded as a graph of operators; one rule per operator says which channels live and die together; a criterion
scores them; masks say what stays; a speedup removes the rest physically and checks that the result computes what the masked model does.
"""

from graphprune.calibration import recalibrate
from graphprune.cost import Cost, count
from graphprune.criteria import L1, Criterion
from graphprune.errors import (
    ConfigError,
    ExportError,
    FileError,
    GraphPruneError,
    InputError,
    MaskError,
    TraceError,
    VerificationError,
)
from graphprune.export import ExportReport, export_onnx
from graphprune.graph import DependencyGraph, Frozen, Group, Slice
from graphprune.groups import trace
from graphprune.latency import LatencyReport, measure_latency
from graphprune.masks import Masks
from graphprune.pruners import L1NormPruner, Pruner
from graphprune.pruning import prune
from graphprune.recipes import Recipe, load, save
from graphprune.surgery.report import SpeedupReport
from graphprune.surgery.speedup import speedup

__version__ = "0.1.0"

__all__ = [
    "L1",
    "ConfigError",
    "Cost",
    "Criterion",
    "DependencyGraph",
    "ExportError",
    "ExportReport",
    "FileError",
    "Frozen",
    "GraphPruneError",
    "Group",
    "InputError",
    "L1NormPruner",
    "LatencyReport",
    "MaskError",
    "Masks",
    "Pruner",
    "Recipe",
    "Slice",
    "SpeedupReport",
    "TraceError",
    "VerificationError",
    "count",
    "export_onnx",
    "load",
    "measure_latency",
    "prune",
    "recalibrate",
    "save",
    "speedup",
    "trace",
]
