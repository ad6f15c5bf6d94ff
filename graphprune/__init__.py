"""graphprune: structural pruning of PyTorch networks that is exact, general and measured.

A model's forward pass is recorded as a graph of operators; one rule per operator says which channels live and die together; a criterion
scores them; masks say what stays; a speedup removes the rest physically and checks that the result computes what the masked model does.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphprune.torch_version import require_torch

if TYPE_CHECKING:
    from graphprune.cost.count import Cost, count
    from graphprune.criteria.activations import APoZ, MeanActivation
    from graphprune.criteria.base import Criterion, Part
    from graphprune.criteria.distances import FPGM
    from graphprune.criteria.gradients import HessianDiagonal, Taylor, TaylorGroup
    from graphprune.criteria.inputs import Wanda
    from graphprune.criteria.norms import L1, L2
    from graphprune.criteria.relative import LAMP, Random
    from graphprune.criteria.scales import BNScale
    from graphprune.errors import (
        ConfigError,
        ExportError,
        FileError,
        GraphPruneError,
        InputError,
        MaskError,
        ModelChangedError,
        TraceError,
        VerificationError,
    )
    from graphprune.export import ExportReport, export_onnx
    from graphprune.groups.build import trace
    from graphprune.groups.graph import DependencyGraph, Frozen, Group, Slice
    from graphprune.latency import LatencyReport, measure_latency
    from graphprune.masks.channels import Masks
    from graphprune.masks.elements import ElementMasks
    from graphprune.ops.registry import Op, rule
    from graphprune.pruners.admm import ADMMPruner
    from graphprune.pruners.base import Pruner
    from graphprune.pruners.budgets import Budget
    from graphprune.pruners.data import ActivationAPoZRankPruner, ActivationMeanRankPruner, TaylorFOWeightPruner
    from graphprune.pruners.level import LevelPruner, WeightSparsity
    from graphprune.pruners.norms import FPGMPruner, L1NormPruner, L2NormPruner
    from graphprune.pruners.slim import SlimPruner
    from graphprune.recipes.files import save
    from graphprune.recipes.replay import load
    from graphprune.repair.rebuilding import Reconstruction, reconstruct
    from graphprune.repair.report import ReconstructionReport
    from graphprune.schedules.gradual import AGPPruner
    from graphprune.schedules.lottery import LotteryTicketPruner
    from graphprune.schedules.movement import MovementPruner
    from graphprune.schedules.rounds import LinearPruner
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
    from graphprune.surgery.recipe import Recipe
    from graphprune.training.calibration import recalibrate
    from graphprune.training.optimizers import slice_average, slice_optimizer

__version__ = "0.2.0.dev0"

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
    "ModelChangedError",
    "MovementPruner",
    "NetAdaptPruner",
    "Objective",
    "OnnxLatency",
    "Op",
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
    "rule",
    "run_study",
    "save",
    "sensitivity",
    "slice_average",
    "slice_optimizer",
    "speedup",
    "trace",
]

_HOMES = {
    "graphprune.cost.count": ("Cost", "count"),
    "graphprune.criteria.activations": ("APoZ", "MeanActivation"),
    "graphprune.criteria.base": ("Criterion", "Part"),
    "graphprune.criteria.distances": ("FPGM",),
    "graphprune.criteria.gradients": ("HessianDiagonal", "Taylor", "TaylorGroup"),
    "graphprune.criteria.inputs": ("Wanda",),
    "graphprune.criteria.norms": ("L1", "L2"),
    "graphprune.criteria.relative": ("LAMP", "Random"),
    "graphprune.criteria.scales": ("BNScale",),
    "graphprune.errors": (
        "ConfigError",
        "ExportError",
        "FileError",
        "GraphPruneError",
        "InputError",
        "MaskError",
        "ModelChangedError",
        "TraceError",
        "VerificationError",
    ),
    "graphprune.export": ("ExportReport", "export_onnx"),
    "graphprune.groups.build": ("trace",),
    "graphprune.groups.graph": ("DependencyGraph", "Frozen", "Group", "Slice"),
    "graphprune.latency": ("LatencyReport", "measure_latency"),
    "graphprune.masks.channels": ("Masks",),
    "graphprune.masks.elements": ("ElementMasks",),
    "graphprune.ops.registry": ("Op", "rule"),
    "graphprune.pruners.admm": ("ADMMPruner",),
    "graphprune.pruners.base": ("Pruner",),
    "graphprune.pruners.budgets": ("Budget",),
    "graphprune.pruners.data": ("ActivationAPoZRankPruner", "ActivationMeanRankPruner", "TaylorFOWeightPruner"),
    "graphprune.pruners.level": ("LevelPruner", "WeightSparsity"),
    "graphprune.pruners.norms": ("FPGMPruner", "L1NormPruner", "L2NormPruner"),
    "graphprune.pruners.slim": ("SlimPruner",),
    "graphprune.recipes.files": ("save",),
    "graphprune.recipes.replay": ("load",),
    "graphprune.repair.rebuilding": ("Reconstruction", "reconstruct"),
    "graphprune.repair.report": ("ReconstructionReport",),
    "graphprune.schedules.gradual": ("AGPPruner",),
    "graphprune.schedules.lottery": ("LotteryTicketPruner",),
    "graphprune.schedules.movement": ("MovementPruner",),
    "graphprune.schedules.rounds": ("LinearPruner",),
    "graphprune.search.amc": ("AMCPruner",),
    "graphprune.search.annealing": ("SimulatedAnnealingPruner",),
    "graphprune.search.autocompress": ("AutoCompressPruner",),
    "graphprune.search.base": ("SearchResult",),
    "graphprune.search.netadapt": ("NetAdaptPruner",),
    "graphprune.search.objective": ("Objective", "Trial"),
    "graphprune.search.parallel": ("run_study",),
    "graphprune.search.studies": ("Study", "StudyResult"),
    "graphprune.search.timing": ("OnnxLatency",),
    "graphprune.sensitivity.curves": ("Sensitivity",),
    "graphprune.sensitivity.greedy": ("SensitivityPruner",),
    "graphprune.sensitivity.sensitivity": ("sensitivity",),
    "graphprune.speedup.prune": ("prune",),
    "graphprune.speedup.report": ("SpeedupReport",),
    "graphprune.speedup.speedup": ("speedup",),
    "graphprune.surgery.recipe": ("Recipe",),
    "graphprune.training.calibration": ("recalibrate",),
    "graphprune.training.optimizers": ("slice_average", "slice_optimizer"),
}
"""Module -> the public names that it defines; the imports above say the same to type checkers."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_LOADING = RLock()  # the import system gives up where two threads enter one package from two sides


class _Package(ModuleType):
    """This package: a public name is imported when it is first asked for, so that `import graphprune` does not import torch.

    A class and not a function `__getattr__` in the module, because type checkers take the latter as leave for any name, and because of
    `__setattr__`.
    """

    def __getattr__(self, name: str) -> Any:
        """Returns a public name or a sub-package, which is kept.

        Raises:
            AttributeError: there is none of that name.
        """
        with _LOADING:
            if name in _HOME_OF:
                value = getattr(import_module(_HOME_OF[name]), name)
            elif name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
                value = import_module(f"{__name__}.{name}")
            else:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=self)
            return self.__dict__.setdefault(name, value)

    def __setattr__(self, name: str, value: object) -> None:
        """Sets an attribute; the import system, which puts every sub-package here, is not heard where a public function has its name."""
        if name in _HOME_OF and isinstance(value, ModuleType) and value.__name__ == f"{__name__}.{name}":
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Returns the public names, also those that nobody has asked for yet, and what every module has."""
        return sorted({*__all__, *(name for name in self.__dict__ if name.startswith("__"))})

    def __reduce__(self) -> tuple[Any, ...]:
        """Stands for itself by its name, as a plain module does for those who pickle functions with their modules."""
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
require_torch()
