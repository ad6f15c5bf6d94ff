"""Pruners that look at weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.criteria.distances import FPGM
from graphprune.criteria.norms import L1, L2
from graphprune.pruners.base import Pruner
from graphprune.pruners.options import Options, check_names

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack


class _OfWeights(Pruner):
    """What these pruners share.

    Args:
        model: left as it is.
        config_list: see `Pruner`.
        example_inputs: see `Pruner`; or the mode, as in NNI's second version.
        former: behind the mode, as there, the example inputs.
        options: see `Pruner`.

    Raises:
        ConfigError: the config list or an option is not usable.
        InputError: the model cannot run on the example inputs.
    """

    scoring: ClassVar[type[L1 | L2 | FPGM]]

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: object = None,
        *former: object,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(example_inputs, str) and "mode" not in options:
            mode: Any = example_inputs
            options["mode"] = mode
            example_inputs, former = (former or (None,))[0], former[1:]
        check_names(type(self), options, Options, surplus=former)
        super().__init__(model, config_list, type(self).scoring(), example_inputs, **options)


class L1NormPruner(_OfWeights):
    """Prunes the channels whose producing weights have the smallest L1 norm, sum |K| (Li et al., arXiv 1608.08710).

    A coupled group's score is the sum over the layers that produce its channels. See `Pruner` for the arguments.
    """

    scoring = L1


class L2NormPruner(_OfWeights):
    """Prunes the channels whose producing weights have the smallest L2 norm. See `Pruner` for the arguments."""

    scoring = L2


class FPGMPruner(_OfWeights):
    """Prunes the channels nearest to the geometric median of their layer: those whose summed distance to all others is smallest.

    He et al., Filter Pruning via Geometric Median, arXiv 1811.00250. See `Pruner` for the arguments.
    """

    scoring = FPGM
