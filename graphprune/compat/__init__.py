"""The names and call shapes of NNI's first version, on graphprune's definitions.

Only the import line of such code changes. Pruners of a model return (model, masks) from `compress`, leave the model that they were given as
it is, and write their result by `export_model(model_path, mask_path, onnx_path, input_shape)`.

`L1FilterPruner`, `L2FilterPruner`, `FPGMPruner`, `ActivationAPoZRankFilterPruner`, `ActivationMeanRankFilterPruner` and
`TaylorFOWeightFilterPruner` are the pruners of those criteria with their former arguments, as `SlimPruner`, `ADMMPruner`, `AGPPruner`,
`SimulatedAnnealingPruner`, `NetAdaptPruner`, `AMCPruner` and `AutoCompressPruner` are of theirs.

`AGP_Pruner`, `LevelPruner` and `SensitivityPruner` take a config list first and then a model, which they mask in place and keep masked
while the user trains it; with a model first, the last two are pruners of a model, too. `LotteryTicketPruner` masks and rewinds the user's
model. `ModelSpeedup` takes the masks that `export_model` wrote, and shrinks the user's model.
"""

from graphprune.compat.lottery import LotteryTicketPruner
from graphprune.compat.speedup import ModelSpeedup
from graphprune.compat.table import (
    ActivationAPoZRankFilterPruner,
    ActivationMeanRankFilterPruner,
    ADMMPruner,
    AGPPruner,
    AMCPruner,
    AutoCompressPruner,
    FPGMPruner,
    L1FilterPruner,
    L2FilterPruner,
    NetAdaptPruner,
    SimulatedAnnealingPruner,
    SlimPruner,
    TaylorFOWeightFilterPruner,
)
from graphprune.compat.training import AGP_Pruner, LevelPruner, SensitivityPruner

__all__ = [
    "ADMMPruner",
    "AGPPruner",
    "AGP_Pruner",
    "AMCPruner",
    "ActivationAPoZRankFilterPruner",
    "ActivationMeanRankFilterPruner",
    "AutoCompressPruner",
    "FPGMPruner",
    "L1FilterPruner",
    "L2FilterPruner",
    "LevelPruner",
    "LotteryTicketPruner",
    "ModelSpeedup",
    "NetAdaptPruner",
    "SensitivityPruner",
    "SimulatedAnnealingPruner",
    "SlimPruner",
    "TaylorFOWeightFilterPruner",
]
