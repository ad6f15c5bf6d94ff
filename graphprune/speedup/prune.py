"""Trace, score, select and shrink in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion
from graphprune.criteria.scoring import Aggregation, Scope
from graphprune.data.sources import source
from graphprune.errors import ConfigError
from graphprune.pruners.base import Mode, Options, Pruner
from graphprune.pruners.config import check_sparsity
from graphprune.pruners.families import Cut
from graphprune.speedup.report import SpeedupReport
from graphprune.speedup.speedup import shrink

if TYPE_CHECKING:
    import torch
    from torch import nn

    from graphprune.pruners.budgets import Budget, Rounding


def prune(  # noqa: PLR0913 (every option of the three calls that it stands for)
    model: nn.Module,
    example_inputs: object,
    sparsity: float = 0.5,
    criterion: str | Criterion = "l1",
    *,
    budget: Budget | None = None,
    config_list: Sequence[Mapping[str, Any]] | None = None,
    exclude: Sequence[str] = (),
    data: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    mode: Mode | None = None,
    aggregation: Aggregation = "sum",
    scope: Scope = "producers",
    rounding: Rounding = "floor",
    round_to: int = 1,
    cut: Cut = "blocks",
    keep_class: bool = False,
    verify: bool = True,
    inplace: bool = False,
) -> tuple[nn.Module, SpeedupReport]:
    """Returns a physically smaller copy of the model, and a report.

    Args:
        model: any module; left as it is unless `inplace`.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments).
        sparsity: fraction of every group's channels to remove, in [0, 1); ignored when a config list or a budget is given.
        criterion: name of a criterion (see `graphprune.criteria.CRITERIA`), or one.
        budget: a fraction of the MACs or parameters to remove, such as ``Budget(macs=0.5)``, in place of a sparsity.
        config_list: entries as in the seeds, in place of one sparsity for all; with a budget, which layers lose channels.
        exclude: qualified names of layers whose channels stay.
        data: batches of (inputs, targets), or of inputs alone, for criteria that look at data.
        loss: from a batch's output and targets to a scalar, for criteria that look at gradients.
        mode: "global" ranks all groups together; see `Pruner`.
        aggregation: how the scores of coupled layers are put together, see `Pruner`.
        scope: whose weights count, see `Pruner`.
        rounding: of the kept counts, "floor" or "ceil".
        round_to: kept counts are multiples of this where there are enough channels.
        cut: what goes where a dimension is cut into equal blocks, see `Pruner`.
        keep_class: return a model of the model's own class or raise: where its own arithmetic on sizes (`C // num_heads`, equal chunks)
            could not state what is asked for, more channels are kept, and the report says so.
        verify: compare the result with the masked model.
        inplace: shrink the model itself.

    Raises:
        ConfigError, InputError, MaskError, VerificationError: see `Pruner` and `speedup`.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> small, report = prune(net, torch.randn(2, 8), sparsity=0.5)
    >>> small[0].out_features, small[2].in_features, report.verified
    (8, 8, True)
    """
    if mode == "normal":
        raise ConfigError("mode 'normal' makes no model smaller", "Use another mode, or a pruner's compress() for masks of single layers")
    everywhere: Mapping[str, Any] = {"op_types": ["default"]}
    amount = {} if budget is not None else {"sparsity": check_sparsity(sparsity, "sparsity")}
    entries = list(config_list) if config_list is not None else [{**amount, **everywhere}]
    if exclude:
        entries.append({"exclude": True, "op_names": list(exclude)})
    chosen = criterion_named(criterion)
    found = None if data is None else source(data=data, loss=loss, who=f"criterion {type(chosen).__name__}")
    options: Options = {"mode": mode or "dependency_aware", "budget": budget, "aggregation": aggregation, "scope": scope, "source": found,
                        "rounding": rounding, "round_to": round_to, "cut": cut, "keep_class": keep_class}  # fmt: skip
    pruner = Pruner(model, entries, chosen, example_inputs, **options)
    masks = pruner.masks()
    kind: Literal["module", "auto"] = "module" if keep_class else "auto"
    return shrink(model, masks, pruner.plan, verify=verify, inplace=inplace, result=kind, as_recorded=True)
