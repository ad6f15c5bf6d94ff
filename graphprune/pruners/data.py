"""Pruners that look at data: at activations, or at gradients of a loss.

Data is shown to the model in inference mode with frozen statistics; its state is as it was afterwards, bit for bit. It comes from the
user's `trainer(model, optimizer, criterion)`, which runs on a copy and changes nothing, or from batches as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.criteria.activations import APoZ, MeanActivation
from graphprune.criteria.gradients import Taylor
from graphprune.data.sources import source
from graphprune.pruners.base import Pruner
from graphprune.pruners.options import DataOptions, SeenOptions, check_names, split
from graphprune.training.session import refuse_evaluator

if TYPE_CHECKING:
    import torch
    from torch import nn
    from typing_extensions import Unpack

    from graphprune.criteria.base import Criterion


class _DataPruner(Pruner):
    """What these pruners share.

    Args:
        model: left as it is.
        config_list: see `Pruner`.
        trainer, optimizer, criterion: see `graphprune.pruners.options.TrainingOptions`; the `step` of the optimizer does nothing.
        training_batches: how many batches are looked at; all that the trainer or `data` has, if None.
        example_inputs: see `Pruner`; by default those of the first batch.
        options: see `graphprune.pruners.options.SeenOptions`.

    Raises:
        ConfigError: there is neither a trainer nor data, or an option is not usable.
    """

    scoring: Callable[[], Criterion]

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Callable[..., Any] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Callable[..., torch.Tensor] | None = None,
        training_batches: int | None = None,
        example_inputs: object = None,
        **options: Unpack[SeenOptions],
    ) -> None:
        who = type(self).__name__
        refuse_evaluator(who, trainer)
        check_names(type(self), options, SeenOptions)
        data, others = split(options, DataOptions)
        seen = source(trainer=trainer, optimizer=optimizer, criterion=criterion, limit=training_batches, who=who, **data)
        super().__init__(model, config_list, type(self).scoring(), example_inputs, **{**others, "source": seen})


class ActivationAPoZRankPruner(_DataPruner):
    """Prunes the channels that are zero most often behind their nonlinearity (Hu et al., Network Trimming, arXiv 1607.03250).

    See `_DataPruner` for the arguments.
    """

    scoring = APoZ


class ActivationMeanRankPruner(_DataPruner):
    """Prunes the channels with the smallest mean activation (Molchanov et al., arXiv 1611.06440, section 2.2).

    See `_DataPruner` for the arguments.
    """

    scoring = MeanActivation


class TaylorFOWeightPruner(_DataPruner):
    """Prunes the channels with the smallest sum of (g w)^2 over their weights (Molchanov et al., CVPR 2019, arXiv 1906.10771).

    With ``mode="global"`` (or `total_sparsity`) all groups are ranked together by these scores as they are, as in the paper. See `Pruner`
    and the arguments `trainer`, `optimizer`, `criterion`, `training_batches`, or `data` and `loss`.
    """

    scoring = Taylor
