"""Pruners that look at data: at activations, or at gradients of a loss.

Data is shown to the model in inference mode with frozen statistics; its state is as it was afterwards, bit for bit. It comes from the
user's `trainer(model, optimizer, criterion)`, which runs on a copy and changes nothing, or from batches as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.criteria.activations import APoZ, MeanActivation
from graphprune.criteria.gradients import Taylor
from graphprune.data.sources import source
from graphprune.pruners.base import Options, Pruner
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
        trainer: called as trainer(model, optimizer, criterion), as in the seeds.
        optimizer: passed to the trainer; its `step` does nothing.
        criterion: the loss function that is passed to the trainer.
        training_batches: how many batches are looked at; all that the trainer or `data` has, if None.
        example_inputs: see `Pruner`; by default those of the first batch.
        data: batches of (inputs, targets), or of inputs alone where no loss is needed, in the place of a trainer.
        loss: from output and targets to a scalar, with `data`.
        options: see `Pruner`.

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
        *,
        data: Iterable[Any] | None = None,
        loss: Callable[[Any, Any], torch.Tensor] | None = None,
        **options: Unpack[Options],
    ) -> None:
        refuse_evaluator(type(self).__name__, trainer)
        given: dict[str, Any] = {"trainer": trainer, "optimizer": optimizer, "criterion": criterion, "limit": training_batches}
        options["source"] = source(data=data, loss=loss, who=type(self).__name__, **given)
        super().__init__(model, config_list, type(self).scoring(), example_inputs, **options)


class ActivationAPoZRankPruner(_DataPruner):
    """Prunes the channels that are zero most often behind their nonlinearity (Hu et al., Network Trimming, arXiv 1607.03250).

    See `Pruner` and the arguments `trainer`, `optimizer`, `criterion`, `training_batches`, or `data`.
    """

    scoring = APoZ


class ActivationMeanRankPruner(_DataPruner):
    """Prunes the channels with the smallest mean activation (Molchanov et al., arXiv 1611.06440, section 2.2).

    See `Pruner` and the arguments `trainer`, `optimizer`, `criterion`, `training_batches`, or `data`.
    """

    scoring = MeanActivation


class TaylorFOWeightPruner(_DataPruner):
    """Prunes the channels with the smallest sum of (g w)^2 over their weights (Molchanov et al., CVPR 2019, arXiv 1906.10771).

    With ``mode="global"`` (or `total_sparsity`) all groups are ranked together by these scores as they are, as in the paper. See `Pruner`
    and the arguments `trainer`, `optimizer`, `criterion`, `training_batches`, or `data` and `loss`.
    """

    scoring = Taylor
