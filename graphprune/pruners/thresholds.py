"""A threshold per layer: a quality parameter times the standard deviation of the layer's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.errors import ConfigError
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.level import LevelPruner

if TYPE_CHECKING:
    import torch
    from torch import nn


def reaching_threshold(
    model: nn.Module, config_list: Sequence[Mapping[str, Any]], before: ElementMasks | None = None, example_inputs: object = None
) -> ElementMasks:
    """Returns masks of the weights w with |w| >= q std(weights of the layer), layer by layer.

    Han et al., Learning both Weights and Connections, arXiv 1506.02626, section 4: "a quality parameter multiplied by the standard
    deviation of a layer's weights". An entry's `sparsity` is the quality parameter q, in [0, 1), and not the share of weights that go.
    The deviation (of the population) is taken over all weights of a layer as they are, masked ones as zeros.

    Args:
        model: left as it is.
        config_list: entries with a `sparsity`, see `graphprune.pruners.config`.
        before: weights that these masks remove stay removed.
        example_inputs: see `LevelPruner`.

    Raises:
        ConfigError: the config list is not usable, or an entry has a `total_sparsity`.
        InputError: the model is on the meta device, or a weight has values that are not finite.
    """
    kept: dict[str, torch.Tensor] = {}
    for weight in LevelPruner(model, config_list, example_inputs=example_inputs).weights:
        if weight.config.total is not None:
            what = f"config_list[{weight.config.entry}] gives a total_sparsity, and SensitivityPruner has a threshold per layer"
            raise ConfigError(what, "Write 'sparsity', the factor of the layer's standard deviation")
        values = weight.tensor.detach()
        threshold = (weight.config.sparsity or 0.0) * values.double().std(correction=0)
        kept[weight.parameter] = (values.abs() >= threshold).cpu()
        if before is not None:
            kept[weight.parameter] &= before[weight.parameter]
    return ElementMasks(model, kept)
