"""Options by name: what each means, which of them a pruner takes, and what to write for those that other versions had.

Every option is described once, in the record that it belongs to; a constructor that takes `**options: Unpack[SomeRecord]` takes all of
the record's, which may be put together from several. `check_names` checks the names, `Pruner` and what else uses a value checks that.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

from graphprune.data.sources import source
from graphprune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphprune.criteria.base import Criterion
    from graphprune.criteria.scoring import Aggregation, Scope
    from graphprune.data.sources import Source
    from graphprune.groups.graph import DependencyGraph
    from graphprune.pruners.budgets import Budget, Rounding
    from graphprune.pruners.families import Cut

Mode: TypeAlias = Literal["normal", "dependency_aware", "global", "balance"]
MODES: tuple[Mode, ...] = get_args(Mode)

FORMER = {
    "dummy_input": "example_inputs=",
    "dependency_aware": "mode='dependency_aware', the default once there are example inputs",
    "global_sort": "mode='global', or 'total_sparsity' in the config list",
    "existed_wrappers": "Leave it out: nothing is wrapped, and masks can be kept and applied again",
    "evaluator": "Pass trainer=, optimizer= and criterion=, or data= and loss=",
    "training_steps": "training_batches= (of data) or training_epochs= (of training)",
    "training_batches": "Leave it out: this pruner looks at no data; or write iterations= and training_epochs= for one that trains",
}
"""Name of an argument of other versions -> what to write instead: how `check_names` understands it, wherever there is no such argument."""

FORMER_RUN = dict.fromkeys(("log_dir", "checkpoint_dir", "experiment_data_dir"), "folder=")
"""The same for what is kept in a folder."""


class GroupOptions(TypedDict, total=False):
    """How channels are scored and counted.

    Attributes:
        budget: a fraction of the MACs or parameters to remove, met to within one channel's cost: of all groups evenly, or of one
            ranking in mode "global". The config list then says which layers lose channels, and not how many.
        aggregation: how the scores of a coupled group's layers are put together: "sum" (the default), "mean", "max", or the first
            "producer" alone.
        scope: whose weights count: those of the layers that compute the channels ("producers", the default) or also of those that read
            them ("group").
        rounding: of the kept count, "floor" or "ceil"; of a budget, which side of it to end on.
        round_to: kept counts are multiples of this where there are enough channels.
        cut: what goes where a dimension is cut into equal blocks, see `graphprune.pruners.families`.
        graph: the model's graph, if there is one already.
        keep_class: keep more channels where the model's own arithmetic on sizes (`C // num_heads`, equal chunks) could not state what
            was asked for, so that the shrunk model can be of the model's own class.
        source: where a criterion that needs data takes it from, see `graphprune.data.sources`.
    """

    budget: Budget | None
    aggregation: Aggregation
    scope: Scope
    rounding: Rounding
    round_to: int
    cut: Cut
    graph: DependencyGraph | None
    keep_class: bool
    source: Source | None


class Options(GroupOptions, total=False):
    """What all pruners of groups take.

    Attributes:
        mode: "dependency_aware" prunes whole coupled groups, each by its own sparsity: only that makes a model smaller. "global" makes one
            ranking of all groups (an entry's sparsity is then that of all its layers together). "balance" is the first with the same
            positions taken from every conv group or head (`cut="within"`). "normal" masks the output rows of each layer by itself,
            coupled or not. By default the first, or "normal" where there is nothing to find the groups with.
    """

    mode: Mode | None


class InputOptions(TypedDict, total=False):
    """What a model is run on.

    Attributes:
        example_inputs: what the model is run on to find its groups: a tensor, a tuple of arguments, a dict of keyword arguments, or
            (arguments, keyword arguments). What trains or is given data takes its first batch where there are none.
    """

    example_inputs: object


class DataOptions(TypedDict, total=False):
    """Data as it is.

    Attributes:
        data: batches of (inputs, targets), or of inputs alone where no loss is needed; in place of a trainer, to train or to look at. What
            trains goes through them once per epoch. See `graphprune.data.sources.Loader`.
        loss: of the data: from output and targets to one number.
    """

    data: Iterable[Any] | None
    loss: Callable[[Any, Any], Tensor] | None


class TrainingOptions(DataOptions, total=False):
    """How to train.

    Attributes:
        trainer: `trainer(model, optimizer, criterion)`, which trains the model and by the optimizer in its arguments for one epoch.
        optimizer: bound to the model's parameters (a copy is used, and it stays bit-identical), or a function from parameters to one.
        criterion: handed to the trainer.
    """

    trainer: Any
    optimizer: Any
    criterion: Any


class RunOptions(TypedDict, total=False):
    """How a long run is kept and shown.

    Attributes:
        folder: where the run is kept, step by step, atomically. The same call goes on from there, with the random numbers of then (of the
            global generators: seed your own by what they are for), and ends as one that was never interrupted. In the end the history is
            written there, as CSV and, by matplotlib, as a plot. By default nothing is kept.
        progress: show a bar with score, sparsity and time left on stderr, where that is a terminal.
    """

    folder: str | os.PathLike[str] | None
    progress: bool


class SeenOptions(Options, DataOptions, total=False):
    """What pruners take that look at data."""


class TrainedOptions(SeenOptions, InputOptions, total=False):
    """What pruners take that train."""


def check_names(
    caller: Callable[..., object],
    given: Iterable[str],
    record: type,
    former: Mapping[str, str] | None = None,
    surplus: Sequence[object] = (),
    order: Sequence[str] = (),
) -> None:
    """Raises where an option is not one of a record's.

    Args:
        caller: the pruner's class, or the function that takes the options.
        given: names of the options.
        record: the TypedDict that lists those that there are.
        former: name of an argument that there is not, even if the record has it -> what to write instead: a sentence, or what follows
            "Write". `FORMER` counts besides.
        surplus: positional arguments behind those that the pruner takes.
        order: what these are in other versions.

    Raises:
        ConfigError: one is not; it says what to write instead, or suggests the nearest name.
    """
    who, known = caller.__name__, record.__annotations__
    for name in (*order[: len(surplus)], *given):
        fix = (former or {}).get(name) or ("" if name in known else FORMER.get(name, ""))
        if fix or name not in known:
            fix = fix if fix[:1].isupper() else fix and f"Write {fix}"
            every = dict.fromkeys((*inspect.signature(caller).parameters, *known))
            raise ConfigError(f"{who} has no argument {name}=", fix or nearest(name, every) or f"Use {', '.join(known)}")
    if surplus:
        what = f"{who} is given {len(surplus)} positional argument{'s' * (len(surplus) > 1)} more than it takes"
        raise ConfigError(what, "Write options by name")


def split(options: Mapping[str, Any], *records: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the options of some records, and all others."""
    names = {name for record in records for name in record.__annotations__}
    return {n: v for n, v in options.items() if n in names}, {n: v for n, v in options.items() if n not in names}


def traceable(who: str, options: Mapping[str, Any], training: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options that say what to trace a model with: where they do not, the first batch of the training is taken.

    Args:
        who: the pruner, for messages.
        options: of `Pruner`.
        training: what `TrainingOptions` lists; where it has neither a trainer nor data, the options stay as they are.
    """
    found = options.get("example_inputs") is not None or options.get("graph") is not None
    if found or (training.get("trainer") is None and training.get("data") is None):
        return dict(options)
    return {**options, "source": source(**training, limit=1, who=who)}


def showing_data(options: Mapping[str, Any], criterion: Criterion) -> dict[str, Any]:
    """Returns options with a source in the place of `data` and `loss`, for a criterion that looks at data."""
    given, others = split(options, DataOptions)
    who = f"criterion {type(criterion).__name__}"
    return others if given.get("data") is None else {**others, "source": source(**given, who=who)}


def kept_folder(
    who: str, folder: str | os.PathLike[str] | None, log_dir: str | os.PathLike[str] | None, *, keep: bool
) -> str | os.PathLike[str] | None:
    """Returns the folder of a run, for which NNI has another name.

    Raises:
        ConfigError: there is none, and intermediate results are to be kept.
    """
    found = log_dir if folder is None else folder
    if keep and found is None:
        raise ConfigError(f"{who} is to keep intermediate results, and has no folder", "Pass folder=")
    return found


def check_evaluator(who: str, evaluator: Callable[[nn.Module], float] | None, training: str = "finetune= says how to train") -> None:
    """Raises where something else than a function is given as an evaluator, such as the objects of NNI's second and third version.

    Args:
        who: the pruner, for messages.
        evaluator: what it was given, None for nothing.
        training: how this pruner is told to train, which is what such an object says besides.

    Raises:
        ConfigError: it cannot be called.
    """
    if evaluator is not None and not callable(evaluator):
        what = f"evaluator of {who} is a {type(evaluator).__name__}"
        raise ConfigError(what, f"Pass a function from a model to its score; {training}")
