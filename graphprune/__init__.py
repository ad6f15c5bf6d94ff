"""graphprune: structural pruning of PyTorch networks that is exact, general and measured.

A model's forward pass is recorded as a graph of operators; one rule per operator says which channels live and die together; a criterion
scores them; masks say what stays; a speedup removes the rest physically and checks that the result computes what the masked model does.
"""

from graphprune.cost.count import Cost, count
from graphprune.criteria import (
    FPGM,
    L1,
    L2,
    LAMP,
    APoZ,
    BNScale,
    Criterion,
    HessianDiagonal,
    MeanActivation,
    Part,
    Random,
    Taylor,
    TaylorGroup,
    Wanda,
)
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
from graphprune.groups.build import trace
from graphprune.groups.graph import DependencyGraph, Frozen, Group, Slice
from graphprune.latency import LatencyReport, measure_latency
from graphprune.masks.channels import Masks
from graphprune.masks.elements import ElementMasks
from graphprune.pruners import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    FPGMPruner,
    L1NormPruner,
    L2NormPruner,
    LevelPruner,
    Pruner,
    SlimPruner,
    TaylorFOWeightPruner,
    WeightSparsity,
)
from graphprune.pruners.budgets import Budget
from graphprune.recipes import Recipe, load, save
from graphprune.repair import Reconstruction, ReconstructionReport, reconstruct
from graphprune.schedules import AGPPruner, LinearPruner, LotteryTicketPruner, MovementPruner, slice_average, slice_optimizer
from graphprune.search.amc import AMCPruner
from graphprune.search.annealing import SimulatedAnnealingPruner
from graphprune.search.autocompress import AutoCompressPruner
from graphprune.search.base import SearchResult
from graphprune.search.netadapt import NetAdaptPruner
from graphprune.search.objective import Objective, Trial
from graphprune.search.parallel import run_study
from graphprune.search.studies import Study, StudyResult
from graphprune.search.timing import OnnxLatency
from graphprune.sensitivity.curves import Sensitivity
from graphprune.sensitivity.greedy import SensitivityPruner
from graphprune.sensitivity.sensitivity import sensitivity
from graphprune.speedup.prune import prune
from graphprune.speedup.report import SpeedupReport
from graphprune.speedup.speedup import speedup
from graphprune.training.calibration import recalibrate

__version__ = "0.1.0"

__all__ = [
    "FPGM",
    "L1",
    "L2",
    "LAMP",
    "ADMMPruner",
    "AGPPruner",
    "AMCPruner",
    "APoZ",
    "ActivationAPoZRankPruner",
    "ActivationMeanRankPruner",
    "AutoCompressPruner",
    "BNScale",
    "Budget",
    "ConfigError",
    "Cost",
    "Criterion",
    "DependencyGraph",
    "ElementMasks",
    "ExportError",
    "ExportReport",
    "FPGMPruner",
    "FileError",
    "Frozen",
    "GraphPruneError",
    "Group",
    "HessianDiagonal",
    "InputError",
    "L1NormPruner",
    "L2NormPruner",
    "LatencyReport",
    "LevelPruner",
    "LinearPruner",
    "LotteryTicketPruner",
    "MaskError",
    "Masks",
    "MeanActivation",
    "MovementPruner",
    "NetAdaptPruner",
    "Objective",
    "OnnxLatency",
    "Part",
    "Pruner",
    "Random",
    "Recipe",
    "Reconstruction",
    "ReconstructionReport",
    "SearchResult",
    "Sensitivity",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "Slice",
    "SlimPruner",
    "SpeedupReport",
    "Study",
    "StudyResult",
    "Taylor",
    "TaylorFOWeightPruner",
    "TaylorGroup",
    "TraceError",
    "Trial",
    "VerificationError",
    "Wanda",
    "WeightSparsity",
    "count",
    "export_onnx",
    "load",
    "measure_latency",
    "prune",
    "recalibrate",
    "reconstruct",
    "run_study",
    "save",
    "sensitivity",
    "slice_average",
    "slice_optimizer",
    "speedup",
    "trace",
]
