"""Trace, score, select and shrink in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError
from graphprune.pruners.base import Pruner
from graphprune.pruners.config import check_sparsity
from graphprune.pruners.options import SeenOptions, check_names, showing_data
from graphprune.speedup.report import SpeedupReport
from graphprune.speedup.speedup import shrink
from graphprune.trace.turns import in_turn

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack


@in_turn
def prune(
    model: nn.Module,
    example_inputs: object,
    sparsity: float = 0.5,
    criterion: str | Criterion = "l1",
    *,
    config_list: Sequence[Mapping[str, Any]] | None = None,
    exclude: Sequence[str] = (),
    verify: bool = True,
    inplace: bool = False,
    **options: Unpack[SeenOptions],
) -> tuple[nn.Module, SpeedupReport]:
    """Returns a physically smaller copy of the model, and a report.

    Args:
        model: any module; left as it is unless `inplace`.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments).
        sparsity: fraction of every group's channels to remove, in [0, 1); ignored when a config list or a budget is given.
        criterion: name of a criterion (see `graphprune.criteria.CRITERIA`), or one.
        config_list: entries as in the seeds, in place of one sparsity for all; with a budget, which layers lose channels.
        exclude: qualified names of layers whose channels stay.
        verify: compare the result with the masked model.
        inplace: shrink the model itself.
        options: see `graphprune.pruners.options.SeenOptions`; a `budget`, such as ``Budget(macs=0.5)``, stands in the place of a sparsity.
            With `keep_class` the result is of the model's own class: it is an error where it cannot be.

    Raises:
        ConfigError, InputError, MaskError, VerificationError: see `Pruner` and `speedup`.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> small, report = prune(net, torch.randn(2, 8), sparsity=0.5)
    >>> small[0].out_features, small[2].in_features, report.verified
    (8, 8, True)
    """
    check_names(prune, options, SeenOptions)
    if options.get("mode") == "normal":
        raise ConfigError("mode 'normal' makes no model smaller", "Use another mode, or a pruner's compress() for masks of single layers")
    everywhere: Mapping[str, Any] = {"op_types": ["default"]}
    amount = {} if options.get("budget") is not None else {"sparsity": check_sparsity(sparsity, "sparsity")}
    entries = list(config_list) if config_list is not None else [{**amount, **everywhere}]
    if exclude:
        entries.append({"exclude": True, "op_names": list(exclude)})
    chosen = criterion_named(criterion)
    given = showing_data(options, chosen)
    pruner = Pruner(model, entries, chosen, example_inputs, **{**given, "mode": given.get("mode") or "dependency_aware"})
    masks = pruner.masks()
    kind: Literal["module", "auto"] = "module" if options.get("keep_class") else "auto"
    return shrink(model, masks, pruner.plan, verify=verify, inplace=inplace, result=kind, as_recorded=True)
