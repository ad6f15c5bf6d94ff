"""Trace, score, select and shrink in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.config import check_sparsity
from graphprune.criteria import Criterion, criterion_named
from graphprune.pruners.base import Cut, Pruner
from graphprune.surgery.report import SpeedupReport
from graphprune.surgery.speedup import speedup

if TYPE_CHECKING:
    from torch import nn

    from graphprune.budgets import Rounding


def prune(  # noqa: PLR0913 (every option of the three calls that it stands for)
    model: nn.Module,
    example_inputs: object,
    sparsity: float = 0.5,
    criterion: str | Criterion = "l1",
    *,
    config_list: Sequence[Mapping[str, Any]] | None = None,
    exclude: Sequence[str] = (),
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
        sparsity: fraction of every group's channels to remove, in [0, 1); ignored when a config list is given.
        criterion: name of a criterion, or one.
        config_list: entries as in the seeds, in place of one sparsity for all.
        exclude: qualified names of layers whose channels stay.
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
    entries: list[Mapping[str, Any]] = list(config_list) if config_list is not None else [
        {"sparsity": check_sparsity(sparsity, "sparsity"), "op_types": ["default"]}]  # fmt: skip
    if exclude:
        entries.append({"exclude": True, "op_names": list(exclude)})
    options: dict[str, Any] = {"rounding": rounding, "round_to": round_to, "cut": cut, "keep_class": keep_class}
    pruner = Pruner(model, entries, criterion_named(criterion), example_inputs, **options)
    masks = pruner.masks()
    return speedup(model, masks, verify=verify, inplace=inplace, plan=pruner.plan, result="module" if keep_class else "auto")
