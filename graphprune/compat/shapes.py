"""How a pruner was called in the first version, as a record, and what such a call is today."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

from graphprune.compat.trainers import epoch_trainer
from graphprune.errors import ConfigError

RENAMED: Mapping[str, str] = {
    "dummy_input": "example_inputs",
    "sparsifying_training_batches": "training_batches",
    "statistics_batch_num": "training_batches",  # as the one before was called earlier
    "sparsifying_training_epochs": "training_epochs",
    "epochs_per_iteration": "training_epochs",
    "num_iterations": "total_iteration",
    "experiment_data_dir": "folder",
    "checkpoint_dir": "folder",
    "output_dir": "folder",
}
"""Name of then -> name of today, wherever it stood."""

CONVERTED: Mapping[str, Callable[[Any], Any]] = {"trainer": epoch_trainer}
"""Name of then -> from its value to that of today, wherever it stood."""

EXPLAINED: Mapping[str, str] = {
    "dependency_aware": "whether coupled groups are pruned, or each layer by itself",
    "global_sort": "makes one ranking of all layers of an entry",
    "trainer": "trainer(model, optimizer, criterion), which may take `epoch` as well",
    "row": "rho of all entries that have none",
    "val_loader": "batches, which the evaluator gets in front of the model; the first finds the groups where there is no dummy_input",
    "others": "none, as what comes behind val_loader is given by name",
    "flops_ratio": "the share of the MACs that stays",
    "lbound": "the smallest share of its channels that a group keeps",
    "n_calibration_batches": "so many batches of val_loader are what weights are fitted to by least squares",
    "n_points_per_layer": "at how many positions per sample they are fitted",
    "options": "those of today",
}
"""Name of then -> what docstrings say of it, where it does not follow from its name of today."""


@dataclass(frozen=True)
class Refused:
    """Values that a parameter may not have.

    Attributes:
        when: whether a value is one of them.
        what: the text of the error; {who} is the pruner and {value} what was given.
        fix: what to write instead.
    """

    when: Callable[[Any], bool]
    what: str
    fix: str


@dataclass(frozen=True)
class CallShape:
    """The parameters that a pruner had, and what they are today; a name may be an option that is not among the parameters.

    Attributes:
        takes: the parameters in their order, as between the brackets of a `def`; `**options`, those of today, come behind them.
        today: name of then -> name of today, besides `RENAMED`; "a.b" is the entry b of the dict a; None has no meaning any more.
        value: name of then -> from its value to that of today, besides `CONVERTED`.
        constants: name of today -> its value where nothing else is given.
        refused: name of then -> values that it may not have.
        code: called with the pruner's name and the arguments of then, which it changes in place; for what follows from several of them.
    """

    takes: str
    today: Mapping[str, str | None] = field(default_factory=dict)
    value: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Refused] = field(default_factory=dict)
    code: Callable[[str, dict[str, Any]], None] | None = None

    @property
    def signature(self) -> inspect.Signature:
        """The parameters of then, without annotations."""
        return inspect.signature(eval(f"lambda {self.takes}, **options: None"))  # noqa: S307 (a text of this package, which is Python)

    def annotated(self, target: type) -> inspect.Signature:
        """Returns the signature, with the annotations of the pruner of today."""
        known = inspect.signature(target).parameters
        same = [(one, known.get(self._today(name) or "")) for name, one in self.signature.parameters.items()]
        own = [then.replace(annotation=Any if now is None or then.kind is Parameter.VAR_KEYWORD else now.annotation) for then, now in same]
        return inspect.Signature(own, return_annotation=None)

    def documented(self, text: str, target: type) -> str:
        """Returns a class's docstring with what there is to say of its arguments."""
        whose = f"of `graphprune.{target.__name__}`"
        lines = [inspect.cleandoc(text), "", "Args:"]
        for name, one in self.signature.parameters.items():
            today = self._today(name)
            means = EXPLAINED.get(name, f"as {whose}" if today == name else f"`{today}` {whose}")
            if today is None:
                means = f"{one.default!r} and nothing else" if name in self.refused else "has no meaning any more"
            lines.append(f"    {name}: {means}.")
        return "\n".join([*lines, "", "Raises:", f"    ConfigError: an argument has no meaning any more, or as {whose}."])

    def translated(self, who: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the keyword arguments of today for a call of then; a parameter that is None is as good as left out.

        Args:
            who: the pruner.
            arguments: positional ones.
            options: keyword ones.

        Raises:
            TypeError: the arguments do not fit the signature.
            ConfigError: a value is refused, or one thing is given under two names.
        """
        signature = self.signature
        default = {name: one.default for name, one in signature.parameters.items() if one.default is not Parameter.empty}
        try:
            bound = dict(signature.bind(*arguments, **options).arguments)
        except TypeError as error:
            raise TypeError(f"{who}: {error}") from None
        bound |= bound.pop("options", {})
        given = {name: value for name, value in bound.items() if value is not None or name not in default}
        then = {name: value for name, value in default.items() if value is not None} | given
        for name, rule in self.refused.items():
            if rule.when(then.get(name)):
                raise ConfigError(rule.what.format(who=who, value=then.get(name)), rule.fix)
        if self.code is not None:
            self.code(who, then)
        now: dict[str, Any] = {}
        said_as: dict[str, str] = {}
        for name in sorted(then, key=lambda name: name not in given):  # what has its default comes last, and yields
            today = self._today(name)
            if today in said_as and name in given:
                raise ConfigError(f"{who} is given {said_as[today]} and {name}, which are the same", "Drop one of them")
            if today is not None and today not in said_as:
                convert = self.value.get(name, CONVERTED.get(name))
                said_as[today], now[today] = name, then[name] if convert is None else convert(then[name])
        return _nested({**self.constants, **now})

    def _today(self, name: str) -> str | None:
        return self.today.get(name, RENAMED.get(name, name))


def _nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments with those called "a.b" in a dict a, in which what stands there already goes first."""
    out = {name: value for name, value in arguments.items() if "." not in name}
    for name, value in arguments.items():
        outer, dot, inner = name.partition(".")
        if dot:
            out[outer] = {inner: value, **(out.get(outer) or {})}
    return out
