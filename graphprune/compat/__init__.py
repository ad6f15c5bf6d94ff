"""The names and call shapes of NNI's first version, on graphprune's definitions.

Only the import line of such code changes. `L1FilterPruner`, `L2FilterPruner`, `FPGMPruner`, `ActivationAPoZRankFilterPruner`,
`ActivationMeanRankFilterPruner` and `TaylorFOWeightFilterPruner` are the pruners of those criteria with their former arguments.
`LevelPruner`, `AGP_Pruner` and `SensitivityPruner` take a config list first and then a model, which they mask in place and keep masked
while the user trains it.
"""

from graphprune.compat.filters import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    TaylorFOWeightFilterPruner,
)
from graphprune.compat.training import AGP_Pruner, LevelPruner, SensitivityPruner

__all__ = [
    "AGP_Pruner",
    "ActivationAPoZRankFilterPruner",
    "ActivationMeanRankFilterPruner",
    "FPGMPruner",
    "L1FilterPruner",
    "L2FilterPruner",
    "LevelPruner",
    "SensitivityPruner",
    "TaylorFOWeightFilterPruner",
]
