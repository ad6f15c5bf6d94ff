"""Searches for the share of channels that each group is to lose: an objective, one interface, and what proposes."""

from graphprune.search.amc import AMCPruner
from graphprune.search.annealing import Annealing, Cooling, Move, SimulatedAnnealingPruner
from graphprune.search.autocompress import AutoCompressPruner
from graphprune.search.base import Search, SearchResult, run
from graphprune.search.compressing import Compression
from graphprune.search.evaluators import DataEvaluator
from graphprune.search.netadapt import NetAdaptPruner
from graphprune.search.objective import Objective, Sparsities, Trial
from graphprune.search.parallel import run_study
from graphprune.search.studies import Point, Study, StudyResult
from graphprune.search.timing import OnnxLatency
from graphprune.sensitivity.curves import Measurement, Sensitivity
from graphprune.sensitivity.greedy import SensitivityPruner

__all__ = [
    "AMCPruner",
    "Annealing",
    "AutoCompressPruner",
    "Compression",
    "Cooling",
    "DataEvaluator",
    "Measurement",
    "Move",
    "NetAdaptPruner",
    "Objective",
    "OnnxLatency",
    "Point",
    "Search",
    "SearchResult",
    "Sensitivity",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "Sparsities",
    "Study",
    "StudyResult",
    "Trial",
    "run",
    "run_study",
]
